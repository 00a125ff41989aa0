"""The tables that diffusers' schedulers make of their configs: betas, and the timesteps of a sampling loop.

They are made in the arithmetic that diffusers makes them in, fp32 and NumPy's fp64, so that both have the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from soda_kernels._checks import check_choice
from soda_kernels.diffusion.schedule import NoiseSchedule

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "inverted_cosine")
SPACINGS = ("leading", "trailing", "linspace")

# Of "squaredcos_cap_v2", Nichol and Dhariwal 2021, section 3.2.
_OFFSET = 0.008
_MOST_BETA = 0.999


def alpha_bars(
    beta_schedule: str,
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    trained_betas: Sequence[float] | np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the tables (betas, alpha_bar), each fp32 of shape [num_train_timesteps].

    Those of "inverted_cosine" are `NoiseSchedule.inverted_cosine`'s; the others diffusers' own, to the bit.

    Raises:
        ValueError: there is no such schedule, or trained_betas has another length.
    """
    if trained_betas is not None:
        betas = torch.as_tensor(np.asarray(trained_betas), dtype=torch.float32)
        if betas.shape != (num_train_timesteps,):
            raise ValueError(
                f"trained_betas has shape {tuple(betas.shape)}; it must be (num_train_timesteps,), "
                f"which is ({num_train_timesteps},)"
            )
        return betas, (1 - betas).cumprod(0)
    check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
    if beta_schedule == "inverted_cosine":
        exact = NoiseSchedule.inverted_cosine(num_train_timesteps, dtype=torch.float64).alpha_bar
        before = torch.cat((exact.new_ones(1), exact[:-1]))
        return (1 - exact / before).float(), exact.float()
    if beta_schedule == "squaredcos_cap_v2":
        times = [i / num_train_timesteps for i in range(num_train_timesteps + 1)]
        squares = [math.cos((t + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2 for t in times]
        ratios = [1 - after / before for before, after in zip(squares, squares[1:], strict=False)]
        betas = torch.tensor([min(ratio, _MOST_BETA) for ratio in ratios], dtype=torch.float32)
    elif beta_schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32)
    else:
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2
    return betas, (1 - betas).cumprod(0)


def spaced(spacing: str, num_train_timesteps: int, num_steps: int, steps_offset: int) -> np.ndarray:
    """Return the timesteps of a DDIM or DDPM loop, int64 of shape [num_steps], the noisiest first."""
    check_choice("timestep_spacing", spacing, SPACINGS)
    if spacing == "linspace":
        return np.linspace(0, num_train_timesteps - 1, num_steps).round()[::-1].astype(np.int64)
    if spacing == "leading":
        return (np.arange(num_steps) * (num_train_timesteps // num_steps))[::-1].astype(np.int64) + steps_offset
    return np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps)).astype(np.int64) - 1


def spaced_for_multistep(
    spacing: str, num_train_timesteps: int, num_steps: int, steps_offset: int, last: int
) -> np.ndarray:
    """Return the timesteps of a DPM-Solver++ loop: of the first `last`, and without the cleanest."""
    check_choice("timestep_spacing", spacing, SPACINGS)
    if spacing == "linspace":
        return np.linspace(0, last - 1, num_steps + 1).round()[:0:-1].astype(np.int64)
    if spacing == "leading":
        return (np.arange(num_steps + 1) * (last // (num_steps + 1)))[:0:-1].astype(np.int64) + steps_offset
    return np.arange(last, 0, -num_train_timesteps / num_steps).round().astype(np.int64) - 1
