"""Schemas and shape functions of the 3x3 convolution."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from soda_kernels._backend import is_reference
from soda_kernels._checks import image_memory_format
from soda_kernels._library import define
from soda_kernels._native import isa_of_widths, native_is_loaded
from soda_kernels.convolution import reference

_CHANNEL_MULTIPLE, _LEAST_TILES = 8, 8  # as in csrc/convolution.cpp


def runs_winograd(x: object, weight: object, bias: object = None, residual: object = None) -> bool:
    """Tell whether a call goes to the native library's kernels, which one with wrong arguments never does."""
    if not native_is_loaded() or is_reference() or not (_is_dense(x) and _is_dense(weight)):
        return False
    if not (x.ndim == weight.ndim == 4 and weight.shape[1:] == (x.shape[1], 3, 3)):
        return False
    for other, shape in ((bias, weight.shape[:1]), (residual, (x.shape[0], weight.shape[0], *x.shape[2:]))):
        if other is not None and not (_is_dense(other) and other.dtype == torch.float32 and other.shape == shape):
            return False
    return _unsupported(x, weight) is None and not torch.is_autocast_enabled("cpu")


def _is_dense(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_cpu and value.layout == torch.strided


def _unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Say why the native kernels cannot take a call, or None if they can."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"the native kernels take fp32, not {str(x.dtype).removeprefix('torch.')}"
    if not x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous():
        return "the native kernels take images in channels_last"
    filters, channels = weight.shape[:2]
    if reason := unsupported_channels(channels, filters):
        return reason
    batch, _, height, width = x.shape
    if batch * ((height + 1) // 2) * ((width + 1) // 2) < _LEAST_TILES or height * width == 1:
        return "too few tiles of 2x2 pixels for their transforms to pay"
    return None


def unsupported_channels(channels: int, filters: int) -> str | None:
    """Say why the native kernels cannot take any call with so many channels and filters, or None if they can."""
    if channels % _CHANNEL_MULTIPLE or filters % _CHANNEL_MULTIPLE or not channels or not filters:
        return f"the native kernels take numbers of channels that are multiples of {_CHANNEL_MULTIPLE}"
    return None


def _describe_forward(device_type: str, x: Tensor, weight: Tensor, *_: Any) -> tuple[str, dict[str, Any], str]:
    if reason := _unsupported(x, weight):
        return "reference", {}, reason
    return "native", {"isa": isa_of_widths(*weight.shape[:2])}, "the native library is loaded"


def _describe_backward(device_type: str, dy: Tensor, *args: Any) -> tuple[str, dict[str, Any], str]:
    return _describe_forward(device_type, *args)


def _empty(like: Tensor, channels: int) -> Tensor:
    shape = (like.shape[0], channels, *like.shape[2:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=image_memory_format(like))


def _fake_forward(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return _empty(x, weight.shape[0])


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, for_x: bool, for_weight: bool, for_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = torch.empty(weight.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return (
        _empty(x, x.shape[1]) if for_x else x.new_empty(0),
        dweight if for_weight else x.new_empty(0),
        x.new_empty(weight.shape[0] if for_bias else 0),
    )


define(
    "conv3x3",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool relu) -> Tensor",
    reference=reference.forward,
    fake=_fake_forward,
    describe=_describe_forward,
)
define(
    "conv3x3_backward",
    "(Tensor dy, Tensor x, Tensor weight, bool for_x, bool for_weight, bool for_bias) -> (Tensor, Tensor, Tensor)",
    reference=reference.backward,
    fake=_fake_backward,
    describe=_describe_backward,
)
