"""Classifier-free guidance over sections of z: guidance by layer falls out of masking."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]


def guided(
    denoise: Callable[..., Tensor], z: Tensor, cond_mask: Tensor, uncond_mask: Tensor, cfg_scale: float
) -> Denoise:
    """Make the function a sampler calls: from (x_t, step index) to the conditional and unconditional predictions.

    Both halves go through the denoiser in one batch; without guidance (cfg_scale 1) the second half is left out.

    Args:
        denoise: (x_t, step_index [N], z, section_mask=) to a prediction, as `Soda.denoise`.
        z: [N, d].
        cond_mask, uncond_mask: [1, m + 1] of 0 and 1: the sections that guide each half.
        cfg_scale: 1 is off.

    Reference:
        Ho and Salimans 2021; Hudson et al. 2023 (layer masking).
    """

    def conditional(x_t: Tensor, step_index: int) -> tuple[Tensor, Tensor | None]:
        return denoise(x_t, _indices(x_t, step_index), z, section_mask=cond_mask), None

    def both(x_t: Tensor, step_index: int) -> tuple[Tensor, Tensor | None]:
        mask = torch.cat((cond_mask.expand(len(z), -1), uncond_mask.expand(len(z), -1)))
        x_t = torch.cat((x_t, x_t))
        cond, uncond = denoise(x_t, _indices(x_t, step_index), torch.cat((z, z)), section_mask=mask).chunk(2)
        return cond, uncond

    return conditional if cfg_scale == 1.0 else both


def _indices(x_t: Tensor, step_index: int) -> Tensor:
    return torch.full((len(x_t),), step_index, dtype=torch.int64, device=x_t.device)
