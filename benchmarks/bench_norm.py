"""Modulated group norm under pytest-benchmark: `pytest benchmarks/bench_norm.py`."""

from __future__ import annotations

from collections.abc import Callable

SUITE = "norm"


def test_norm(time_case: Callable[[], None]) -> None:
    """Check a provider on a case, then time it."""
    time_case()
