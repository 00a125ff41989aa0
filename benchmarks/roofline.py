"""Ceilings of devices: what a time is compared with, and the time that bytes and operations predict."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from soda_engine.roofline.devices import H200, Ceilings

__all__ = ["H200", "Ceilings", "measure_ceilings", "occupancy"]


@dataclass(frozen=True, kw_only=True)
class _Multiprocessor:
    """What limits how many programs one SM holds at a time (CUDA C programming guide, technical specifications)."""

    shared_bytes: int
    num_warps: int = 64
    num_blocks: int = 32
    num_registers: int = 65536


_MULTIPROCESSORS = {
    "sm_80": _Multiprocessor(shared_bytes=164 * 1024),
    "sm_90": _Multiprocessor(shared_bytes=228 * 1024),
    "sm_100": _Multiprocessor(shared_bytes=228 * 1024),
}
_RESERVED_SHARED_BYTES = 1024  # a block, for the system
_WARP = 32
_REGISTERS_A_THREAD = 8  # they are given out in multiples of this


def occupancy(arch: str, *, registers: int, shared_bytes: int, num_warps: int) -> float | None:
    """Return the share of an SM's warps that programs of this size can fill; None where the device is not known."""
    device = _MULTIPROCESSORS.get(arch)
    if device is None:
        return None
    allocated = math.ceil(registers / _REGISTERS_A_THREAD) * _REGISTERS_A_THREAD * _WARP * num_warps
    programs = min(
        device.num_warps // num_warps,
        device.num_blocks,
        device.num_registers // max(1, allocated),
        device.shared_bytes // (shared_bytes + _RESERVED_SHARED_BYTES),
    )
    return programs * num_warps / device.num_warps


def measure_ceilings(device: torch.device, *, quick: bool = False) -> Ceilings:
    """Measure the copy of a large tensor and a square product, each at its best of several times.

    The product is of bf16 on a GPU and of fp32 on a CPU, many of which have no instructions for bf16 and take minutes.
    On a CPU the copy goes through memory: a tensor that stays in the caches can be read faster than this ceiling. Not
    yet run on a GPU.
    """
    num_bytes = 2**24 if quick else 2**29
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 512 if quick else 8192 if device.type == "cuda" else 2048
    dtype, name = (torch.bfloat16, "bf16") if device.type == "cuda" else (torch.float32, "fp32")
    a = torch.randn(side, side, device=device, dtype=dtype)
    product = torch.empty_like(a)
    copy_s = _best_s(lambda: target.copy_(source), device)
    matmul_s = _best_s(lambda: torch.mm(a, a, out=product), device)
    return Ceilings(
        copy_bytes_per_s=2 * num_bytes / copy_s, matmul_flops_per_s=2 * side**3 / matmul_s, matmul_dtype=name
    )


def _best_s(call: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    def timed() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return min(timed() for _ in range(rounds))
