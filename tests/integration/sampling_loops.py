"""Whole sampling loops with a fixed denoiser, by a scheduler of ours, by diffusers' own, and by its own in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from soda_kernels import NoiseSchedule
from soda_kernels.integrations.diffusers.timesteps import alpha_bars

DIFFUSERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
TABLES = {
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "inverted_cosine": {"trained_betas": alpha_bars("inverted_cosine", 1000, 0.0, 0.0)[0].tolist()},
}
SHAPE = (2, 3, 6, 5)
MEAN, STDDEV = 0.4, 0.5

Noise = Callable[[int], Tensor]
"""A step's noise, of its timestep."""


class Denoiser:
    """The perfect predictor for data from N(MEAN, STDDEV²) with a wave on top, in fp64, rounded to its input's dtype.

    It is the same function for every loop, so that loops differ in their steps' rounding alone.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str) -> None:
        self.schedule = NoiseSchedule.from_alpha_bar(alphas_cumprod, dtype=torch.float64)
        self.prediction_type = prediction_type

    def __call__(self, x_t: Tensor, timestep: int) -> Tensor:
        alpha, sigma, wide = self.schedule.alpha[timestep], self.schedule.sigma[timestep], x_t.double()
        x0 = MEAN + alpha * STDDEV**2 / (alpha**2 * STDDEV**2 + sigma**2) * (wide - alpha * MEAN)
        noise = (wide - alpha * x0) / sigma + 0.1 * (wide + wide.flip(-1)).sin()
        x0 = (wide - sigma * noise) / alpha
        outputs = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}
        return outputs[self.prediction_type].to(x_t.dtype)


def run(scheduler: Any, denoiser: Denoiser, x_t: Tensor, **options: Any) -> Tensor:
    """Take the steps of a scheduler whose timesteps are set."""
    for timestep in scheduler.timesteps:
        x_t = scheduler.step(denoiser(x_t, int(timestep)), timestep, x_t, return_dict=False, **options)[0]
    return x_t


def run_diffusers(scheduler: Any, denoiser: Denoiser, x_t: Tensor, noise: Noise | None, **options: Any) -> Tensor:
    """Take the steps of diffusers' own, with the noise given."""
    for timestep in scheduler.timesteps:
        output = denoiser(x_t, int(timestep))
        drawn = None if noise is None else noise(int(timestep)).to(x_t.dtype)
        if drawn is None or isinstance(scheduler, DDPMScheduler):
            with _drawing(drawn):
                x_t = scheduler.step(output, timestep, x_t, return_dict=False, **options)[0]
        else:
            x_t = scheduler.step(output, timestep, x_t, return_dict=False, variance_noise=drawn, **options)[0]
    return x_t


def run_exactly(scheduler: Any, denoiser: Denoiser, x_t: Tensor, noise: Noise | None, **options: Any) -> Tensor:
    """Take the steps of diffusers' own in fp64, from the same fp32 alpha_bar."""
    x_t = x_t.double()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if not isinstance(scheduler, DPMSolverMultistepScheduler):
        if isinstance(scheduler, DDIMScheduler):
            scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
        return run_diffusers(scheduler, denoiser, x_t, noise, **options)
    # Its step goes through fp32, its updates do not.
    alpha_bar = scheduler.alphas_cumprod
    ends = {"zero": alpha_bar.new_ones(1), "sigma_min": alpha_bar[:1]}[scheduler.config.final_sigmas_type]
    levels = torch.cat((alpha_bar[scheduler.timesteps], ends))
    scheduler.sigmas = ((1 - levels) / levels).sqrt()
    few = scheduler.config.lower_order_final and len(scheduler.timesteps) < 15
    first_order_end = few or scheduler.config.euler_at_final or scheduler.config.final_sigmas_type == "zero"
    before: Tensor | None = None
    for place, timestep in enumerate(scheduler.timesteps):
        scheduler._step_index = place
        x0 = scheduler.convert_model_output(denoiser(x_t, int(timestep)), sample=x_t)
        if before is None or scheduler.config.solver_order == 1 or (place == len(levels) - 2 and first_order_end):
            x_t = scheduler.dpm_solver_first_order_update(x0, sample=x_t)
        else:
            x_t = scheduler.multistep_dpm_solver_second_order_update([before, x0], sample=x_t)
        before = x0
    return x_t


@contextmanager
def _drawing(noise: Tensor | None) -> Iterator[None]:
    """Let DDPMScheduler, which takes no noise, draw this one."""
    with patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise):
        yield
