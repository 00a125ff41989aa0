"""The public sampler step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from soda_kernels import _checks
from soda_kernels._backend import current_ops
from soda_kernels._native import in_words
from soda_kernels.diffusion import ops as _ops  # noqa: F401  registers the ops
from soda_kernels.diffusion.checks import check_indices, check_schedule
from soda_kernels.diffusion.reference import METHODS, TARGETS
from soda_kernels.diffusion.schedule import NoiseSchedule

_LARGEST = torch.finfo(torch.float32).max


def sampler_step(
    x_t: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    schedule: NoiseSchedule,
    step_index: int | Tensor,
    next_index: int | Tensor,
    *,
    method: str = "ddim",
    target: str = "eps",
    cfg_scale: float = 1.0,
    eta: float = 0.0,
    clip_x0: float | None = None,
    guidance_rescale: float = 0.0,
    previous_x0: Tensor | None = None,
    previous_index: int | Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Step from one noise level to a cleaner one, with classifier-free guidance.

        guided = uncond + cfg_scale * (cond - uncond)
        prediction = guidance_rescale * guided * std(cond) / std(guided) + (1 - guidance_rescale) * guided
        x0 = what the prediction says of the clean image, clipped; the noise direction is recomputed from it

    Args:
        x_t: [N, C, *spatial] at step_index.
        cond, uncond: the denoiser's outputs, like x_t; uncond None means no guidance.
        schedule: on x_t's device.
        step_index, next_index: ints or 0-d integer tensors; next_index -1 is the clean end (alpha_bar = 1).
        method: "ddpm" draws with the posterior variance; "ddim" with eta, 0 being deterministic; "dpmpp_2m" is
            deterministic and second-order given previous_x0, first-order without it and on the step to the clean end.
        target: what the outputs are: "eps", "v" or "x0".
        cfg_scale: 1 is off, and all that uncond None allows.
        clip_x0: clamp x0 to [-clip_x0, clip_x0].
        guidance_rescale: in [0, 1], how far guided outputs are brought back to the standard deviation of cond, each
            sample over all its elements; one whose guided output does not vary is left as it is.
        previous_x0, previous_index: the x0 and step index of the step before, for "dpmpp_2m".
        seed, sample_ids: key of the noise of "ddpm" and of "ddim" with eta > 0: stream "sampler", step step_index.

    Returns:
        (x_next, x0), with x_t's dtype and layout. Not differentiable.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: a gradient through the step is asked for.

    Reference:
        Ho et al. 2020; Song et al. 2021 (DDIM); Lu et al. 2022 (DPM-Solver++); Ho and Salimans 2021 (guidance);
        Lin et al. 2024, section 3.4 (rescaling).
    """
    _checks.check_float_tensor("x_t", x_t, min_ndim=2)
    for name, tensor in (("cond", cond), ("uncond", uncond), ("previous_x0", previous_x0)):
        if tensor is not None or name == "cond":
            _checks.check_like(name, tensor, "x_t", x_t)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_t, cond, uncond, previous_x0)):
        raise RuntimeError("sampler_step is not differentiable; call it under torch.no_grad()")
    _checks.check_choice("method", method, METHODS)
    _checks.check_choice("target", target, TARGETS)
    for name, number in (
        ("cfg_scale", cfg_scale), ("eta", eta), ("clip_x0", clip_x0), ("guidance_rescale", guidance_rescale)
    ):  # fmt: skip
        if number is not None or name != "clip_x0":
            _checks.check_number(name, number)
    if uncond is None and cfg_scale != 1.0:
        raise ValueError(f"uncond is None with cfg_scale {cfg_scale}; guidance needs it, and without it cfg_scale is 1")
    if not 0.0 <= guidance_rescale <= 1.0:
        raise ValueError(f"guidance_rescale is {guidance_rescale}; it must be in [0, 1]")
    if uncond is None and guidance_rescale:
        raise ValueError(f"uncond is None with guidance_rescale {guidance_rescale}; only guided outputs are rescaled")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is {eta}; it must be in [0, 1]")
    if eta and method != "ddim":
        raise ValueError(f"eta is {eta} with method {method!r}; only 'ddim' takes it")
    if clip_x0 is not None and not 0 < clip_x0 <= _LARGEST:
        raise ValueError(f"clip_x0 is {clip_x0}; it must be positive and within fp32, or None for no clipping")
    if not -_LARGEST <= cfg_scale <= _LARGEST:
        raise ValueError(f"cfg_scale is {cfg_scale}; it must be within fp32")
    if (previous_x0 is None) != (previous_index is None):
        raise ValueError("previous_x0 and previous_index go together; give both or neither")
    stochastic = method == "ddpm" or eta > 0.0
    if stochastic and (seed is None or sample_ids is None):
        raise ValueError(f"method {method!r} with eta {eta} draws noise; it needs seed and sample_ids")
    check_schedule(schedule, x_t)
    check_indices(step_index, next_index, previous_index, schedule.num_steps)
    device = x_t.device
    arguments = (
        x_t, cond, uncond, schedule.alpha, schedule.sigma, schedule.logsnr,
        _checks.int64_scalar("step_index", step_index, device), _checks.int64_scalar("next_index", next_index, device),
        method, target, cfg_scale, eta, clip_x0, guidance_rescale, previous_x0,
        None if previous_index is None else _checks.int64_scalar("previous_index", previous_index, device),
        _checks.int64_scalar("seed", seed, device) if stochastic and seed is not None else None,
        _checks.int64_vector("sample_ids", sample_ids, x_t.shape[0], device) if stochastic and sample_ids is not None
        else None,
    )  # fmt: skip
    try:
        return current_ops().sampler_step.default(*arguments)
    except RuntimeError as refusal:
        raise in_words(refusal, "sampler_step", *arguments) from None
