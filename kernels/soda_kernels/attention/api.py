"""The public functions of attention, and their gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from soda_kernels import _checks
from soda_kernels._autograd import first_derivative_only, is_differentiated
from soda_kernels._backend import current_ops, is_reference
from soda_kernels.attention import ops as _ops  # noqa: F401  registers the ops
from soda_kernels.attention.config import BACKENDS


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Attend from every query to every key: softmax(scale * q k^T) v, with no mask, dropout or causal mode.

    On a CPU with the native library, fp32 with a head dim that is a multiple of 8 runs its kernels, and everything else
    PyTorch's flash attention; `explain` tells which.

    Args:
        q: [B, T, H, D] in fp32, bf16, fp16 or fp64, any strides.
        k, v: [B, S, H, D], of q's dtype and device; S may differ from T and must not be 0.
        scale: 1 / sqrt(D) if None.
        backend: on a GPU, whose kernels run, forward and backward: "triton" (this package's), "cudnn" or "flash"
            (PyTorch's); if None, what the GPU's table says, or this package's.

    Returns:
        [B, T, H, D], contiguous: ready for the output projection as (B, T, H * D).

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is not as above, or the backend asked for
            cannot run.
        RuntimeError: a second derivative is asked for.

    Reference:
        Vaswani et al. 2017, equation 1.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _checks.check_float_tensor(name, tensor)
        if tensor.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be (B, T, H, D)")
    if k.shape[1] == 0:
        raise ValueError(f"k has shape {tuple(k.shape)}; it must have at least one key")
    _checks.check_shape("k", k, (q.shape[0], k.shape[1], q.shape[2], q.shape[3]))
    _checks.check_shape("v", v, tuple(k.shape))
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype} and q {q.dtype}; they must be the same")
        _checks.check_device(name, tensor, "q", q)
    _check_backend(backend, q)
    if not is_differentiated(q, k, v):
        return current_ops().attention.default(q, k, v, _scale(q, scale), backend)[0]
    return _Attention.apply(q, k, v, _scale(q, scale), backend)


def attention_qkvpacked(qkv: Tensor, *, scale: float | None = None, backend: str | None = None) -> Tensor:
    """Self-attention on a packed projection; its gradient is one packed tensor.

    Args:
        qkv: [B, T, 3, H, D] in fp32, bf16, fp16 or fp64, any strides.
        scale: 1 / sqrt(D) if None.
        backend: on a GPU, whose kernels run, forward and backward: "triton" (this package's), "cudnn" or "flash"
            (PyTorch's); if None, what the GPU's table says, or this package's.

    Returns:
        [B, T, H, D], contiguous.

    Raises:
        As `attention`.
    """
    _checks.check_float_tensor("qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; it must be (B, T, 3, H, D)")
    if qkv.shape[1] == 0:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; it must have at least one position")
    _check_backend(backend, qkv)
    if not is_differentiated(qkv):
        return current_ops().attention.default(*qkv.unbind(2), _scale(qkv, scale), backend)[0]
    return _AttentionQkvPacked.apply(qkv, _scale(qkv, scale), backend)


def _scale(q: Tensor, scale: float | None) -> float:
    if scale is None:
        return 1.0 / math.sqrt(max(1, q.shape[-1]))
    _checks.check_number("scale", scale)
    return float(scale)


def _check_backend(backend: str | None, q: Tensor) -> None:
    if backend is None:
        return
    _checks.check_choice("backend", backend, BACKENDS)
    if q.device.type != "cuda":
        raise ValueError(f"backend is {backend!r}; on {q.device.type} there is one alone, so that it must be None")
    if is_reference():
        raise ValueError(f"backend is {backend!r} inside use_backend('reference'); ask for one or the other")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str | None) -> Tensor:
        ctx.ops, ctx.scale, ctx.backend = current_ops(), scale, backend
        o, lse = ctx.ops.attention(q, k, v, scale, backend)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        return *ctx.ops.attention_backward(do, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None


class _AttentionQkvPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float, backend: str | None) -> Tensor:
        ctx.ops, ctx.scale, ctx.backend = current_ops(), scale, backend
        o, lse = ctx.ops.attention(*qkv.unbind(2), scale, backend)
        ctx.save_for_backward(qkv, o, lse)
        return o

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        return ctx.ops.attention_qkvpacked_backward(do, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None
