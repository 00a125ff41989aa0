"""Predictions from bytes, and occupancies as the vendor's calculator has them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.roofline import H200, Ceilings, measure_ceilings, occupancy


def test_the_slower_of_the_two_sets_the_time() -> None:
    assert H200.least_us(4.3e6, 0) == pytest.approx(1.0)
    assert H200.least_us(0, 790e6) == pytest.approx(1.0)
    assert H200.least_us(4.3e6, 2 * 790e6) == pytest.approx(2.0)
    assert H200.bound(4.3e6, 1e6) == "memory"
    assert H200.bound(1e3, 1e9) == "compute"


@pytest.mark.parametrize(
    ("arch", "registers", "shared_bytes", "num_warps", "share"),
    [
        ("sm_90", 128, 0, 16, 0.25),  # 512 threads of 128 registers are all there are
        ("sm_90", 129, 0, 16, 0.0),  # rounded up to 136: not even one program
        ("sm_90", 32, 0, 4, 1.0),
        ("sm_90", 32, 100_000, 4, 2 * 4 / 64),  # shared memory leaves room for two
        ("sm_90", 16, 0, 1, 0.5),  # at most 32 programs
        ("sm_80", 32, 100_000, 4, 4 / 64),
        ("gfx942", 32, 0, 4, None),
    ],
)
def test_occupancy(arch: str, registers: int, shared_bytes: int, num_warps: int, share: float | None) -> None:
    assert occupancy(arch, registers=registers, shared_bytes=shared_bytes, num_warps=num_warps) == share


def test_ceilings_are_measured() -> None:
    found = measure_ceilings(torch.device("cpu"), quick=True)
    assert isinstance(found, Ceilings)
    assert 1e8 < found.copy_bytes_per_s < 1e13
    assert 1e8 < found.matmul_flops_per_s < 1e15
