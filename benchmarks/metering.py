"""Metering in Triton's interpreter: what the families share.

The interpreter takes milliseconds for every tile, so that a case is metered at a few small sizes, from which the whole
follows. Which sizes those are, each family's `metering.py` knows.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tests.harness.interpreter import require_interpreter
from tests.harness.traffic import meter

COUNTS = ("bytes_moved", "bytes_dram")

Counts = list[dict[str, int]]
"""The bytes of each launch of a plan."""


def meter_plan(plan: Any) -> Counts:
    """Run a plan and return the bytes of each of its launches."""
    return [{count: getattr(launch, count) for count in COUNTS} for launch in meter(plan).launches]


def extrapolate(
    metered: Sequence[Counts], terms: Sequence[Sequence[float]], whole: Sequence[float], times: int = 1
) -> Counts:
    """Return the bytes of a whole case, which are sums of the same terms as those of as many smaller sizes.

    Args:
        metered: what each size moved.
        terms: of each size, as many as there are sizes.
        whole: the terms of the whole.
        times: how many times the whole is as large as the terms say.
    """
    counts = np.array([[[launch[count] for count in COUNTS] for launch in launches] for launches in metered])
    factors = np.linalg.solve(np.array(terms, dtype=np.float64), counts.reshape(len(metered), -1))
    found = np.rint(np.array(whole, dtype=np.float64) @ factors).reshape(counts.shape[1:])
    return [{count: times * int(value) for count, value in zip(COUNTS, row, strict=True)} for row in found]


@contextlib.contextmanager
def hurried_interpreter() -> Iterator[None]:
    """Leave out what the interpreter does that metering does not need: half of its time.

    It checks every integer sum for overflow, which the tests of the kernels do too, and patches Triton's language again
    at each call of a device function, though the launch has done so.
    """
    require_interpreter()
    from triton.runtime import interpreter

    builder, function = interpreter.interpreter_builder, interpreter.InterpretedFunction
    options, call = builder.options, function.__call__
    patched: set[int] = set()

    def call_without_patching(self: Any, *args: Any, **kwargs: Any) -> Any:
        namespace = id(self.fn.__globals__)
        if namespace not in patched:
            patched.add(namespace)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    builder.options = dataclasses.replace(options, sanitize_overflow=False)
    function.__call__ = call_without_patching
    try:
        with np.errstate(all="ignore"):  # of values, which do not matter here
            yield
    finally:
        builder.options, function.__call__ = options, call
