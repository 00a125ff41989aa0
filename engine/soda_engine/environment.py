"""Where a number was measured: what goes beside it into its file."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from soda_engine import __version__


def environment(device: torch.device) -> dict[str, Any]:
    """Describe the hardware and versions of this process.

    Returns:
        device: the GPU's or the CPU's name; threads: PyTorch's, on a CPU; torch, python and package versions; git: the
            commit of the checkout this package lies in, with a + if it was changed, or None; utc.
    """
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "package": __version__,
        "git": _commit(),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """Return the checkout's commit, from git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
