"""Attention on a GPU by PyTorch's own kernels, cuDNN's and FlashAttention, behind the same ops.

A forward of one and a backward of another fit together: lse is (B, H, T) of the natural logarithm. Not yet run on a
GPU: that shapes and arguments fit is tested over fake tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_OPS = {"flash": "_scaled_dot_product_flash_attention", "cudnn": "_scaled_dot_product_cudnn_attention"}


def unsupported(*tensors: Tensor) -> str | None:
    """Say why PyTorch's kernels cannot take a call with these [B, T, H, D], or None if they may."""
    q = tensors[0]
    if q.numel() == 0:
        return "nothing to compute"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 and fp16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] % 8:
        return f"it takes head dims in multiples of 8, not {q.shape[-1]}"
    if any(x.stride(-1) != 1 for x in tensors):
        return "it takes heads whose numbers lie together"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, variant: str) -> tuple[Tensor, Tensor]:
    """Run the op `attention` with "cudnn" or "flash"."""
    arguments: dict[str, Any] = {"scale": scale}
    if variant == "cudnn":
        arguments |= {"attn_bias": None, "compute_log_sumexp": True}
    named = zip(("query", "key", "value"), _heads_first(q, k, v), strict=True)
    o, lse, *_ = getattr(torch.ops.aten, _OPS[variant]).default(**dict(named), **arguments)
    return o.transpose(1, 2).contiguous(), lse.reshape(lse.shape[:3])


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, variant: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op `attention_backward` with "cudnn" or "flash"."""
    # No packed sequences, no mask: undefined tensors, as in PyTorch's own graph. No dropout: seeds that are not read.
    seed = q.new_empty(2, dtype=torch.uint64) if variant == "flash" else q.new_empty((), dtype=torch.int64)
    arguments: dict[str, Any] = {
        "max_q": q.shape[1], "max_k": k.shape[1], "dropout_p": 0.0, "is_causal": False, "scale": scale,
        "cum_seq_q": None, "cum_seq_k": None, "philox_seed": seed, "philox_offset": torch.empty_like(seed),
    }  # fmt: skip
    if variant == "cudnn":
        arguments |= {"attn_bias": None}
        lse = lse.unsqueeze(-1)
    names = ("grad_out", "query", "key", "value", "out")
    named = zip(names, _heads_first(do, q, k, v, o), strict=True)
    op = getattr(torch.ops.aten, f"{_OPS[variant]}_backward").default
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in op(**dict(named), logsumexp=lse.contiguous(), **arguments))
    return dq, dk, dv


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """View (B, T, H, D) as (B, H, T, D)."""
    return [x.transpose(1, 2) for x in tensors]
