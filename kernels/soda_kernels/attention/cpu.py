"""Attention on a CPU where the native library has no kernel: PyTorch's own flash attention, behind the same ops.

Nothing is copied where rows of heads lie together, as a projection writes them. PyTorch's kernel lays its results out
like q: for a q whose heads are outside its rows they are copied once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from soda_kernels.attention import reference


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Run the op `attention`."""
    if is_empty(q):
        return reference.forward(q, k, v, scale)
    _check(q, k, v)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    o, lse = flash(*map(_heads_first, (q, k, v)), scale=scale)
    o = o.transpose(1, 2).contiguous()
    # No view in autograd's eyes, which lets nobody write to one that a Function returns.
    return torch.ops.aten._unsafe_view.default(o, o.shape), lse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op `attention_backward`."""
    if is_empty(q):
        return reference.backward(do, q, k, v, o, lse, scale)
    _check(q, k, v, of_queries=(do, o), lse=lse)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    gradients = flash(*map(_heads_first, (do, q, k, v, o)), lse, 0.0, False, scale=scale)
    dq, dk, dv = (gradient.transpose(1, 2).contiguous() for gradient in gradients)
    return dq, dk, dv


def backward_qkvpacked(do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Run the op `attention_qkvpacked_backward`."""
    # PyTorch's backward has no packed gradient to write to: this is its one pass more.
    q, k, v = qkv.unbind(2)
    return torch.stack(backward(do, q, k, v, o, lse, scale), dim=2)


def is_empty(q: Tensor) -> bool:
    """Whether there is nothing to compute, which PyTorch's kernel does not take."""
    return q.numel() == 0


def _check(q: Tensor, k: Tensor, v: Tensor, *, of_queries: Sequence[Tensor] = (), lse: Tensor | None = None) -> None:
    """Raise where PyTorch's kernel would read beyond a tensor's end, which it does not notice.

    Raises:
        ValueError: a tensor has another shape than the others ask for, or there is no key.
    """
    batch, queries, heads, head_dim = q.shape
    keys = (batch, max(1, k.shape[1]), heads, head_dim)
    wanted = [(k, keys), (v, keys), *((each, tuple(q.shape)) for each in of_queries)]
    if lse is not None:
        wanted.append((lse, (batch, heads, queries)))
    for tensor, shape in wanted:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"a tensor of attention has shape {tuple(tensor.shape)}; it must be {shape}")


def _heads_first(x: Tensor) -> Tensor:
    """View (B, T, H, D) as (B, H, T, D), copied only where D does not lie together: PyTorch's kernel asks for that."""
    return (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()).transpose(1, 2)
