"""Schemas and shape functions of attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from soda_kernels._library import define
from soda_kernels.attention import cpu, reference
from soda_kernels.attention.config import Problem, choose


def _contiguous(like: Tensor) -> Tensor:
    """An empty contiguous tensor of `like`'s shape."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _contiguous(q), reference.empty_lse(q)


def _fake_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _contiguous(q), _contiguous(k), _contiguous(v)


def _fake_backward_qkvpacked(do: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return _contiguous(qkv)


_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


def _unsupported(*tensors: Tensor) -> str | None:
    """Say why the Triton kernels cannot take a call with these [B, T, H, D], q first, or None if they can."""
    q = tensors[0]
    if q.numel() == 0:
        return "nothing to compute"
    if q.dtype not in _KERNEL_DTYPES:
        return f"the kernels take fp32, bf16 and fp16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] > _MAX_HEAD_DIM:
        return f"the kernels take head dims up to {_MAX_HEAD_DIM}"
    if max(map(_span, tensors)) >= 2**31:
        return "the kernels index inside a head in 32 bits"
    return None


def _span(x: Tensor) -> int:
    """Return an upper bound of an offset inside one head of [B, T, H, D]."""
    return x.shape[1] * max(x.stride(1), 4 * x.shape[2] * x.shape[3]) + x.shape[3] * x.stride(3)


def _gpu_forward(*args: Any) -> Any:
    if _unsupported(*args[:3]):
        return reference.forward(*args)
    from soda_kernels.attention import triton_impl

    return triton_impl.forward(*args)


def _gpu_backward(*args: Any) -> Any:
    do, q, k, v = args[:4]
    if _unsupported(q, k, v, do):
        return reference.backward(*args)
    from soda_kernels.attention import triton_impl

    return triton_impl.backward(*args)


def _gpu_backward_qkvpacked(*args: Any) -> Any:
    do, qkv = args[:2]
    if _unsupported(*qkv.unbind(2), do):
        return reference.backward_qkvpacked(*args)
    from soda_kernels.attention import triton_impl

    return triton_impl.backward_qkvpacked(*args)


def _describe(
    device_type: str, q: Tensor, k: Tensor, *others: Tensor, backward: bool
) -> tuple[str, dict[str, Any], str]:
    if device_type == "cpu":
        if cpu.is_empty(q):
            return "reference", {}, "nothing to compute"
        return "torch", {}, "PyTorch's flash attention for CPUs"
    reason = _unsupported(q, k, *others)
    if reason:
        return "reference", {}, reason
    problem = Problem.of(q, k, backward=backward)
    return "triton", dataclasses.asdict(choose(problem, q.device)), f"{problem.key} of {q.device}"


def _describe_forward(device_type: str, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[str, dict[str, Any], str]:
    return _describe(device_type, q, k, v, backward=False)


def _describe_backward(device_type: str, *args: Any) -> tuple[str, dict[str, Any], str]:
    do, q, k, v = args[:4]
    return _describe(device_type, q, k, v, do, backward=True)


def _describe_backward_qkvpacked(device_type: str, *args: Any) -> tuple[str, dict[str, Any], str]:
    do, qkv = args[:2]
    return _describe(device_type, *qkv.unbind(2), do, backward=True)


define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    reference=reference.forward,
    fake=_fake_forward,
    cpu=cpu.forward,
    gpu=_gpu_forward,
    describe=_describe_forward,
)
define(
    "attention_backward",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
    reference=reference.backward,
    fake=_fake_backward,
    cpu=cpu.backward,
    gpu=_gpu_backward,
    describe=_describe_backward,
)
define(
    "attention_qkvpacked_backward",
    "(Tensor do, Tensor qkv, Tensor o, Tensor lse, float scale) -> Tensor",
    reference=reference.backward_qkvpacked,
    fake=_fake_backward_qkvpacked,
    cpu=cpu.backward_qkvpacked,
    gpu=_gpu_backward_qkvpacked,
    describe=_describe_backward_qkvpacked,
)
