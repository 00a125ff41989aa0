"""Noising with its loss, and sampler steps, under pytest-benchmark: `pytest benchmarks/bench_diffusion.py`."""

from __future__ import annotations

from collections.abc import Callable

SUITE = "diffusion"


def test_diffusion(time_case: Callable[[], None]) -> None:
    """Check a provider on a case, then time it."""
    time_case()
