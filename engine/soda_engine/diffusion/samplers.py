"""The sampling loop: a function that takes a denoise callable and knows nothing of models."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from soda_engine.diffusion.guidance import Denoise
from soda_kernels import NoiseSchedule, sampler_step


@torch.no_grad()
def sample(
    denoise: Denoise,
    x_T: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 100,
    method: str = "ddim",
    target: str = "eps",
    cfg_scale: float = 1.0,
    eta: float = 0.0,
    clip_x0: float | None = 1.0,
    seed: int | Tensor = 0,
    sample_ids: Tensor,
    progress: bool = False,
) -> Tensor:
    """Denoise from x_T to clean images.

    Args:
        denoise: from (x_t, step index) to (conditional prediction, unconditional prediction or None).
        x_T: [N, C, *spatial], noise at the last step of the schedule.
        num_steps: denoiser calls, at most the schedule's length.
        The rest: as in `soda_kernels.sampler_step`.

    Returns:
        Images like x_T.

    Raises:
        ValueError: num_steps is not between 1 and the schedule's length, or an argument is not accepted.
    """
    indices = step_indices(schedule.num_steps, num_steps)
    x, previous_x0, previous_index = x_T, None, None
    for index, next_index in tqdm(
        zip(indices, [*indices[1:], -1], strict=True), total=num_steps, desc="sampling", disable=not progress
    ):
        cond, uncond = denoise(x, index)
        x, x0 = sampler_step(
            x, cond.to(x.dtype), None if uncond is None else uncond.to(x.dtype), schedule, index, next_index,
            method=method, target=target, cfg_scale=cfg_scale, eta=eta, clip_x0=clip_x0,
            previous_x0=previous_x0, previous_index=previous_index, seed=seed, sample_ids=sample_ids,
        )  # fmt: skip
        if method == "dpmpp_2m":
            previous_x0, previous_index = x0, index
    return x


def step_indices(schedule_steps: int, num_steps: int) -> list[int]:
    """Spread num_steps indices evenly from the schedule's last step down to its first.

    Raises:
        ValueError: num_steps is not between 1 and schedule_steps.
    """
    if not 1 <= num_steps <= schedule_steps:
        raise ValueError(f"num_steps is {num_steps}; it must be between 1 and the schedule's {schedule_steps}")
    if num_steps == 1:
        return [schedule_steps - 1]
    return [round((schedule_steps - 1) * (1 - i / (num_steps - 1))) for i in range(num_steps)]
