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
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_saturation_with_gray_subtraction,
    equalize,
    normalize_min_max,
    posterize,
    solarize,
)
from kornia.geometry.transform import warp_affine
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


def randaugment(images: Tensor, ops: Tensor, negative: Tensor, strength: float) -> Tensor:
    """Apply a sequence of operations to each image; `color` leaves a grey image as it is.

    Samples are grouped by operation with a sort, and the host has to know the sizes of the groups: it waits for the
    device once a call unless `ops` is in its own memory.

    Args:
        images: [N, C, S, S] float32 in [0, 1], C of 1 or 3; overwritten.
        ops: [N, K] int64, indices into `OPS` in the order in which they are applied; on the images' device or the CPU.
        negative: [N, K] bool, the sign of operations that have one; where `ops` is.
        strength: magnitude in [0, 1].

    Returns:
        [N, C, S, S] float32 in [0, 1].
    """
    groups = ops.clamp(max=_FIRST_WARP)
    order = groups.argsort(dim=0, stable=True)
    counts = (groups[..., None] == torch.arange(_FIRST_WARP + 1, device=ops.device)).sum(0).tolist()
    order, ops, negative = (on_device(tensor, images.device) for tensor in (order, ops, negative))
    for k, sizes in enumerate(counts):
        for group, chosen in enumerate(order[:, k].split(sizes)):
            if group == 0 or len(chosen) == 0:
                continue
            part, sign = images[chosen], 1 - 2 * negative[chosen, k].float()
            if group == _FIRST_WARP:
                part = _warp(part, ops[chosen, k], sign, strength)
            else:
                part = _COLOURS[OPS[group]](part, sign * strength)
            images.index_copy_(0, chosen, part)
    return images


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a small tensor on a device; if it comes from the host, through pinned memory, so that nothing waits."""
    if tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _autocontrast(images: Tensor, level: Tensor) -> Tensor:
    """Stretch each channel to [0, 1]; a constant channel has nothing to stretch and stays."""
    constant = images.amax((-2, -1), keepdim=True) == images.amin((-2, -1), keepdim=True)
    return torch.where(constant, images, normalize_min_max(images))


def _contrast(images: Tensor, level: Tensor) -> Tensor:
    """Move each value away from, or towards, the image's mean grey."""
    grey = rgb_to_grayscale(images) if images.shape[1] == 3 else images
    # Rows first: torch splits the sum of one large image over its threads, but not that of several, so that a mean over
    # both axes at once (as kornia takes it) would depend on the batch in its last bit.
    mean = grey.mean(-1, keepdim=True).mean(-2, keepdim=True)
    return (mean + (images - mean) * (1 + _ENHANCE * level)[:, None, None, None]).clamp_(0, 1)


def _sharpness(images: Tensor, level: Tensor) -> Tensor:
    """Move each inner value away from, or towards, a blur that weights the pixel 5 and its eight neighbours 1."""
    inner = images[..., 1:-1, 1:-1]
    # A pooled mean and not a convolution (which kornia uses): torch picks another algorithm for the convolution of a
    # single grey image than for that of several, with another last bit.
    blur = (9 * F.avg_pool2d(images, 3, stride=1) + 4 * inner) / 13
    sharp = (blur + (inner - blur) * (1 + _ENHANCE * level)[:, None, None, None]).clamp_(0, 1)
    images = images.clone()
    images[..., 1:-1, 1:-1] = sharp
    return images


def _posterize(images: Tensor, level: Tensor) -> Tensor:
    """Keep 8 to 4 bits of each value."""
    return posterize(images, (8 - (_POSTERIZE_BITS * level.abs()).round()).to(torch.int64))


# Each takes images [n, C, S, S] in [0, 1] and signed levels [n] in [-1, 1].
_COLOURS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": _autocontrast,
    "equalize": lambda images, level: equalize(images),
    "solarize": lambda images, level: solarize(images, 1 - level.abs()),
    "posterize": _posterize,
    "color": lambda images, level: adjust_saturation_with_gray_subtraction(images, 1 + _ENHANCE * level),
    "contrast": _contrast,
    "brightness": lambda images, level: adjust_brightness_accumulative(images, 1 + _ENHANCE * level),
    "sharpness": _sharpness,
}


def _warp(images: Tensor, ops: Tensor, sign: Tensor, strength: float) -> Tensor:
    """Rotate, shear or translate each image about its centre, bilinearly, over mid-grey.

    Args:
        images: [n, C, S, S] in [0, 1]. ops: [n] int64. sign: [n] float, 1 or -1.
    """
    side = images.shape[-1]

    def where(name: str, value: float) -> Tensor:
        return torch.where(ops == OPS.index(name), sign * value, 0.0)

    # The sine and cosine are Python's: one number a batch, the same for every sample but for the sign.
    angle = math.radians(_ROTATE_DEGREES * strength)
    sine = where("rotate", math.sin(angle))
    cosine = torch.where(ops == OPS.index("rotate"), math.cos(angle), 1.0)
    a, b = cosine, where("shear_x", _SHEAR * strength) + sine
    c, d = where("shear_y", _SHEAR * strength) - sine, cosine
    # The centre of the image stays where it is, up to the translation.
    centre = (side - 1) / 2
    x = where("translate_x", _TRANSLATE * strength * side) + centre * (1 - a - b)
    y = where("translate_y", _TRANSLATE * strength * side) + centre * (1 - c - d)
    matrix = torch.stack((torch.stack((a, b, x), -1), torch.stack((c, d, y), -1)), -2)  # [n, 2, 3]
    # Outside lies 0, so mid-grey has to be 0.
    return warp_affine(images - 0.5, matrix, (side, side), align_corners=True).add_(0.5).clamp_(0, 1)
