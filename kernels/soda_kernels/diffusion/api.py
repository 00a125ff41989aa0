"""The public functions of noising and of the denoising loss, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from soda_kernels import _checks
from soda_kernels._autograd import first_derivative_only, is_differentiated
from soda_kernels._backend import current_ops
from soda_kernels._native import in_words
from soda_kernels.diffusion import ops as _ops  # noqa: F401  registers the ops
from soda_kernels.diffusion.checks import check_key, check_sampling, check_schedule, check_step_index
from soda_kernels.diffusion.reference import TARGETS
from soda_kernels.diffusion.schedule import NoiseSchedule


@overload
def add_noise(
    x0: Tensor, step_index: Tensor, schedule: NoiseSchedule, *, seed: int | Tensor, sample_ids: Tensor | Sequence[int],
    step: int | Tensor = 0, sampling: str = "uniform", strata: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def add_noise(
    x0: Tensor, step_index: None, schedule: NoiseSchedule, *, seed: int | Tensor, sample_ids: Tensor | Sequence[int],
    step: int | Tensor = 0, sampling: str = "uniform", strata: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def add_noise(
    x0: Tensor,
    step_index: Tensor | None,
    schedule: NoiseSchedule,
    *,
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int],
    step: int | Tensor = 0,
    sampling: str = "uniform",
    strata: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Diffuse clean images: x_t = alpha * x0 + sigma * noise, with the noise of stream "noise" of `philox_normal`.

    Args:
        x0: [N, C, *spatial] in fp32, bf16, fp16 or fp64, or in uint8 for x0 / 127.5 - 1; contiguous or channels_last.
        step_index: [N] integers in [0, num_steps); or None, to draw them in the same pass as `draw_step_index` would.
        schedule: on x0's device.
        seed, sample_ids, step: the noise's key, as in `philox_normal`.
        sampling, strata: of the step indices that are drawn, as in `draw_step_index`.
        dtype: of x_t, to which it is rounded at the end; x0's if None, fp32 for uint8.

    Returns:
        x_t, in x0's layout; without a step_index (x_t, step_index). x_t is differentiable in x0.

    Raises:
        TypeError, ValueError: an argument is not as above, or sampling or strata came with a step_index.

    Reference:
        Ho, Jain and Abbeel 2020, equation 4.
    """
    _checks.check_float_tensor("x0", x0, min_ndim=2, or_uint8=True)
    check_schedule(schedule, x0)
    if dtype is None:
        dtype = torch.float32 if x0.dtype == torch.uint8 else x0.dtype
    _checks.check_choice("dtype", dtype, _checks.FLOAT_DTYPES)
    index, first, total = None, 0, 1
    if step_index is not None:
        index = check_step_index(step_index, x0.shape[0], x0)
        if sampling != "uniform" or strata is not None:
            raise ValueError(
                f"sampling is {sampling!r} and strata {strata} with a step_index; they are for step_index None"
            )
    key = check_key(x0, seed, sample_ids, step)
    if index is None:
        first, total = check_sampling(sampling, strata, x0.shape[0], schedule.num_steps, key[2])
    arguments = (x0, index, schedule.alpha, schedule.sigma, *key, sampling, first, total, dtype)
    add = _AddNoise.apply if is_differentiated(x0) else current_ops().add_noise.default
    try:
        x_t, drawn = add(*arguments)
    except RuntimeError as refusal:
        raise in_words(refusal, "add_noise", *arguments) from None
    return (x_t, drawn) if index is None else x_t


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
        x0: the clean images, of the same shape, or bytes, as in `add_noise`; no gradient flows to them.
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
    _checks.check_float_tensor("x0", x0, or_uint8=True)
    _checks.check_shape("x0", x0, tuple(prediction.shape))
    _checks.check_device("x0", x0, "prediction", prediction)
    check_schedule(schedule, prediction)
    _checks.check_choice("target", target, TARGETS)
    if x0.requires_grad:
        raise ValueError("x0 requires a gradient, which denoising_loss does not give; pass x0.detach()")
    if weights is not None:
        _checks.check_float_tensor("weights", weights)
        if weights.requires_grad:
            raise ValueError("weights requires a gradient, which denoising_loss does not give; pass weights.detach()")
        _checks.check_shape("weights", weights, (schedule.num_steps,))
        _checks.check_device("weights", weights, "prediction", prediction)
    index = check_step_index(step_index, prediction.shape[0], prediction)
    seed, sample_ids, step = check_key(prediction, seed, sample_ids, step)
    arguments = (prediction, x0, index, schedule.alpha, schedule.sigma, weights, seed, sample_ids, step, target)
    try:
        if is_differentiated(prediction):
            return _DenoisingLoss.apply(*arguments)
        return current_ops().denoising_loss.default(*arguments, False)[0]
    except RuntimeError as refusal:
        raise in_words(refusal, "denoising_loss", *arguments, False) from None


class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x0: Tensor, step_index: Tensor | None, alpha: Tensor, sigma: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.ops, ctx.x0_dtype = current_ops(), x0.dtype
        x_t, drawn = ctx.ops.add_noise.default(x0, step_index, alpha, sigma, *rest)
        ctx.save_for_backward(drawn if step_index is None else step_index, alpha)
        ctx.mark_non_differentiable(drawn)
        # The gradient of the indices is None, not zeros that are written for nobody.
        ctx.set_materialize_grads(False)
        return x_t, drawn

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dx_t: Tensor | None, _: None) -> tuple[Any, ...]:
        if dx_t is None:
            return (None,) * 11
        wide = torch.promote_types(dx_t.dtype, ctx.x0_dtype)
        dx0 = ctx.ops.add_noise_backward.default(dx_t.to(wide), *ctx.saved_tensors).to(ctx.x0_dtype)
        return dx0, *(None,) * 10


class _DenoisingLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, prediction: Tensor, x0: Tensor, step_index: Tensor, alpha: Tensor, sigma: Tensor,
        weights: Tensor | None, seed: Tensor, sample_ids: Tensor, step: Tensor, target: str,
    ) -> Tensor:  # fmt: skip
        ctx.ops, ctx.target, ctx.has_gradient = current_ops(), target, saves_gradient(prediction, x0, target)
        inputs = (prediction, x0, step_index, alpha, sigma, weights, seed, sample_ids, step)
        loss, gradient = ctx.ops.denoising_loss.default(*inputs, target, ctx.has_gradient)
        # The prediction too: by it a second derivative, which there is none of, is seen to be asked for.
        ctx.save_for_backward(*(gradient, prediction) if ctx.has_gradient else inputs)
        return loss

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        if ctx.has_gradient:
            dprediction = ctx.ops.scale_samples.default(ctx.saved_tensors[0], dloss)
        else:
            dprediction = ctx.ops.denoising_loss_backward.default(dloss, *ctx.saved_tensors, ctx.target)
        return dprediction, *(None,) * 9


def saves_gradient(prediction: Tensor, x0: Tensor, target: str) -> bool:
    """Tell whether the forward writes the loss's gradient for the backward to scale, or the backward computes it again.

    On a CPU it is written: to draw the noise again takes longer than to move its bytes. On a GPU bytes decide, with p
    those of the prediction and x those of x0 where the target needs it: to save moves 4p + x, to compute again 3p + 2x.
    fp16 is never saved, since 2 / M is below its normal numbers before a loss scale comes.
    """
    if prediction.dtype == torch.float16:
        return False
    if prediction.device.type == "cpu":
        return True
    if target == "eps":
        return False
    return x0.element_size() > prediction.element_size()
