"""The process that compiles: it answers lines of JSON with what a kernel's machine code looks like, with no GPU.

It is apart from the tests because they run Triton as an interpreter, which one process cannot mix with the compiler,
and because it can run another Triton than theirs.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

_GLOBAL = {"LDG": "load", "LDGSTS": "load", "LD": "load", "STG": "store", "ST": "store"}
_LOCAL = {"LDL", "STL"}
_SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_AMD_BYTES = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2}


def compile_kernel(spec: dict[str, Any], arch: str) -> tuple[dict[str, Any], str]:
    """Compile a description of a launch for an architecture.

    Returns:
        The fields of a `KernelReport`, and the listing of the machine code.
    """
    import triton
    from triton.compiler import ASTSource

    module, _, name = spec["kernel"].partition(":")
    kernel = getattr(importlib.import_module(module), name)
    signature, constants = dict(spec["signature"]), dict(spec["constants"])
    for parameter in inspect.signature(kernel.fn).parameters.values():
        if parameter.name not in signature and parameter.default is not inspect.Parameter.empty:
            signature[parameter.name], constants[parameter.name] = "constexpr", parameter.default
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in spec["divisible"]}
    options = {"num_warps": spec["num_warps"], "num_stages": spec["num_stages"], "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=_target(arch), options=options)
    if arch.startswith("sm_"):
        fields, listing = _read_cubin(compiled.asm["cubin"], compiled.asm["ptx"])
    else:
        fields, listing = _read_amdgcn(compiled.asm["amdgcn"])
    tensors = _tensors_by_line(compiled.asm["ttir"])
    for access in fields["accesses"]:
        lines = access["line"].split(", ")
        access["tensors"] = sorted(set().union(*(tensors.get((access["kind"], line), set()) for line in lines)))
    # Triton asks for its shared memory at the launch, so the code's own figure does not hold it.
    return {**fields, "shared_bytes": compiled.metadata.shared, "triton": triton.__version__}, listing


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def _read_cubin(cubin: bytes, ptx: str) -> tuple[dict[str, Any], str]:
    """Read NVIDIA machine code with the tools that come with Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        listing = _output(tools / "nvdisasm", "--print-line-info", "--print-code", file.name)
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    lines = _lines_before_assembly(ptx)
    accesses: Counter[tuple[str, int, str]] = Counter()
    spills, where = 0, "?"
    for line in listing.splitlines():
        if found := re.search(r'//## File "(?:.*/)?([^"/]+)", line (\d+)', line):
            where = f"{found[1]}:{found[2]}"
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", line):
            operation, *suffixes = found[1].split(".")
            spills += operation in _LOCAL
            if kind := _GLOBAL.get(operation):
                width = max([_SASS_BYTES.get(suffix, 0) for suffix in suffixes]) or 4
                accesses[kind, width, ", ".join(sorted(lines.get((kind, width, where), {where})))] += 1
    fields = {
        "registers": used["REG"],
        "local_bytes": used["STACK"] + used["LOCAL"],
        "spills": spills,
        "accesses": _listed(accesses),
        "has_hgmma": "HGMMA" in listing,
        "has_hmma": re.search(r"\bHMMA\b", listing) is not None,
    }
    return fields, listing


def _lines_before_assembly(ptx: str) -> dict[tuple[str, int, str], set[str]]:
    """Map (kind, bytes, line) as the machine code has it to the source lines that it stands for.

    Triton writes loads and stores as inline assembly, and LLVM counts the source line on with every instruction in it:
    a load that first clears four registers seems to come from four lines below. The first instruction is right.
    """
    lines: dict[tuple[str, int, str], set[str]] = {}
    where = begun = "?"
    awaits_first = False
    for line in ptx.splitlines():
        if "// begin inline asm" in line:
            awaits_first = True
        elif found := re.match(r"\s*\.loc\s.*//\s*(?:\S*/)?([^/\s:]+:\d+):", line):
            where = found[1]
        elif line.strip() and awaits_first:
            begun, awaits_first = where, False
        if found := re.search(r"\b(ld|st)\.[\w.:]*global[\w.:]*\.[bfsu](\d+)\b", line):
            elements = re.search(r"\.v(\d)\b", found[0])
            width = int(found[2]) // 8 * int(elements[1] if elements else 1)
            lines.setdefault(({"ld": "load", "st": "store"}[found[1]], width, where), set()).add(begun)
    return lines


def _read_amdgcn(listing: str) -> tuple[dict[str, Any], str]:
    """Read AMD assembly, whose metadata counts registers and spills."""
    metadata = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", listing, flags=re.MULTILINE)}
    accesses: Counter[tuple[str, int, str]] = Counter()
    where = "?"
    for line in listing.splitlines():
        if found := re.match(r"\s*\.loc\s.*;\s*(?:\S*/)?([^/\s:]+:\d+):", line):
            where = found[1]
        elif found := re.match(r"\s*(?:global|buffer|flat)_(load|store)_(?:lds_)?([a-z]+?)(?:x(\d))?(?:_|\s)", line):
            accesses[found[1], _AMD_BYTES.get(found[2]) or 4 * int(found[3] or 1), where] += 1
    fields = {
        "registers": metadata["vgpr_count"],
        "local_bytes": metadata["private_segment_fixed_size"],
        # A scalar register spills into lanes of a vector register, which costs no memory.
        "spills": metadata["vgpr_spill_count"],
        "accesses": _listed(accesses),
        "has_hgmma": False,
        "has_hmma": False,
    }
    return fields, listing


def _tensors_by_line(ttir: str) -> dict[tuple[str, str], set[str]]:
    """Say which pointer parameters the loads and stores of a source line ("file.py:line") reach.

    Triton's first intermediate form has one operation for each load and store, with helper functions inlined; their
    addresses are followed back to the parameters through every operation that yields pointers.
    """
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, flags=re.MULTILINE))

    def line_of(location: str) -> str:
        if found := re.match(r'"(?:.*/)?([^"/]+)":(\d+):', location):
            return f"{found[1]}:{found[2]}"
        inner = re.search(r"#loc\d*", location)  # of a call site, the place inside the function that was called
        return line_of(locations[inner[0]]) if inner and inner[0] in locations else "?"

    reached: dict[tuple[str, str], set[str]] = {}
    origins: dict[str, set[str]] = {}
    for line in ttir.splitlines():
        if "tt.func public" in line:
            origins = {f"%{name}": {name} for name in re.findall(r"%(\w+): !tt\.ptr", line)}
            continue
        for carried, initial in re.findall(r"(%\w+) = (%\w+)", line.partition("iter_args(")[2]):
            origins[carried] = origins.get(initial, set())
        found = re.match(r"\s*(?:(%\w+)(?::\d+)? = )?(\w+\.\w+) (.*)", line)
        if not found:
            continue
        result, operation, rest = found.groups()
        operands = [origins.get(value, set()) for value in re.findall(r"%\w+", rest)]
        if operation in ("tt.load", "tt.store"):
            location = re.search(r"loc\((.*)\)$", line)
            key = (operation[3:], line_of(location[1]) if location else "?")
            reached.setdefault(key, set()).update(operands[0])
        elif result and "!tt.ptr" in rest:
            origins[result] = set().union(*operands)
    return reached


def _listed(accesses: Counter[tuple[str, int, str]]) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "bytes": width, "line": where, "count": count}
        for (kind, width, where), count in sorted(accesses.items())
    ]


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Answer requests until standard input ends."""
    # Answers have the original output to themselves: whatever a compiler prints goes to the error stream.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            fields, listing = compile_kernel(request["spec"], request["arch"])
            answer = {"fields": fields, "listing": listing}
        except Exception as error:  # every way in which a compiler fails is an answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
