"""What a machine has of what is needed, before minutes are spent on finding out."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from benchmarks.checkout import CARRIED, ROOT, sources_digest

LEAST = {"torch": (2, 11), "triton": (3, 6)}
LEAST_PYTHON = (3, 11)
OF_ENGINE = ("tyro", "kornia", "datasets", "pyarrow", "safetensors", "sklearn", "tqdm", "tensorboard", "matplotlib")
LIBRARY = Path("kernels/soda_kernels/libsoda_kernels.so")


@dataclass
class Machine:
    """What was found.

    Attributes:
        device: the GPU's name, a CPU's in a rehearsal.
        lines: what is there, for a person.
        short: what is missing that nothing can be done without.
    """

    device: str
    lines: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)


def examine(commit: str | None, *, rehearse: bool) -> Machine:
    """Look at this machine; a rehearsal needs no GPU."""
    import torch

    from soda_engine.environment import environment

    has_gpu = torch.cuda.is_available() and not rehearse
    found = Machine(device=environment(torch.device("cuda" if has_gpu else "cpu"))["device"])
    found.lines += [
        f"device      {found.device}",
        f"sources     {commit or 'no commit'}, {sources_digest()}",
        f"python      {sys.version.split()[0]}",
        f"pytorch     {torch.__version__}, CUDA {torch.version.cuda}",
        f"triton      {_version('triton') or 'not installed'}",
        f"free disk   {shutil.disk_usage(ROOT).free / 2**30:.0f} GiB",
    ]
    if has_gpu:
        found.lines += _gpu_lines()
    elif not rehearse:
        found.short.append("PyTorch finds no CUDA device")
    found.short += shortages({name: _version(name) for name in LEAST})
    if importlib.util.find_spec("pytest") is None:
        found.short.append("pytest is not installed")
    missing = [name for name in OF_ENGINE if importlib.util.find_spec(name) is None]
    if missing:
        found.lines.append(f"missing     {', '.join(missing)}: tests and trainings that need them fail; `make carry` "
                           "brings them")  # fmt: skip
    return found


def shortages(versions: Mapping[str, str | None], python: tuple[int, ...] = sys.version_info[:2]) -> list[str]:
    """Say which versions are too old or missing."""
    short = []
    if python < LEAST_PYTHON:
        short.append(f"Python is {'.'.join(map(str, python))}, and must be {'.'.join(map(str, LEAST_PYTHON))} or newer")
    for name, least in LEAST.items():
        version = versions[name]
        if version is None or tuple(map(int, re.findall(r"\d+", version)[:2])) < least:
            short.append(f"{name} is {version or 'not installed'}, and must be {'.'.join(map(str, least))} or newer")
    return short


def _gpu_lines() -> list[str]:
    """Ask the driver, so that this process takes no memory of the GPU."""
    fields = ("driver_version", "memory.total", "memory.free", "clocks.sm", "clocks.max.sm", "clocks.mem",
              "utilization.gpu")  # fmt: skip
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return [f"driver      nvidia-smi does not answer: {error}"]
    driver, total, free, clock, most, memory_clock, load = (each.strip() for each in output.split("\n")[0].split(","))
    return [
        f"driver      {driver}",
        f"gpu memory  {free} free of {total}",
        f"gpu clocks  {clock} of {most}, memory {memory_clock}; {load} busy",
    ]


def provide_library(seconds: float) -> str:
    """Copy the native CPU library from what was carried, or build it, where it is missing; return what came of it."""
    library = ROOT / LIBRARY
    if library.exists():
        return "there"
    carried = CARRIED / library.name
    if carried.exists():
        shutil.copyfile(carried, library)
        return "carried"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    try:
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"missing: its build took more than {seconds:.0f} s"
    if library.exists():
        return "built"
    said = (finished.stdout + finished.stderr).strip().splitlines() or ["no message"]
    return f"missing: {said[-1]}"


def environment_of_parts(*, rehearse: bool) -> dict[str, str]:
    """Return the environment of everything that is started here: this checkout's packages come first."""
    path = [ROOT / "kernels", ROOT / "engine", ROOT, os.environ.get("PYTHONPATH")]
    set_here = {"PYTHONPATH": os.pathsep.join(str(each) for each in path if each), "PYTHONUNBUFFERED": "1"}
    if rehearse:  # of tensors this small two threads wait for each other, whenever another program holds a core
        set_here["OMP_NUM_THREADS"] = "1"
    return os.environ | set_here


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
