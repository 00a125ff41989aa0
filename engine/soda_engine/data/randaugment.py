"""RandAugment on a batch: fourteen operations with per-sample signs, each run on the samples that drew it.

Strengths are those of the paper's search space on a scale of 0 to 30; what a warp uncovers becomes mid-grey.

Reference: Cubuk, Zoph, Shlens, Le, "RandAugment: Practical automated data augmentation with a reduced search space",
2019 (arXiv 1909.13719).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from kornia.enhance import equalize
from torch import Tensor

# The warps come last: they run together, as one resampling with a matrix of its own for each sample.
OPS = (
    "identity",
    "autocontrast",
    "equalize",
    "solarize",
    "posterize",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
NUM_OPS = len(OPS)
_FIRST_WARP = OPS.index("rotate")

# Strength at full magnitude.
_ROTATE_DEGREES = 30.0
_SHEAR = 0.3
_TRANSLATE = 150 / 331  # of the side
_ENHANCE = 0.9  # a factor of 1 - 0.9 to 1 + 0.9
_POSTERIZE_BITS = 4

# Added to a channel's range before dividing by it, as kornia does.
_STRETCH_EPS = 1e-6


def randaugment(images: Tensor, ops: Tensor, negative: Tensor, strength: float) -> Tensor:
    """Apply a sequence of operations to each image; `color` leaves a grey image as it is.

    The host sorts the samples by operation and has to know how many drew each: it waits for the device once a call
    unless `ops` is in its own memory. The parameters that it makes of them go to the device in the order of the groups.

    Args:
        images: [N, C, S, S] float32 in [0, 1], C of 1 or 3; overwritten.
        ops: [N, K] int64, indices into `OPS` in the order in which they are applied; on the images' device or the CPU.
        negative: [N, K] bool, the sign of operations that have one; where `ops` is.
        strength: magnitude in [0, 1].

    Returns:
        [N, C, S, S] float32 in [0, 1].
    """
    ops, negative = torch.stack((ops, negative.to(ops.dtype))).cpu().unbind()
    groups = ops.clamp(max=_FIRST_WARP)
    order = groups.argsort(dim=0, stable=True)
    counts = (groups[..., None] == torch.arange(_FIRST_WARP + 1)).sum(0).tolist()
    signs = 1 - 2 * negative.gather(0, order).float()
    warps = _warps(ops.gather(0, order), signs, strength, images.shape[-1])
    factors = (1 + _ENHANCE * strength * signs)[..., None, None, None]
    order, factors, warps = (on_device(tensor, images.device) for tensor in (order, factors, warps))
    for k, sizes in enumerate(counts):
        groups_of_k = zip(*(tensor[:, k].split(sizes) for tensor in (order, factors, warps)), strict=True)
        for group, (chosen, factor, warp) in enumerate(groups_of_k):
            if group == 0 or len(chosen) == 0:
                continue
            part = images.index_select(0, chosen)
            part = _warp(part, warp) if group == _FIRST_WARP else _COLOURS[OPS[group]](part, factor, strength)
            images.index_copy_(0, chosen, part)
    return images


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a small tensor on a device; if it comes from the host, through pinned memory, so that nothing waits."""
    if tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to [0, 1]; a constant channel has nothing to stretch and stays."""
    low, high = (bound[..., None] for bound in images.flatten(2).aminmax(dim=-1, keepdim=True))
    return torch.where(high == low, images, (images - low) / (high - low + _STRETCH_EPS))


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Move each value away from, or towards, the image's mean grey."""
    # Rows first: torch splits the sum of one large image over its threads, but not that of several, so that a mean over
    # both axes at once (as kornia takes it) would depend on the batch in its last bit.
    mean = _grey(images).mean(-1, keepdim=True).mean(-2, keepdim=True)
    return mean.lerp(images, factor).clamp_(0, 1)


def _color(images: Tensor, factor: Tensor) -> Tensor:
    """Move each pixel away from, or towards, its grey."""
    return images if images.shape[1] == 1 else _grey(images).lerp(images, factor).clamp_(0, 1)


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Move each inner value away from, or towards, a blur that weights the pixel 5 and its eight neighbours 1."""
    inner = images[..., 1:-1, 1:-1]
    # A pooled mean and not a convolution (which kornia uses): torch picks another algorithm for the convolution of a
    # single grey image than for that of several, with another last bit.
    blur = torch.add(9 * F.avg_pool2d(images, 3, stride=1), inner, alpha=4).div_(13)
    sharp = blur.lerp_(inner, factor).clamp_(0, 1)
    inner.copy_(sharp)
    return images


def _solarize(images: Tensor, strength: float) -> Tensor:
    """Invert values from 1 - strength on."""
    return torch.where(images < 1 - strength, images, 1 - images)


def _posterize(images: Tensor, strength: float) -> Tensor:
    """Keep 8 to 4 bits of each value."""
    dropped = round(_POSTERIZE_BITS * strength)
    return images if dropped == 0 else (images * (255 / 2**dropped)).floor_().mul_(2**dropped).div_(255)


def _grey(images: Tensor) -> Tensor:
    """[n, C, S, S] -> [n, 1, S, S], the luma of ITU-R BT.601."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return torch.add(torch.add(0.299 * red, green, alpha=0.587), blue, alpha=0.114)


# Each takes images [n, C, S, S] in [0, 1], which it may overwrite, factors [n, 1, 1, 1] and the strength.
_COLOURS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "autocontrast": lambda images, factor, strength: _autocontrast(images),
    "equalize": lambda images, factor, strength: equalize(images),
    "solarize": lambda images, factor, strength: _solarize(images, strength),
    "posterize": lambda images, factor, strength: _posterize(images, strength),
    "color": lambda images, factor, strength: _color(images, factor),
    "contrast": lambda images, factor, strength: _contrast(images, factor),
    "brightness": lambda images, factor, strength: (images * factor).clamp_(0, 1),
    "sharpness": lambda images, factor, strength: _sharpness(images, factor),
}


def _warps(ops: Tensor, signs: Tensor, strength: float, side: int) -> Tensor:
    """Return where the warps look: for each pixel of the result, its place in the image, about the image's centre.

    Args:
        ops: [...] int64, warps or other operations, for which the result is the identity. signs: [...], 1 or -1.

    Returns:
        [..., 2, 3] float32, affine maps of coordinates in [-1, 1] (the centres of the outermost pixels), x before y.
    """
    angle = math.radians(_ROTATE_DEGREES * strength)
    offset = 2 * _TRANSLATE * strength * side / max(1, side - 1)
    # What does not change with the sign, and what does.
    even = torch.eye(2, 3).repeat(NUM_OPS, 1, 1)
    odd = torch.zeros(NUM_OPS, 2, 3)
    even[OPS.index("rotate")] *= math.cos(angle)
    for name, row, column, value in (
        ("rotate", 0, 1, -math.sin(angle)), ("rotate", 1, 0, math.sin(angle)), ("shear_x", 0, 1, -_SHEAR * strength),
        ("shear_y", 1, 0, -_SHEAR * strength), ("translate_x", 0, 2, -offset), ("translate_y", 1, 2, -offset),
    ):  # fmt: skip
        odd[OPS.index(name), row, column] = value
    return even[ops] + signs[..., None, None] * odd[ops]


def _warp(images: Tensor, warps: Tensor) -> Tensor:
    """Rotate, shear or translate each image about its centre, bilinearly, over mid-grey.

    Args:
        images: [n, C, S, S] in [0, 1]. warps: [n, 2, 3] of `_warps`.
    """
    line = torch.linspace(-1, 1, images.shape[-1], device=images.device)
    by_x, by_y, constant = warps[:, None, None].unbind(-1)  # [n, 1, 1, 2]
    grid = torch.addcmul(by_x * line[:, None] + constant, by_y, line[:, None, None])  # [n, S, S, 2]
    # Outside lies 0, so mid-grey has to be 0.
    return F.grid_sample(images - 0.5, grid, align_corners=True).add_(0.5).clamp_(0, 1)
