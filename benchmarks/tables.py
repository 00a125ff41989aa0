"""Tables for a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from soda_engine.tables import table

__all__ = ["end_progress", "geometric_mean", "show_progress", "table"]


def geometric_mean(values: Sequence[float]) -> float:
    """Return the mean of ratios."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def show_progress(text: str) -> None:
    """Say on stderr what is being done: over the last such line on a terminal, on a line of its own elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def end_progress() -> None:
    """Remove the last line of progress from a terminal."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
