"""The gate before every timing: a provider that computes something else has no speed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.steps import Step
from soda_kernels._native import poisoned_results

MOST_TIMES_TORCH = 2.0
"""An error may be this many times that of PyTorch's own chain in the same dtype."""
ULP = torch.finfo(torch.float32).eps
"""What an error may have on top, in every dtype: sums are in fp32, and a few of PyTorch's may happen to be exact."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What comparing a provider's results with exact ones found."""

    rel_l2: float
    """The largest |result - exact| / |exact| of the results, in norm."""
    ratio_to_torch: float
    """The largest ratio of such an error to that of PyTorch's own chain in the same dtype."""
    worst: str
    """The result that has it."""
    bitwise_rerun: bool
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a row of results."""
        return {
            "rel_l2": self.rel_l2, "ratio_to_torch": self.ratio_to_torch, "worst": self.worst,
            "pass": not self.problems, "bitwise_rerun": self.bitwise_rerun,
        }  # fmt: skip


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Return |result - exact| / |exact| in fp64; NaN where a value is."""
    norm = float(exact.double().norm())
    error = float((result.double() - exact.double()).norm())
    return error / norm if norm else error


def check_step(
    step: Step, names: Sequence[str], torch_results: Sequence[Tensor], exact: Sequence[Tensor], *,
    most_times_torch: float = MOST_TIMES_TORCH, poison: bool = True,
) -> Check:  # fmt: skip
    """Run a step twice and compare what it returns.

    Args:
        names: of its results.
        torch_results: those of PyTorch's own chain in the same dtype.
        exact: those of the chain in fp64.
        most_times_torch: how many times PyTorch's error each may have.
        poison: fill what the step allocates with NaN first, so that what it leaves unwritten shows.
    """
    with _poisoned() if poison else contextlib.nullcontext():
        first = [result.detach().clone() for result in step()]
        second = [result.detach() for result in step()]
    rerun = all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, second, strict=True))
    problems, errors, ratios = [], {}, {}
    for name, result, own, want in zip(names, first, torch_results, exact, strict=True):
        if result.shape != want.shape or result.dtype != own.dtype:
            problems.append(f"{name} is {tuple(result.shape)} {result.dtype}, not {tuple(want.shape)} {own.dtype}")
            continue
        errors[name] = relative_error(result, want)
        if not math.isfinite(errors[name]):
            problems.append(f"{name} has values that are not finite, or was not written")
            continue
        own_error = relative_error(own, want)
        ratios[name] = errors[name] / own_error if own_error else (math.inf if errors[name] else 1.0)
        if errors[name] > most_times_torch * own_error + ULP:
            problems.append(f"the error of {name} is {ratios[name]:.3g} times that of PyTorch's own")
    worst = max(ratios, key=lambda name: ratios[name], default=names[0])
    return Check(
        rel_l2=max(errors.values(), default=math.nan), ratio_to_torch=ratios.get(worst, math.nan), worst=worst,
        bitwise_rerun=rerun, problems=tuple(problems),
    )  # fmt: skip


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, in which a NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Let allocations hold NaN: PyTorch's do so among its deterministic algorithms, the native library's when asked."""
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with poisoned_results():
            yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=was_warning)
