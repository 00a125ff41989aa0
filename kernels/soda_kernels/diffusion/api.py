"""The public functions of noise-schedule sampling, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from soda_kernels import _checks
from soda_kernels._autograd import first_derivative_only
from soda_kernels._backend import current_ops
from soda_kernels._philox import STREAMS
from soda_kernels.diffusion import ops as _ops  # noqa: F401  registers the ops
from soda_kernels.diffusion.reference import METHODS, TARGETS
from soda_kernels.diffusion.schedule import NoiseSchedule


def philox_normal(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int],
    step: int | Tensor = 0,
    stream: str = "noise",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw standard normals that depend on (seed, sample id, step, stream, element) alone.

    Philox4x32-10 and Box-Muller; the largest magnitude is 6.7637. Integers are the same on every device, normals the
    same to a few ulp.

    Args:
        shape: shape[0] is the number of samples; the rest is one sample's shape, in logical order.
        seed: an int or 0-d integer tensor, 64 bits of which count.
        sample_ids: [shape[0]] integers, 56 bits of which count.
        step: an int, 0-d or [shape[0]] integer tensor, 32 bits of which count.
        stream: "timestep", "noise", "dropout", "mask", "sampler" or "views": draws that never meet.
        dtype: fp32, bf16, fp16, or fp64 (computed in fp64 from the same integers).
        device: where to draw; the tensor arguments' device if None.

    Returns:
        [*shape], contiguous.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Reference:
        Salmon et al. 2011; Box and Muller 1958.
    """
    return _philox_draw(current_ops().philox_normal, shape, seed, sample_ids, step, stream, dtype, device)


def philox_uniform(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int],
    step: int | Tensor = 0,
    stream: str = "noise",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw uniforms in [0, 1), keyed as in `philox_normal`, 24 bits fine (32 in fp64).

    bf16 and fp16 are refused: rounding would reach 1.

    Args, Returns, Raises, Reference:
        As in `philox_normal`.
    """
    _checks.check_choice("dtype", dtype, (torch.float32, torch.float64))
    return _philox_draw(current_ops().philox_uniform, shape, seed, sample_ids, step, stream, dtype, device)


def add_noise(
    x0: Tensor,
    step_index: Tensor,
    schedule: NoiseSchedule,
    *,
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int],
    step: int | Tensor = 0,
) -> Tensor:
    """Diffuse clean images: x_t = alpha * x0 + sigma * noise, with the noise of stream "noise" of `philox_normal`.

    Args:
        x0: [N, C, *spatial] in fp32, bf16, fp16 or fp64, contiguous or channels_last.
        step_index: [N] integers in [0, num_steps).
        schedule: on x0's device.
        seed, sample_ids, step: the noise's key, as in `philox_normal`.

    Returns:
        x_t, with x0's dtype and layout. Differentiable in x0.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Reference:
        Ho, Jain and Abbeel 2020, equation 4.
    """
    _checks.check_float_tensor("x0", x0, min_ndim=2)
    key = _noise_key(x0, step_index, schedule, seed, sample_ids, step)
    return _AddNoise.apply(x0, key[0], schedule.alpha, schedule.sigma, *key[1:])


def denoising_loss(
    prediction: Tensor,
    x0: Tensor,
    step_index: Tensor,
    schedule: NoiseSchedule,
    *,
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int],
    step: int | Tensor = 0,
    target: str = "eps",
    weights: Tensor | None = None,
) -> Tensor:
    """Score a prediction against the noise that `add_noise` used with the same key, without storing that noise.

        loss = weights[step_index] * mean((prediction - target)^2)
        target: eps: noise        v: alpha * noise - sigma * x0        x0: x0

    Args:
        prediction: [N, C, *spatial] in fp32, bf16, fp16 or fp64.
        x0: the clean images, of the same shape; no gradient flows to them.
        step_index, schedule, seed, sample_ids, step: as in `add_noise`.
        target: what the prediction is: "eps", "v" or "x0".
        weights: [num_steps] table, or None for 1; no gradient flows to it.

    Returns:
        [N] losses in fp32 (fp64 for fp64), the mean over all but the first dimension.

    Raises:
        TypeError, ValueError: an argument is not as above, or x0 or weights require a gradient.

    Reference:
        Ho et al. 2020, equation 14; Salimans and Ho 2022 (v).
    """
    _checks.check_float_tensor("prediction", prediction, min_ndim=2)
    _checks.check_float_tensor("x0", x0)
    _checks.check_shape("x0", x0, tuple(prediction.shape))
    _checks.check_device("x0", x0, "prediction", prediction)
    _check_schedule(schedule, prediction)
    _checks.check_choice("target", target, TARGETS)
    if x0.requires_grad:
        raise ValueError("x0 requires a gradient, which denoising_loss does not give; pass x0.detach()")
    if weights is not None:
        _checks.check_float_tensor("weights", weights)
        if weights.requires_grad:
            raise ValueError("weights requires a gradient, which denoising_loss does not give; pass weights.detach()")
        _checks.check_shape("weights", weights, (schedule.num_steps,))
        _checks.check_device("weights", weights, "prediction", prediction)
    key = _noise_key(prediction, step_index, schedule, seed, sample_ids, step)
    return _DenoisingLoss.apply(
        prediction, x0, key[0], schedule.alpha, schedule.sigma, weights, *key[1:], target
    )  # fmt: skip


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
    previous_x0: Tensor | None = None,
    previous_index: int | Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Step from one noise level to a cleaner one, with classifier-free guidance.

        prediction = uncond + cfg_scale * (cond - uncond)
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
        previous_x0, previous_index: the x0 and step index of the step before, for "dpmpp_2m".
        seed, sample_ids: key of the noise of "ddpm" and of "ddim" with eta > 0: stream "sampler", step step_index.

    Returns:
        (x_next, x0), with x_t's dtype and layout. Not differentiable.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: a gradient through the step is asked for.

    Reference:
        Ho et al. 2020; Song et al. 2021 (DDIM); Lu et al. 2022 (DPM-Solver++); Ho and Salimans 2021 (guidance).
    """
    _checks.check_float_tensor("x_t", x_t, min_ndim=2)
    for name, tensor in (("cond", cond), ("uncond", uncond), ("previous_x0", previous_x0)):
        if tensor is not None or name == "cond":
            _checks.check_like(name, tensor, "x_t", x_t)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_t, cond, uncond, previous_x0)):
        raise RuntimeError("sampler_step is not differentiable; call it under torch.no_grad()")
    _checks.check_choice("method", method, METHODS)
    _checks.check_choice("target", target, TARGETS)
    for name, number in (("cfg_scale", cfg_scale), ("eta", eta), ("clip_x0", clip_x0)):
        if number is not None or name != "clip_x0":
            _checks.check_number(name, number)
    if uncond is None and cfg_scale != 1.0:
        raise ValueError(f"uncond is None with cfg_scale {cfg_scale}; guidance needs it, and without it cfg_scale is 1")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is {eta}; it must be in [0, 1]")
    if eta and method != "ddim":
        raise ValueError(f"eta is {eta} with method {method!r}; only 'ddim' takes it")
    if clip_x0 is not None and not clip_x0 > 0:
        raise ValueError(f"clip_x0 is {clip_x0}; it must be positive, or None for no clipping")
    if (previous_x0 is None) != (previous_index is None):
        raise ValueError("previous_x0 and previous_index go together; give both or neither")
    stochastic = method == "ddpm" or eta > 0.0
    if stochastic and (seed is None or sample_ids is None):
        raise ValueError(f"method {method!r} with eta {eta} draws noise; it needs seed and sample_ids")
    _check_schedule(schedule, x_t)
    _check_indices(step_index, next_index, previous_index, schedule.num_steps)
    device = x_t.device
    return current_ops().sampler_step(
        x_t, cond, uncond, schedule.alpha, schedule.sigma, schedule.logsnr,
        _checks.int64_scalar("step_index", step_index, device), _checks.int64_scalar("next_index", next_index, device),
        method, target, cfg_scale, eta, clip_x0, previous_x0,
        None if previous_index is None else _checks.int64_scalar("previous_index", previous_index, device),
        _checks.int64_scalar("seed", seed, device) if stochastic and seed is not None else None,
        _checks.int64_vector("sample_ids", sample_ids, x_t.shape[0], device) if stochastic and sample_ids is not None
        else None,
    )  # fmt: skip


def _philox_draw(
    op: Any, shape: Sequence[int], seed: int | Tensor, sample_ids: Tensor | Sequence[int], step: int | Tensor,
    stream: str, dtype: torch.dtype, device: torch.device | str | None,
) -> Tensor:  # fmt: skip
    _checks.check_choice("stream", stream, list(STREAMS))
    _checks.check_choice("dtype", dtype, _checks.FLOAT_DTYPES)
    if not isinstance(shape, tuple | list):
        raise TypeError(f"shape is a {type(shape).__name__}; it must be a sequence of ints")
    shape = tuple(shape)
    if not shape or min(shape) < 0:
        raise ValueError(f"shape is {shape}; it must be the number of samples, then one sample's shape")
    if device is None:
        device = next((t.device for t in (sample_ids, seed, step) if isinstance(t, Tensor)), torch.device("cpu"))
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
    ids = _checks.int64_vector("sample_ids", sample_ids, shape[0], device)
    num = 1
    for extent in shape[1:]:
        num *= extent
    if num >= 2**34:
        raise ValueError(f"shape is {shape}; one sample must have fewer than 2^34 elements")
    seed = _checks.int64_scalar("seed", seed, device)
    step = _checks.int64_scalar_or_vector("step", step, shape[0], device)
    return op(seed, ids, step, num, STREAMS[stream], dtype).view(shape)


def _noise_key(
    x: Tensor, step_index: Tensor, schedule: NoiseSchedule, seed: int | Tensor, sample_ids: Tensor | Sequence[int],
    step: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Check and widen (step_index, seed, sample_ids, step) for images x."""
    _check_schedule(schedule, x)
    if not isinstance(step_index, Tensor):
        raise TypeError(f"step_index is a {type(step_index).__name__}; it must be an (N,) integer tensor")
    return (
        _checks.int64_vector("step_index", step_index, x.shape[0], x.device),
        _checks.int64_scalar("seed", seed, x.device),
        _checks.int64_vector("sample_ids", sample_ids, x.shape[0], x.device),
        _checks.int64_scalar_or_vector("step", step, x.shape[0], x.device),
    )


def _check_schedule(schedule: NoiseSchedule, x: Tensor) -> None:
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule is a {type(schedule).__name__}; it must be a NoiseSchedule")
    if schedule.device != x.device:
        raise ValueError(f"schedule is on {schedule.device} and the images on {x.device}; call schedule.to(device)")


def _check_indices(step_index: Any, next_index: Any, previous_index: Any, num_steps: int) -> None:
    """Check the indices that are Python ints; those in tensors are the caller's to keep in range."""
    for name, index, lowest in (
        ("step_index", step_index, 0), ("next_index", next_index, -1), ("previous_index", previous_index, 0)
    ):  # fmt: skip
        if isinstance(index, int) and not isinstance(index, bool) and not lowest <= index < num_steps:
            raise ValueError(f"{name} is {index}; it must be in [{lowest}, {num_steps - 1}]")
    if isinstance(step_index, int) and isinstance(next_index, int) and next_index >= step_index:
        raise ValueError(f"next_index is {next_index} and step_index {step_index}; a step goes to a smaller index")
    if isinstance(step_index, int) and isinstance(previous_index, int) and previous_index <= step_index:
        raise ValueError(f"previous_index is {previous_index} and step_index {step_index}; it must be the larger")


class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x0: Tensor, step_index: Tensor, alpha: Tensor, sigma: Tensor, *key: Tensor) -> Tensor:
        ctx.ops = current_ops()
        ctx.save_for_backward(step_index, alpha)
        return ctx.ops.add_noise(x0, step_index, alpha, sigma, *key)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dx_t: Tensor) -> tuple[Any, ...]:
        return ctx.ops.add_noise_backward(dx_t, *ctx.saved_tensors), None, None, None, None, None, None


class _DenoisingLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, prediction: Tensor, x0: Tensor, step_index: Tensor, alpha: Tensor, sigma: Tensor,
        weights: Tensor | None, seed: Tensor, sample_ids: Tensor, step: Tensor, target: str,
    ) -> Tensor:  # fmt: skip
        ctx.ops, ctx.target = current_ops(), target
        ctx.save_for_backward(prediction, x0, step_index, alpha, sigma, weights, seed, sample_ids, step)
        return ctx.ops.denoising_loss(
            prediction, x0, step_index, alpha, sigma, weights, seed, sample_ids, step, target
        )

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        dprediction = ctx.ops.denoising_loss_backward(dloss, *ctx.saved_tensors, ctx.target)
        return dprediction, None, None, None, None, None, None, None, None, None
