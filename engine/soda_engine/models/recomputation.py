"""Activations that are not kept for the backward, because it can have them again.

Autograd keeps what a layer's derivative reads, and does not know that some of it is a copy of something smaller, or one
pass away from something that is kept anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from soda_kernels import ModulatedGroupNorm

Recompute = Literal["resampled", "norms", "nothing"]
"""What a block's backward computes again: resampled images, which costs next to nothing; also what its norms returned,
a pass each; nothing, where a checkpoint around the block does it all."""


def halved(x: Tensor) -> Tensor:
    """Average 2x2 pixels, [N, C, H, W] -> [N, C, H / 2, W / 2]."""
    return F.avg_pool2d(x, 2)


def halved_keeping(kept_anyway: Tensor, x: Tensor) -> Tensor:
    """Return halved(x), which keeps another tensor instead of x: PyTorch's backward reads nothing of it but its shape.

    Args:
        kept_anyway: by another layer. Where its dtype or layout is another than x's, x is kept.
    """
    if kept_anyway.dtype != x.dtype or kept_anyway.stride() != x.stride():
        return halved(x)
    shape_of = kept_anyway.detach()
    return calling(halved, x, lambda: shape_of)


def doubled(x: Tensor) -> Tensor:
    """Repeat each pixel 2x2, [N, C, H, W] -> [N, C, 2 H, 2 W]."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def renormalized(
    norm: ModulatedGroupNorm, x: Tensor | tuple[Tensor, Tensor], *modulations: tuple[Tensor, ...],
    seed: Tensor | None = None,
) -> Callable[[], Tensor]:  # fmt: skip
    """Return what computes a norm again; it holds what the norm keeps for its own backward, and nothing else."""
    inputs = (x[0].detach(), x[1].detach()) if isinstance(x, tuple) else x.detach()
    pairs = [(scale.detach(), shift.detach()) for scale, shift in modulations]
    return lambda: norm(inputs, *pairs, seed=seed)


def calling(layer: Callable[[Tensor], Tensor], x: Tensor, again: Callable[[], Tensor]) -> Tensor:
    """Return layer(x); its backward calls `again` for x, which is not kept.

    Nothing of it where torch.compile decides itself what is kept.

    Args:
        layer: what reads x in its backward, such as a convolution.
        again: returns x with the same bits, or whatever will do. What it holds on to is kept instead.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return layer(x)
    # Its address alone, so that the hook keeps nothing; x lives until the layer returns.
    storage, shape = x.untyped_storage()._cdata, x.shape

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        if tensor.untyped_storage()._cdata != storage or tensor.numel() != shape.numel():
            return tensor
        if tensor.shape == shape:
            return again
        view = tensor.shape, tensor.stride()  # of all of x, as a linear layer takes it
        return lambda: again().as_strided(*view)

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        return layer(x)


@torch.no_grad()
def _unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()
