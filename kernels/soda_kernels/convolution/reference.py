"""3x3 convolution in PyTorch's own terms: what the op computes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from soda_kernels._checks import image_memory_format


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """Return relu(convolution + bias + residual), [N, K, H, W] in x's layout."""
    y = F.conv2d(x, weight, bias, padding=1).contiguous(memory_format=image_memory_format(x))
    if residual is not None:
        y += residual
    return y.relu_() if relu else y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, for_x: bool, for_weight: bool, for_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; one that is not asked for is empty."""
    wanted = [for_x, for_weight, for_bias]
    where = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    found = torch.ops.aten.convolution_backward.default(dy, x, weight, [weight.shape[0]], *where, wanted)
    dx, dweight, dbias = (
        gradient if is_wanted else x.new_empty(0) for gradient, is_wanted in zip(found, wanted, strict=True)
    )
    if for_x:
        dx = dx.contiguous(memory_format=image_memory_format(x))
    if for_weight:
        dweight = dweight.contiguous(memory_format=torch.channels_last)
    return dx, dweight, dbias
