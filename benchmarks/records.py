"""Rows of results: what each carries, and how it reaches a file."""

from __future__ import annotations

import dataclasses
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkout import carried_commit, sources_digest, tables_digest
from benchmarks.resuming import append_lines
from benchmarks.roofline import Ceilings
from soda_engine.environment import environment

SCHEMA = 1


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Describe the machine, the versions and the checkout; what the device does not have is null."""
    found = environment(device)
    commit = found.pop("git") or carried_commit()
    on_gpu = device.type == "cuda"
    return {
        **found,
        "git": commit and commit.removesuffix("+"),
        "dirty": bool(commit and commit.endswith("+")),
        "sources": sources_digest(),
        "tables": tables_digest(),
        "driver": _nvidia_smi("driver_version") if on_gpu else None,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "clocks": {"sm_mhz": _nvidia_smi("clocks.sm"), "memory_mhz": _nvidia_smi("clocks.mem")} if on_gpu else {},
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _nvidia_smi(field: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def describe_ceilings(ceilings: Ceilings) -> dict[str, float]:
    """Write ceilings in the units of a row."""
    return {
        "copy_gbps": ceilings.copy_bytes_per_s / 1e9,
        f"matmul_{ceilings.matmul_dtype}_tflops": ceilings.matmul_flops_per_s / 1e12,
    }


def describe_config(config: Any) -> tuple[str, dict[str, Any]]:
    """Return a launch config's variant and fields; None is of a kernel that has no choice."""
    return ("fixed", {}) if config is None else (config.variant, dataclasses.asdict(config))


def new_row(**known: Any) -> dict[str, Any]:
    """Return a row with every key of the schema, null where nothing is known.

    Raises:
        KeyError: a key is not in the schema.
    """
    row: dict[str, Any] = {
        "schema": SCHEMA, "suite": None, "op": None, "case": None, "provider": None, "variant": None, "mode": None,
        "timer": None, "unit": "us",
        "stats": dict.fromkeys(("p50", "p20", "p80", "min", "n", "aa_spread")),
        "paired": None, "bytes_min": None, "flops": None, "pct_ceiling": None, "bound": None,
        "memory": dict.fromkeys(("peak_mib", "saved_for_backward_mib")),
        "launches": None,
        "check": dict.fromkeys(("rel_l2", "ratio_to_torch", "worst", "pass", "bitwise_rerun")),
        "config": {}, "status": None, "reason": None, "env": None, "ceilings": None,
    }  # fmt: skip
    unknown = known.keys() - row.keys()
    if unknown:
        raise KeyError(f"not in the schema of a row: {sorted(unknown)}")
    return row | known


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file of one JSON object a line; it is on disk when this returns."""
    append_lines(path, [row])
