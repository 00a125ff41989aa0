"""Schemas and shape functions of modulated group norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from soda_kernels._checks import image_memory_format
from soda_kernels._library import define
from soda_kernels._native import native_status
from soda_kernels.group_norm import reference
from soda_kernels.group_norm.config import Problem, choose


def _empty(like: Tensor, channels: int) -> Tensor:
    """An empty tensor of `like`'s layout with another number of channels."""
    shape = (like.shape[0], channels, *like.shape[2:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=image_memory_format(like))


def _fake_forward(
    x: Tensor, skip: Tensor | None, residual: Tensor | None, weight: Any, bias: Any, modulations: Any, num_groups: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    statistics = torch.promote_types(x.dtype, torch.float32)
    y = _empty(x, x.shape[1] + (0 if skip is None else skip.shape[1]))
    summed = x.new_empty(0) if residual is None else _empty(x, x.shape[1])
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=statistics) for _ in range(2))
    return y, summed, mean, rstd


def _fake_backward(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, skip: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    modulations: list[Tensor], *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    dskip = x.new_empty(0) if skip is None else _empty(x, skip.shape[1])
    dweight, dbias = (x.new_empty(0) if p is None else torch.empty_like(p) for p in (weight, bias))
    return _empty(x, x.shape[1]), dskip, dweight, dbias, [torch.empty(m.shape, dtype=m.dtype, device=m.device)
                                                         for m in modulations]  # fmt: skip


# What the Triton kernels count in 32 bits, with room for the chunk that ends beyond it.
_MAX_POSITIONS = 2**31 - 2**14
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _unsupported(tensors: Iterable[Tensor | None], x: Tensor) -> str | None:
    """Say why the kernels cannot take a call, or None if they can."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in _KERNEL_DTYPES:
            return f"the kernels take fp32, bf16 and fp16, not {str(tensor.dtype).removeprefix('torch.')}"
    if x.numel() == 0:
        return "nothing to compute"
    if x.device.type != "cpu" and x.shape[2:].numel() >= _MAX_POSITIONS:
        return "the kernels index positions in 32 bits"
    return None


def _gpu_forward(*args: Any) -> Any:
    x, skip, residual, weight, bias, modulations = args[:6]
    if _unsupported((x, weight, bias, *modulations), x):
        return reference.forward(*args)
    from soda_kernels.group_norm import triton_impl

    return triton_impl.forward(*args)


def _gpu_backward(*args: Any) -> Any:
    dy, dsummed, x, skip, weight, bias, modulations = args[:7]
    if _unsupported((x, weight, bias, *modulations), x):
        return reference.backward(*args)
    from soda_kernels.group_norm import triton_impl

    return triton_impl.backward(*args)


def _describe(
    device_type: str, x: Tensor, skip: Tensor | None, weight: Any, bias: Any, modulations: list[Tensor],
    num_groups: int, dropout_p: float, *, backward: bool,
) -> tuple[str, dict[str, Any], str]:  # fmt: skip
    reason = _unsupported((x, weight, bias, *modulations), x)
    if reason:
        return "reference", {}, reason
    if device_type == "cpu":
        return "native", {"isa": native_status().isa}, "the native library is loaded"
    problem = Problem.of(x, skip, num_groups, backward=backward, dropout=dropout_p > 0.0)
    return "triton", dataclasses.asdict(choose(problem, x.device)), f"{problem.key} of {x.device}"


def _describe_forward(device_type: str, *args: Any) -> tuple[str, dict[str, Any], str]:
    x, skip, _, weight, bias, modulations, num_groups, _, _, _, dropout_p, *_ = args
    return _describe(device_type, x, skip, weight, bias, modulations, num_groups, dropout_p, backward=False)


def _describe_backward(device_type: str, *args: Any) -> tuple[str, dict[str, Any], str]:
    _, _, x, skip, weight, bias, modulations, _, rstd, _, _, dropout_p, *_ = args
    return _describe(device_type, x, skip, weight, bias, modulations, rstd.shape[1], dropout_p, backward=True)


define(
    "modulated_group_norm",
    "(Tensor x, Tensor? skip, Tensor? residual, Tensor? weight, Tensor? bias, Tensor[] modulations, int num_groups, "
    "float scale_offset, float eps, bool silu, float dropout_p, Tensor? seed, float residual_scale=1.0) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.forward,
    fake=_fake_forward,
    gpu=_gpu_forward,
    describe=_describe_forward,
)
define(
    "modulated_group_norm_backward",
    "(Tensor dy, Tensor? dsummed, Tensor x, Tensor? skip, Tensor? weight, Tensor? bias, Tensor[] modulations, "
    "Tensor mean, Tensor rstd, float scale_offset, bool silu, float dropout_p, Tensor? seed, "
    "float residual_scale=1.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    reference=reference.backward,
    fake=_fake_backward,
    gpu=_gpu_backward,
    describe=_describe_backward,
)
