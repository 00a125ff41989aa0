"""Classifier-free guidance over sections of z: guidance by layer falls out of masking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# From (x_t, step index, a 0-d int64 tensor).
Denoise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


class DenoiserOfZ(Protocol):
    """Makes the denoiser that one z guides, from x_t and a step index to a prediction."""

    def __call__(self, z: Tensor, *, section_mask: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """Take z, [N, d], and the mask of its sections."""


def guided(
    denoiser_of_z: DenoiserOfZ, z: Tensor, cond_mask: Tensor, uncond_mask: Tensor, cfg_scale: float
) -> Denoise:
    """Make the function a sampler calls: from (x_t, step index) to the conditional and unconditional predictions.

    Both halves go through the denoiser in one batch; without guidance (cfg_scale 1) the second half is left out.

    Args:
        denoiser_of_z: of `Soda.denoiser_for`, with the number of the sampler's steps.
        z: [N, d].
        cond_mask, uncond_mask: [1, m + 1] of 0 and 1: the sections that guide each half.
        cfg_scale: 1 is off.

    Reference:
        Ho and Salimans 2021; Hudson et al. 2023 (layer masking).
    """
    if cfg_scale == 1.0:
        denoise = denoiser_of_z(z, section_mask=cond_mask)
        return lambda x_t, step_index: (denoise(x_t, step_index), None)

    mask = torch.cat((cond_mask.expand(len(z), -1), uncond_mask.expand(len(z), -1)))
    denoise_twice = denoiser_of_z(torch.cat((z, z)), section_mask=mask)

    def both(x_t: Tensor, step_index: Tensor) -> tuple[Tensor, Tensor | None]:
        cond, uncond = denoise_twice(torch.cat((x_t, x_t)), step_index).chunk(2)
        return cond, uncond

    return both
