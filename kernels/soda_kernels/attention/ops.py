"""Schemas and shape functions of attention."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from soda_kernels._library import define
from soda_kernels._native import isa_of_widths, native_is_loaded
from soda_kernels.attention import cpu, reference, sdpa
from soda_kernels.attention.config import PYTORCH_VARIANTS, Problem, choose, explain_choice


def _contiguous(like: Tensor) -> Tensor:
    """An empty contiguous tensor of `like`'s shape."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _contiguous(q), reference.empty_lse(q)


def _fake_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _contiguous(q), _contiguous(k), _contiguous(v)


def _fake_backward_qkvpacked(do: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return _contiguous(qkv)


def _without_backend(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Run an implementation that has no choice of backend, which is an op's last argument."""

    @functools.wraps(implementation)
    def run(*arguments: Any) -> Any:
        return implementation(*arguments[:-1])

    return run


_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256
_CHANNEL_MULTIPLE = 8  # as in csrc/attention.cpp


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


def _unsupported_by_native(*qkv: Tensor) -> str | None:
    """Say why the native library cannot take a call with these [B, T, H, D], or None if it can."""
    if not native_is_loaded():
        return "there is no native library"
    q = qkv[0]
    if q.dtype != torch.float32:
        return f"the native kernels take fp32, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] % _CHANNEL_MULTIPLE:
        return f"the native kernels take head dims that are multiples of {_CHANNEL_MULTIPLE}"
    if any(tensor.stride(-1) != 1 for tensor in qkv):
        return "the native kernels take rows whose numbers lie together"
    return None


def _span(x: Tensor) -> int:
    """Return an upper bound of an offset inside one head of [B, T, H, D]."""
    return x.shape[1] * max(x.stride(1), 4 * x.shape[2] * x.shape[3]) + x.shape[3] * x.stride(3)


def _use_reference(backend: str | None, *tensors: Tensor) -> str | None:
    """Say why the reference has to take a call with these [B, T, H, D], q first, or None if a kernel can.

    Raises:
        ValueError: a backend was asked for that cannot take it.
    """
    reason = sdpa.unsupported(*tensors) if backend in PYTORCH_VARIANTS else _unsupported(*tensors)
    if reason and backend is not None:
        raise ValueError(f"backend is {backend!r}, which cannot run: {reason}")
    return reason


def _gpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str | None) -> tuple[Tensor, Tensor]:
    if _use_reference(backend, q, k, v):
        return reference.forward(q, k, v, scale)
    config = choose(Problem.of(q, k, v, backward=False), q.device, backend)
    if config.variant in PYTORCH_VARIANTS:
        return sdpa.forward(q, k, v, scale, config.variant)
    from soda_kernels.attention import triton_impl

    return triton_impl.plan_forward(q, k, v, scale, config=config).run()


def _gpu_backward(*args: Any) -> Any:
    do, q, k, v, o, lse, scale, backend = args
    if _use_reference(backend, q, k, v, do):
        return reference.backward(do, q, k, v, o, lse, scale)
    config = choose(Problem.of(q, k, v, do, backward=True), q.device, backend)
    if config.variant in PYTORCH_VARIANTS:
        return sdpa.backward(do, q, k, v, o, lse, scale, config.variant)
    from soda_kernels.attention import triton_impl

    return triton_impl.plan_backward(do, q, k, v, o, lse, scale, config=config).run()


def _gpu_backward_qkvpacked(*args: Any) -> Any:
    do, qkv, o, lse, scale, backend = args
    q, k, v = qkv.unbind(2)
    if _use_reference(backend, q, k, v, do):
        return reference.backward_qkvpacked(do, qkv, o, lse, scale)
    config = choose(Problem.of(q, k, v, do, backward=True), q.device, backend)
    if config.variant in PYTORCH_VARIANTS:
        return torch.stack(sdpa.backward(do, q, k, v, o, lse, scale, config.variant), dim=2)
    from soda_kernels.attention import triton_impl

    return triton_impl.plan_backward_qkvpacked(do, qkv, o, lse, scale, config=config).run()[0]


def _describe(
    device_type: str, q: Tensor, k: Tensor, *others: Tensor, backend: str | None, backward: bool
) -> tuple[str, dict[str, Any], str]:
    if device_type == "cpu":
        if cpu.is_empty(q):
            return "reference", {}, "nothing to compute"
        if reason := _unsupported_by_native(q, k, others[0]):
            return "torch", {}, f"PyTorch's flash attention for CPUs: {reason}"
        return "native", {"isa": isa_of_widths(q.shape[-1])}, "the native library is loaded"
    if reason := _use_reference(backend, q, k, *others):
        return "reference", {}, reason
    problem = Problem.of(q, k, *others, backward=backward)
    config = choose(problem, q.device, backend)
    reason = explain_choice(problem, q.device, backend)
    if config.variant in PYTORCH_VARIANTS:
        return "torch", {"variant": config.variant}, reason
    return "triton", dataclasses.asdict(config), reason


def _describe_forward(device_type: str, *args: Any) -> tuple[str, dict[str, Any], str]:
    q, k, v, _, backend = args
    return _describe(device_type, q, k, v, backend=backend, backward=False)


def _describe_backward(device_type: str, *args: Any) -> tuple[str, dict[str, Any], str]:
    do, q, k, v = args[:4]
    return _describe(device_type, q, k, v, do, backend=args[-1], backward=True)


def _describe_backward_qkvpacked(device_type: str, *args: Any) -> tuple[str, dict[str, Any], str]:
    do, qkv = args[:2]
    return _describe(device_type, *qkv.unbind(2), do, backend=args[-1], backward=True)


CPU_FUNCTIONS = {
    name: _without_backend(function)
    for name, function in (
        ("attention", cpu.forward),
        ("attention_backward", cpu.backward),
        ("attention_qkvpacked_backward", cpu.backward_qkvpacked),
    )
}
"""What runs on tensors in main memory that the native library does not take."""

define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, float scale, str? backend) -> (Tensor, Tensor)",
    reference=_without_backend(reference.forward),
    fake=_fake_forward,
    cpu=CPU_FUNCTIONS["attention"],
    gpu=_gpu_forward,
    describe=_describe_forward,
)
define(
    "attention_backward",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale, str? backend) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_without_backend(reference.backward),
    fake=_fake_backward,
    cpu=CPU_FUNCTIONS["attention_backward"],
    gpu=_gpu_backward,
    describe=_describe_backward,
)
define(
    "attention_qkvpacked_backward",
    "(Tensor do, Tensor qkv, Tensor o, Tensor lse, float scale, str? backend) -> Tensor",
    reference=_without_backend(reference.backward_qkvpacked),
    fake=_fake_backward_qkvpacked,
    cpu=CPU_FUNCTIONS["attention_qkvpacked_backward"],
    gpu=_gpu_backward_qkvpacked,
    describe=_describe_backward_qkvpacked,
)
