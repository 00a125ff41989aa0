"""Activations that are not kept for the backward, because it can have them cheaply: resampled images.

Autograd keeps what a layer's derivative reads, and does not know that some of it is a copy of something smaller.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def halved(x: Tensor, kept_anyway: Tensor | None = None) -> Tensor:
    """Average 2x2 pixels, [N, C, H, W] -> [N, C, H / 2, W / 2].

    Args:
        kept_anyway: of x's shape, dtype and layout, and kept by another layer: it is kept instead of x, since PyTorch's
            backward takes the pooled image and reads nothing but its shape.
    """
    if kept_anyway is None or kept_anyway.dtype != x.dtype or kept_anyway.stride() != x.stride():
        return F.avg_pool2d(x, 2)
    shape_of = kept_anyway.detach()
    return calling(lambda image: F.avg_pool2d(image, 2), x, lambda: shape_of)


def doubled(x: Tensor) -> Tensor:
    """Repeat each pixel 2x2, [N, C, H, W] -> [N, C, 2 H, 2 W]."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def convolved_doubled(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return conv(doubled(x)), keeping x instead of an image of four times its size."""
    small = x.detach()
    return calling(conv, doubled(x), lambda: doubled(small))


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
        return again if tensor.untyped_storage()._cdata == storage and tensor.shape == shape else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        return layer(x)


@torch.no_grad()
def _unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()
