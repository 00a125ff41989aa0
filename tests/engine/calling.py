"""What a call of the command line takes and returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Result(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Result]
QUICK = ["--num-steps", "2"]
"""Arguments of what draws samples, so that it does not take long."""
