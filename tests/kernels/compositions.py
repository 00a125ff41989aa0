"""The ops as a reader of the papers would compose them from PyTorch's own, differentiated by autograd.

In fp64 they are what the ops are compared with, in lower precision they set the tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from soda_kernels import modulated_group_norm as fused_group_norm


def modulated_group_norm(
    x: Tensor | tuple[Tensor, Tensor],
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    modulations: Sequence[tuple[Tensor, Tensor]] = (),
    *,
    scale_offset: float = 1.0,
    eps: float = 1e-5,
    activation: str | None = "silu",
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    dropout_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, the normalized tensor's input); dropout multiplies by `dropout_factor`."""
    x = torch.cat(x, dim=1) if isinstance(x, tuple) else x
    x = x if residual is None else (x + residual) * residual_scale
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    batch, channels = x.shape[:2]
    group = wide.reshape(batch, num_groups, channels // num_groups * x.shape[2:].numel())
    centered = group - group.mean(2, keepdim=True)
    h = (centered / (centered.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape).to(x.dtype)
    ones = (1,) * (x.ndim - 2)
    if weight is not None:
        h = h * weight.view(channels, *ones)
    if bias is not None:
        h = h + bias.view(channels, *ones)
    for scale, shift in modulations:
        h = h * (scale + scale_offset).view(batch, channels, *ones) + shift.view(batch, channels, *ones)
    if activation == "silu":
        h = torch.nn.functional.silu(h)
    if dropout_factor is not None:
        h = h * dropout_factor
    return h.to(x.dtype), x


def dropout_factor(shape: Sequence[int], dropout_p: float, seed: int | Tensor) -> Tensor:
    """Read off the op what its dropout multiplies each element by, in fp64: norm's bias is 1 and its weight 0."""
    channels = shape[1]
    zero, one = torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
    x = torch.zeros(tuple(shape), dtype=torch.float64)
    y = fused_group_norm(x, 1, zero, one, activation=None, dropout_p=dropout_p, seed=seed)
    assert isinstance(y, Tensor)
    return y


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention over (B, T, H, D), products in the tensors' dtype, softmax in at least fp32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    wide = scores.to(torch.promote_types(q.dtype, torch.float32))
    return torch.einsum("bhts,bshd->bthd", wide.softmax(-1).to(q.dtype), v)
