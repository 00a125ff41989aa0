"""Classifier-free guidance over sections of z: guidance by layer falls out of masking."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# From (x_t, step index, a 0-d int64 tensor).
Denoise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


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
    if cfg_scale == 1.0:

        def conditional(x_t: Tensor, step_index: Tensor) -> tuple[Tensor, Tensor | None]:
            return denoise(x_t, step_index.expand(len(x_t)), z, section_mask=cond_mask), None

        return conditional

    mask = torch.cat((cond_mask.expand(len(z), -1), uncond_mask.expand(len(z), -1)))
    twice_z = torch.cat((z, z))

    def both(x_t: Tensor, step_index: Tensor) -> tuple[Tensor, Tensor | None]:
        prediction = denoise(torch.cat((x_t, x_t)), step_index.expand(2 * len(x_t)), twice_z, section_mask=mask)
        cond, uncond = prediction.chunk(2)
        return cond, uncond

    return both
