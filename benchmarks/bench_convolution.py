"""The 3x3 convolution under pytest-benchmark: `pytest benchmarks/bench_convolution.py`."""

from __future__ import annotations

from collections.abc import Callable

SUITE = "conv"


def test_convolution(time_case: Callable[[], None]) -> None:
    """Check a provider on a case, then time it."""
    time_case()
