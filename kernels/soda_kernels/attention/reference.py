"""Attention in plain PyTorch, forward and closed-form backward: the definition of the op.

    S = scale * Q K^T       lse = logsumexp(S)       P = softmax(S) = exp(S - lse)       O = P V
    dV = P^T dO       dP = dO V^T       delta = sum_d O dO       dS = P (dP - delta)       dQ = scale dS K
    dK = scale dS^T Q

Products and sums are in fp32, or in fp64 for fp64 inputs; only O and lse are kept for the backward.

Reference: Vaswani et al. 2017; the backward from lse as in Dao et al. 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (o [B, T, H, D], lse [B, H, T], laid out as `empty_lse`)."""
    query, key, value = _heads_first(q), _heads_first(k), _heads_first(v)
    scores = (query @ key.mT).mul_(scale)
    # Not exp(S - lse): at logits of 1e4 the rounding of lse alone would scale o by 1 ± 5e-4.
    o, lse = scores.softmax(-1) @ value, scores.logsumexp(-1)
    return o.to(q.dtype).transpose(1, 2).contiguous(), empty_lse(q).copy_(lse)


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv), contiguous in their (B, T, H, D) shapes."""
    query, key, value, dout = _heads_first(q), _heads_first(k), _heads_first(v), _heads_first(do)
    p = (query @ key.mT).mul_(scale).sub_(lse.unsqueeze(-1)).exp_()
    dv = p.mT @ dout
    delta = (_heads_first(o) * dout).sum(-1, keepdim=True)
    ds = (dout @ value.mT).sub_(delta).mul_(p).mul_(scale)
    grads = (ds @ key, ds.mT @ query, dv)
    dq, dk, dv = (grad.to(q.dtype).transpose(1, 2).contiguous() for grad in grads)
    return dq, dk, dv


def backward_qkvpacked(do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Return dqkv [B, T, 3, H, D]."""
    q, k, v = qkv.unbind(2)
    return torch.stack(backward(do, q, k, v, o, lse, scale), dim=2)


def empty_lse(q: Tensor) -> Tensor:
    """Allocate lse [B, H, T]: contiguous, but on a CPU with heads innermost, as PyTorch's kernel there writes it."""
    batch, queries, heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    if q.device.type in ("cpu", "meta"):
        return q.new_empty((batch, queries, heads), dtype=dtype).transpose(1, 2)
    return q.new_empty((batch, heads, queries), dtype=dtype)


def _heads_first(x: Tensor) -> Tensor:
    """View (B, T, H, D) as (B, H, T, D), in the dtype that products are formed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2)
