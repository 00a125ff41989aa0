"""Launch configs per GPU: a JSON table of measured ones where there is one, else the family's heuristic.

A table is written by an explicit tuning run (`python -m benchmarks tune`), never while a model runs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch

Config = TypeVar("Config")

TABLES = Path(__file__).parent / "configs"

# An H100's and H200's, for plans that are made where there is no GPU, by fake tensors of one too.
_DEFAULT_MULTIPROCESSORS = 132


def _is_here(device: torch.device) -> bool:
    """Whether a device is a GPU that can be asked about itself."""
    return device.type == "cuda" and torch.cuda.is_available()


def look_up(family: str, key: str, device: torch.device) -> dict[str, Any] | None:
    """Return the tuned config for a problem on a device's architecture, or None."""
    if not _is_here(device):
        return None
    return load_table(family, architecture(device)).get(key)


@functools.cache
def architecture(device: torch.device) -> str:
    """Name a GPU's architecture as the compiler does: sm_90, gfx942."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Return how many programs a device runs side by side at least."""
    if not _is_here(device):
        return _DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def has_copy_engine(device: torch.device) -> bool:
    """Tell whether a device loads blocks that tensor descriptors describe by itself, as NVIDIA's do from sm_90 on."""
    if not _is_here(device):
        return True
    return not torch.version.hip and torch.cuda.get_device_properties(device).major >= 9


def for_wavefronts(config: Config) -> Config:
    """Return a launch config, a frozen dataclass, with as many threads in warps of 64 lanes, which AMD's are."""
    fields: Any = config
    return dataclasses.replace(fields, num_warps=max(1, fields.num_warps // 2))


def power_of_two(number: int) -> int:
    """Return the least power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


def table_path(family: str, arch: str, folder: Path | None = None) -> Path:
    """Return where a family's table for an architecture lies, in the package if no folder is named."""
    return (folder or TABLES) / f"{family}.{arch.replace('_', '')}.json"


@functools.cache
def load_table(family: str, arch: str, folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """Return the tuned configs by problem key; empty where nothing was tuned."""
    path = table_path(family, arch, folder)
    return json.loads(path.read_text())["configs"] if path.exists() else {}


def save_table(
    family: str, arch: str, configs: dict[str, dict[str, Any]], provenance: dict[str, Any], folder: Path | None = None
) -> Path:
    """Merge tuned configs into a family's table, and say what measured them.

    Args:
        configs: a launch config's fields by problem key.
        provenance: device, versions, date and commit of the run that measured them.
        folder: where tables are kept, the package's if not given.
    """
    path = table_path(family, arch, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**load_table(family, arch, folder), **configs}
    text = json.dumps({"provenance": provenance, "configs": dict(sorted(merged.items()))}, indent=1)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    os.replace(partial, path)
    load_table.cache_clear()
    return path
