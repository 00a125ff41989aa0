"""Training steps, sampling and encoding under pytest-benchmark: `pytest benchmarks/bench_e2e.py`."""

from __future__ import annotations

from collections.abc import Callable

SUITE = "e2e"


def test_e2e(time_case: Callable[[], None]) -> None:
    """Check a provider on a case, then time it."""
    time_case()
