"""What the arguments of noise-schedule sampling must be, in lines that name the one that is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from soda_kernels import _checks
from soda_kernels.diffusion.reference import SAMPLINGS
from soda_kernels.diffusion.schedule import NoiseSchedule

# Of (stratum << 24) * num_steps, which is formed in int64.
_MOST_STRATA_TIMES_STEPS = 2**39
# Of a 32-bit word times the number of strata, the same.
_MOST_STRATA = 2**31


def check_schedule(schedule: NoiseSchedule, x: Tensor) -> None:
    """Require a schedule on the device of the images x."""
    check_schedule_type(schedule)
    if schedule.device != x.device:
        raise ValueError(f"schedule is on {schedule.device} and the images on {x.device}; call schedule.to(device)")


def check_schedule_type(schedule: object) -> None:
    """Require a schedule."""
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule is a {type(schedule).__name__}; it must be a NoiseSchedule")


def check_step_index(step_index: object, batch: int, x: Tensor) -> Tensor:
    """Require one step index for each of the images x, and widen it."""
    if not isinstance(step_index, Tensor):
        raise TypeError(f"step_index is a {type(step_index).__name__}; it must be an (N,) integer tensor")
    return _checks.int64_vector("step_index", step_index, batch, x.device)


def check_key(
    x: Tensor, seed: int | Tensor, sample_ids: Tensor | Sequence[int], step: int | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Check and widen (seed, sample_ids, step) for images x."""
    seed, step = check_seed_and_step(seed, step, x.shape[0], x.device)
    return seed, _checks.int64_vector("sample_ids", sample_ids, x.shape[0], x.device), step


def check_seed_and_step(
    seed: int | Tensor, step: int | Tensor, batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Check and widen a seed and a step, or the step of each sample.

    On a GPU ints lie side by side: a program reads both in one sector.
    """
    places: tuple[Tensor | None, ...] = (None, None)
    if device.type != "cpu" and not isinstance(seed, Tensor) and not isinstance(step, Tensor):
        places = torch.empty(2, dtype=torch.int64, device=device).unbind()
    return (
        _checks.int64_scalar("seed", seed, device, places[0]),
        _checks.int64_scalar_or_vector("step", step, batch, device, places[1]),
    )


def check_sampling(
    sampling: str, strata: tuple[int, int] | None, batch: int, num_steps: int, step: Tensor
) -> tuple[int, int]:
    """Check how step indices are to be drawn, and return the first stratum of the samples and the number of strata."""
    _checks.check_choice("sampling", sampling, SAMPLINGS)
    if sampling != "stratified":
        if strata is not None:
            raise ValueError(f"strata is {strata} with sampling {sampling!r}; only 'stratified' takes it")
        return 0, 1
    if step.ndim:
        raise ValueError(f"step has shape {tuple(step.shape)}; 'stratified' takes an int or a 0-d tensor")
    first, total = 0, batch
    if strata is not None:
        pair = [_checks.plain_integer(number) for number in strata] if isinstance(strata, tuple | list) else []
        if len(pair) != 2 or not all(isinstance(number, int) and not isinstance(number, bool) for number in pair):
            raise TypeError(f"strata is {strata!r}; it must be a pair of ints (first, total)")
        first, total = pair
    if first < 0 or first + batch > total:
        raise ValueError(f"strata is {(first, total)} for {batch} samples; 0 <= first <= total - {batch} holds")
    if total >= _MOST_STRATA or total * num_steps >= _MOST_STRATA_TIMES_STEPS:
        raise ValueError(
            f"strata is {(first, total)} with {num_steps} steps; total < 2^31 and total * num_steps < 2^39 holds"
        )
    return first, total


def check_indices(step_index: Any, next_index: Any, previous_index: Any, num_steps: int) -> None:
    """Check the indices that are ints, NumPy's too; those in tensors are the caller's to keep in range."""
    step_index, next_index, previous_index = map(_checks.plain_integer, (step_index, next_index, previous_index))
    for name, index, lowest in (
        ("step_index", step_index, 0), ("next_index", next_index, -1), ("previous_index", previous_index, 0)
    ):  # fmt: skip
        if isinstance(index, int) and not isinstance(index, bool) and not lowest <= index < num_steps:
            raise ValueError(f"{name} is {index}; it must be in [{lowest}, {num_steps - 1}]")
    if isinstance(step_index, int) and isinstance(next_index, int) and next_index >= step_index:
        raise ValueError(f"next_index is {next_index} and step_index {step_index}; a step goes to a smaller index")
    if isinstance(step_index, int) and isinstance(previous_index, int) and previous_index <= step_index:
        raise ValueError(f"previous_index is {previous_index} and step_index {step_index}; it must be the larger")
