"""The public function of the 3x3 convolution, and its gradients."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from soda_kernels import _checks
from soda_kernels._autograd import first_derivative_only, is_differentiated
from soda_kernels._backend import current_ops, is_reference
from soda_kernels.convolution.ops import runs_winograd


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None,
    activation: Literal["relu"] | None = None,
) -> Tensor:  # fmt: skip
    """Convolve with 3x3 filters, stride 1 and padding 1: activation(conv2d(x, weight, bias, padding=1) + residual).

    On a CPU with the native library, fp32 images in channels_last are convolved by Winograd's F(2x2, 3x3), forward and
    backward, where both numbers of channels are multiples of 8 and there are at least eight tiles of 2x2 pixels, and
    `explain` says so. Elsewhere images of one pixel on a CPU are PyTorch's product of matrices, and all else its
    convolution.

    Args:
        x: [N, C, H, W] in fp32, bf16, fp16 or fp64.
        weight: [K, C, 3, 3]. bias: [K] or None. Both of x's dtype (under autocast of any) and device.
        residual: [N, K, H, W] of x's dtype and device, or None.
        activation: "relu" or None.

    Returns:
        [N, K, H, W]: in x's layout by Winograd, else in the one that PyTorch's convolution takes.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is not as above.
        RuntimeError: a second derivative or a `torch.func` transform is asked for of Winograd's.

    Reference:
        Lavin and Gray 2016, section 4.1.
    """
    _checks.check_choice("activation", activation, ("relu", None))
    if runs_winograd(x, weight, bias, residual):
        if is_differentiated(x, weight, bias, residual):
            return _Conv3x3.apply(x, weight, bias, residual, activation == "relu")
        return current_ops().conv3x3.default(x, weight, bias, residual, activation == "relu")
    _check(x, weight, bias, residual)
    is_pixel = x.is_cpu and x.shape[2:] == (1, 1) and not is_reference()
    y = _of_one_pixel(x, weight, bias) if is_pixel else F.conv2d(x, weight, bias, padding=1)
    if residual is not None:
        y = y + residual
    return y if activation is None else F.relu(y)


def _of_one_pixel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve images of one pixel, of which all filters but for their centres see padding.

    For 128 to 512 images of 64 to 512 channels, on two EPYC cores, it took 0.23 to 0.30 of the time of oneDNN's
    convolution, and 0.03 to 0.14 with the backward.
    """
    centres = weight.movedim(1, 3)[:, 1, 1]  # so that the gradient of filters in channels_last is in it too
    return F.linear(x.flatten(1), centres, bias)[:, None, None].movedim(3, 1)


def _check(x: object, weight: object, bias: object, residual: object) -> None:
    for name, tensor in (("x", x), ("weight", weight)):
        _checks.check_float_tensor(name, tensor)
        assert isinstance(tensor, Tensor)
        if tensor.ndim != 4:
            wanted = "(N, C, H, W)" if name == "x" else "(K, C, 3, 3)"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {wanted}")
    assert isinstance(x, Tensor) and isinstance(weight, Tensor)
    _checks.check_shape("weight", weight, (weight.shape[0], x.shape[1], 3, 3))
    named = [("weight", weight)]
    if bias is not None:
        _checks.check_float_tensor("bias", bias)
        assert isinstance(bias, Tensor)
        _checks.check_shape("bias", bias, (weight.shape[0],))
        named.append(("bias", bias))
    if residual is not None:
        _checks.check_float_tensor("residual", residual)
        assert isinstance(residual, Tensor)
        _checks.check_shape("residual", residual, (x.shape[0], weight.shape[0], *x.shape[2:]))
        named.append(("residual", residual))
    for name, tensor in named:
        _checks.check_device(name, tensor, "x", x)
        if tensor.dtype != x.dtype and not _autocast(x.device.type):
            raise TypeError(f"{name} has dtype {tensor.dtype} and x {x.dtype}; they must be the same")


def _autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool
    ) -> Tensor:
        ctx.ops, ctx.relu = current_ops(), relu
        y = ctx.ops.conv3x3.default(x, weight, bias, residual, relu)
        ctx.save_for_backward(x, weight, y if relu else None)
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, y = ctx.saved_tensors
        if ctx.relu:
            dy = torch.ops.aten.threshold_backward.default(dy, y, 0.0)
        for_x, for_weight, for_bias, for_residual, _ = ctx.needs_input_grad
        dx, dweight, dbias = ctx.ops.conv3x3_backward.default(dy, x, weight, for_x, for_weight, for_bias)
        return (
            dx if for_x else None, dweight if for_weight else None, dbias if for_bias else None,
            dy if for_residual else None, None,
        )  # fmt: skip
