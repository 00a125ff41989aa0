"""Attention under pytest-benchmark: `pytest benchmarks/bench_attention.py`."""

from __future__ import annotations

from collections.abc import Callable

SUITE = "attention"


def test_attention(time_case: Callable[[], None]) -> None:
    """Check a provider on a case, then time it."""
    time_case()
