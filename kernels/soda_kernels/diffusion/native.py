"""What the native library calls for noise-schedule sampling that it has no kernels for: the reference, as it is."""

from __future__ import annotations

from soda_kernels._native import Fallback
from soda_kernels.diffusion import ops  # noqa: F401  registers the reference

FALLBACKS = tuple(
    Fallback(name)
    for name in (
        "philox_normal", "philox_uniform", "draw_step_index", "add_noise", "add_noise_backward", "denoising_loss",
        "denoising_loss_backward", "scale_samples", "sampler_step",
    )
)  # fmt: skip
