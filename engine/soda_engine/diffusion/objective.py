"""The training objective: a denoising loss whose every random draw is a function of (seed, sample id, step)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from soda_engine.models.modulation import draw_section_mask
from soda_kernels import NoiseSchedule, add_noise, denoising_loss, span

if TYPE_CHECKING:
    from soda_engine.models.soda import Soda

SCHEDULES: dict[str, Callable[[int], NoiseSchedule]] = {
    "inverted_cosine": NoiseSchedule.inverted_cosine,
    "cosine": NoiseSchedule.cosine,
    "linear": NoiseSchedule.linear,
}

_MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, section 4.1

# Odd multipliers that spread (seed, sample id, step) over the 64 bits of a dropout key: SplitMix64's published
# constants (Steele, Lea and Flood 2014; Stafford's mix 13), as signed integers.
_KEY_FACTORS = tuple(f - 2**64 for f in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def denoising_losses(
    model: Soda,
    source: Tensor,
    target_view: Tensor,
    *,
    seed: int | Tensor,
    sample_ids: Tensor,
    step: int | Tensor,
) -> Tensor:
    """Encode the source view, mask sections of z, and score the denoiser on the noised target view.

    The step index, the noise, the mask and the dropout of a sample depend on (seed, sample id, step) alone: neither on
    the batch it is in nor on the process that holds it.

    Args:
        source: [N, C, S, S] floats. target_view: [N, C', S', S'] floats in [-1, 1].
        seed: an int or 0-d int64 tensor. sample_ids: [N] int64. step: the training step, an int or 0-d int64 tensor.

    Returns:
        [N] losses in fp32.

    Reference:
        Hudson et al. 2023; the loss is equation 14 of Ho et al. 2020.
    """
    latent, diffusion = model.config.latent, model.config.diffusion
    key: dict[str, Any] = {"seed": seed, "sample_ids": sample_ids, "step": step}
    with span("encode"):
        z = model.encoder(source)
    x_t, step_index = add_noise(target_view, None, model.schedule, **key)
    mask = draw_section_mask(model.num_sections, latent.drop_all, latent.drop_section, **key)
    with span("denoise"):
        prediction = model.denoise(x_t, step_index, z, section_mask=mask, dropout_seed=dropout_keys(**key))
    with span("loss"):
        return denoising_loss(
            prediction, target_view, step_index, model.schedule, target=diffusion.target, weights=model.loss_weights,
            **key,
        )  # fmt: skip


def dropout_keys(*, seed: int | Tensor, sample_ids: Tensor, step: int | Tensor) -> Tensor:
    """Mix (seed, sample id, step) into [N] int64 keys, one a sample; the products wrap modulo 2^64."""
    keys = torch.zeros_like(sample_ids)
    for value, factor in zip((seed, sample_ids, step), _KEY_FACTORS, strict=True):
        # A product of Python ints does not wrap by itself: bring it into the range of an int64.
        keys = keys + (value * factor if isinstance(value, Tensor) else (value * factor + 2**63) % 2**64 - 2**63)
    return keys


def loss_weights(schedule: NoiseSchedule, name: str, target: str) -> Tensor | None:
    """Return the [num_steps] table of loss weights, or None where all are 1.

    min_snr weighs the x0 error by min(snr, 5), which for the loss in terms of the target means a factor of 1 (x0),
    1 / snr (eps) or 1 / (snr + 1) (v) on top.

    Reference:
        Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy".
    """
    if name == "uniform":
        return None
    snr = schedule.logsnr.double().exp()
    per_error = {"x0": torch.ones_like(snr), "eps": 1 / snr, "v": 1 / (snr + 1)}[target]
    return (snr.clamp(max=_MIN_SNR_GAMMA) * per_error).float()
