"""Ahead-of-time compiles for GPUs that are not there, and the gate on what the compiler made of a kernel."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

MAX_SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""The most that one program may ask for: the CUDA programming guide's compute capabilities; CDNA 3's 64 KiB of LDS."""


class CompileError(Exception):
    """A kernel that a compiler refused, or that ended it."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """The instructions of one width that one source line became."""

    kind: str
    """"load" or "store", of global memory."""
    bytes: int
    """Per thread and instruction."""
    line: str
    """"file.py:line"."""
    tensors: tuple[str, ...]
    """The pointer parameters that the line's accesses of this kind reach; empty where that is not known."""
    count: int


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """What a compiler made of a kernel."""

    kernel: str
    arch: str
    triton: str
    registers: int
    """Per thread; on AMD the vector registers."""
    shared_bytes: int
    """Per program."""
    spills: int
    """Instructions that touch local memory (NVIDIA), vector registers spilled (AMD)."""
    local_bytes: int
    """Stack of a thread."""
    accesses: tuple[Access, ...]
    """Instructions of lanes that load or store global memory: not a whole tile's copy, not AMD's scalar loads."""
    has_hgmma: bool
    has_hmma: bool
    """Whether it uses the warp-group matrix instructions of sm_90."""
    listing: Path
    """The machine code with its source lines."""

    @property
    def max_vector_bytes(self) -> int:
        """Width of the widest access."""
        return max((access.bytes for access in self.accesses), default=0)

    def vector_bytes(self, kind: str) -> dict[int, int]:
        """Count the instructions of a kind ("load" or "store") by their width."""
        widths: Counter[int] = Counter()
        for access in self.accesses:
            if access.kind == kind:
                widths[access.bytes] += access.count
        return dict(widths)


def compile_specs(
    specs: Sequence[dict[str, Any]], arch: str, *, triton_path: str | Path | None = None
) -> list[KernelReport]:
    """Compile launches that `soda_kernels.aot.specify` described, each different one once.

    Reports are kept on disk under the temporary folder, so what has not changed is not compiled again.

    Args:
        specs: descriptions; the result has one report for each, in order.
        arch: "sm_80", "sm_90", "sm_100" or "gfx942".
        triton_path: a folder that holds another Triton's `triton` package; the installed one if not given.

    Raises:
        CompileError: naming the kernel and what the compiler said.
    """
    if arch not in MAX_SHARED_BYTES:
        raise ValueError(f"arch is {arch!r}; accepted are {', '.join(MAX_SHARED_BYTES)}")
    path = None if triton_path is None else str(Path(triton_path).resolve())
    return [_compile(json.dumps(spec, sort_keys=True), arch, path) for spec in specs]


def gate(
    report: KernelReport,
    *,
    max_registers: int | None = None,
    max_shared_bytes: int | None = None,
    min_vector_bytes: int = 16,
    tensors: Collection[str] | None = None,
    hgmma: bool = False,
) -> list[str]:
    """List what is wrong with a compiled kernel; an empty list means that it passes.

    Spills, local memory and more shared memory than the architecture has are always wrong.

    Args:
        max_registers, max_shared_bytes: what the planned number of resident programs leaves to each.
        min_vector_bytes: some access has to be this wide, and every source line by which a thread loads or stores at
            least this much has to do most of it in accesses of this width; 0 accepts every width.
        tensors: the pointer parameters for which widths matter, as a rule those of a kernel's big tensors; all if not
            given. Accesses whose tensor is not known count as theirs.
        hgmma: whether every product is to be of warp-group matrix instructions, which work beside the warps.
    """
    complaints = []
    if report.spills:
        complaints.append(f"{report.spills} spills")
    if report.local_bytes:
        complaints.append(f"{report.local_bytes} bytes of local memory a thread")
    if max_registers is not None and report.registers > max_registers:
        complaints.append(f"{report.registers} registers, where {max_registers} are allowed")
    shared_limit = MAX_SHARED_BYTES[report.arch]
    if max_shared_bytes is not None:
        shared_limit = min(shared_limit, max_shared_bytes)
    if report.shared_bytes > shared_limit:
        complaints.append(f"{report.shared_bytes} bytes of shared memory, where {shared_limit} are allowed")
    concerned = [
        access
        for access in report.accesses
        if tensors is None or not access.tensors or not set(access.tensors).isdisjoint(tensors)
    ]
    widest = max((access.bytes for access in concerned), default=min_vector_bytes)
    if widest < min_vector_bytes:
        complaints.append(f"no access wider than {widest} bytes, where {min_vector_bytes} are wanted")
    for kind, line in sorted({(access.kind, access.line) for access in concerned}):
        there = [access for access in concerned if (access.kind, access.line) == (kind, line)]
        moved = sum(access.bytes * access.count for access in there)
        wide = sum(access.bytes * access.count for access in there if access.bytes >= min_vector_bytes)
        if moved >= min_vector_bytes and 2 * wide < moved:
            widths = ", ".join(f"{access.count} of {access.bytes}" for access in there)
            names = ", ".join(there[0].tensors) or "a tensor"
            complaints.append(
                f"{line}: narrow {kind}s of {names} ({widths} bytes), where {min_vector_bytes} are wanted"
            )
    if hgmma and not report.has_hgmma:
        complaints.append("no warp-group matrix instructions")
    if hgmma and report.has_hmma:
        complaints.append("matrix instructions of single warps")
    return [f"{report.kernel} on {report.arch} (Triton {report.triton}): {text}" for text in complaints]


@cache
def _compile(spec: str, arch: str, triton_path: str | None) -> KernelReport:
    kernel = json.loads(spec)["kernel"]
    parts = [spec, arch, _triton_version(triton_path), _digest(kernel.partition(":")[0].partition(".")[0])]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    stored, listing = _folder() / f"{key}.json", _folder() / f"{key}.txt"
    if not stored.exists():
        answer = _worker(triton_path).ask({"spec": json.loads(spec), "arch": arch})
        if "error" in answer:
            raise CompileError(f"{kernel} on {arch} (Triton {_triton_version(triton_path)}): {answer['error']}")
        _write(listing, answer["listing"])
        _write(stored, json.dumps(answer["fields"]))
    fields = json.loads(stored.read_text())
    accesses = tuple(Access(**{**access, "tensors": tuple(access["tensors"])}) for access in fields.pop("accesses"))
    return KernelReport(kernel=kernel, arch=arch, accesses=accesses, listing=listing, **fields)


class _Worker:
    """A compiling process with one Triton, kept for as long as the tests run."""

    def __init__(self, triton_path: str | None) -> None:
        search = [*([triton_path] if triton_path else []), str(ROOT), *(entry for entry in sys.path if entry)]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment.update(PYTHONPATH=os.pathsep.join(search), TRITON_CACHE_DIR=str(_folder() / "triton"))
        command = [sys.executable, "-m", "tests.harness.compile_worker"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.close)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            _worker.cache_clear()  # the next request starts a process of its own
            status = self.process.wait()
            return {"error": f"the compiler ended its process with status {status}"}
        return json.loads(answer)

    def close(self) -> None:
        """Let the process end."""
        if self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self.process.wait()


@cache
def _worker(triton_path: str | None) -> _Worker:
    return _Worker(triton_path)


@cache
def _folder() -> Path:
    """Return the folder of reports and of Triton's own cache, private to the user."""
    folder = Path(tempfile.gettempdir()) / f"soda-compiled-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


@cache
def _triton_version(triton_path: str | None) -> str:
    """Read which Triton a worker will import, without importing it."""
    (location, *_) = [Path(triton_path) / "triton"] if triton_path else _locations("triton")
    found = re.search(r"__version__ = ['\"](.+)['\"]", (location / "__init__.py").read_text())
    if not found:
        raise ValueError(f"no Triton in {location}")
    return found[1]


@cache
def _digest(package: str) -> str:
    """Hash every source that a kernel of a package may be made of, and this harness's reading of the result."""
    sources = [Path(__file__).with_name("compile_worker.py")]
    for location in _locations(package):
        sources += sorted(location.rglob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()


def _locations(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"no package {package}")
    return [Path(location) for location in spec.submodule_search_locations]


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all: another test run may read it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
