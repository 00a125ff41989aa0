"""Random views of images: the augmentations that make a source and a target of one image.

Every draw comes from the counter generator, keyed by (seed, sample id, epoch, role), so a sample's view is the same in
any batch, on any number of processes and after a resume. All work is batched on the images' device, with per-sample
parameters: crop, flip and resize are two matrix products a sample, RandAugment runs each operation on the samples that
drew it.

Reference: Hudson et al., "SODA: Bottleneck Diffusion Models for Representation Learning", 2023 (arXiv 2311.17901).
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from soda_engine.config import PipelineConfig, ViewsConfig
from soda_engine.data.randaugment import NUM_OPS, on_device, randaugment
from soda_kernels import philox_normal, philox_uniform

Role = Literal["source", "target"]

_ROLES = {"source": 0, "target": 1}

# Columns of a sample's uniform numbers; two for each RandAugment operation follow.
_CROP, _AREA, _RATIO, _TOP, _LEFT, _FLIP, _AUGMENT, _NUM_DRAWS = range(8)

_CLASSIFICATION = PipelineConfig(crop_probability=0.95, flip_probability=0.5, randaugment_probability=0.65)
_LIGHT = PipelineConfig(crop_probability=0.95, crop_scale=(0.7, 1.0), crop_ratio=(0.9, 1.1))
_PRESETS = {
    "classification": ViewsConfig(source=dataclasses.replace(_CLASSIFICATION, noise_std=0.1), target=_CLASSIFICATION),
    "reconstruction": ViewsConfig(source=dataclasses.replace(_CLASSIFICATION, noise_std=0.1)),
    "light": ViewsConfig(source=dataclasses.replace(_LIGHT, noise_std=0.05)),
}


def views_preset(name: str) -> ViewsConfig:
    """Return a named pair of pipelines.

    classification: the paper's source and target augmentation; reconstruction: the same source and a plainly resized
    target; light: gentle crops and little noise on the source, without flips and colour, and a plainly resized target,
    for digits and other small pictures whose meaning a strong augmentation would change.

    Raises:
        ValueError: no preset has this name.
    """
    if name not in _PRESETS:
        raise ValueError(f"views preset is {name!r}; it must be one of {sorted(_PRESETS)}")
    return _PRESETS[name]


@torch.no_grad()
def make_view(
    images: Tensor,
    pipeline: PipelineConfig,
    size: int,
    *,
    seed: int,
    sample_ids: Tensor,
    epochs: Tensor,
    role: Role,
    noise: bool = True,
) -> Tensor:
    """Draw one view of each image: random resized crop and flip, RandAugment, then noise in [-1, 1] units.

    The crop's area share is uniform in `crop_scale` and the logarithm of its ratio uniform in the part of `crop_ratio`
    that keeps the crop inside the image, so nothing is drawn twice. For images on a GPU, ids in main memory make all of
    it run without a wait: the parameters are then drawn on the host, which needs to know them for RandAugment.

    Args:
        images: [N, C, S, S] uint8, C of 1 or 3.
        pipeline: what is drawn, and how strongly.
        size: side of the view in pixels.
        seed: the run's seed.
        sample_ids: [N] int64 on the images' device, or on the CPU.
        epochs: [N] int64, where `sample_ids` is.
        role: source and target draw independent parameters.
        noise: False leaves the noise out, for a picture of what was drawn.

    Returns:
        [N, C, size, size] float32 in [-1, 1], plus noise of standard deviation `pipeline.noise_std`.

    Raises:
        ValueError, TypeError: an argument or a field of `pipeline` is none of the above.
    """
    _check_view(images, pipeline, size, sample_ids, epochs, role)
    # Two keys a role and epoch: one for the parameters, one for the noise.
    step = 4 * epochs + 2 * _ROLES[role]
    num_draws = _NUM_DRAWS + 2 * pipeline.randaugment_ops
    draws = philox_uniform((len(images), num_draws), seed=seed, sample_ids=sample_ids, step=step, stream="views")
    # Autocast, which some devices have not, would run the products below in bf16.
    device_type = images.device.type
    has_autocast = torch.amp.is_autocast_available(device_type)
    with torch.autocast(device_type, enabled=False) if has_autocast else contextlib.nullcontext():
        if pipeline.crop_probability or pipeline.flip_probability:
            top, left, height, width = on_device(torch.stack(_draw_crop(draws, pipeline)), images.device).unbind()
            flip = on_device(draws[:, _FLIP] < pipeline.flip_probability, images.device)
            view = _resample(images, top, left, height, width, flip, size).div_(127.5).sub_(1)
        else:
            view = plain_view(images, size)
        if pipeline.randaugment_probability:
            drawn = draws[:, _NUM_DRAWS:].unflatten(1, (pipeline.randaugment_ops, 2))
            ops = (drawn[..., 0] * NUM_OPS).long()
            ops[draws[:, _AUGMENT] >= pipeline.randaugment_probability] = 0
            strength = pipeline.randaugment_magnitude / 30
            view = randaugment(view.add_(1).div_(2), ops, drawn[..., 1] < 0.5, strength).mul_(2).sub_(1)
    if noise and pipeline.noise_std:
        ids, steps = on_device(torch.stack((sample_ids, step + 1)), images.device).unbind()
        view += pipeline.noise_std * philox_normal(
            tuple(view.shape), seed=seed, sample_ids=ids, step=steps, stream="views"
        )
    return view


def plain_view(images: Tensor, size: int) -> Tensor:
    """Resize images without augmentation: centre square, then an antialiased bilinear resize.

    Args:
        images: [N, C, H, W] uint8, or floating point in [-1, 1].
        size: side of the result in pixels.

    Returns:
        [N, C, size, size] float32 (or the floating dtype that came) in [-1, 1].

    Raises:
        ValueError, TypeError: `images` is not four-dimensional, or of another dtype.
    """
    if images.ndim != 4:
        raise ValueError(f"images has shape {tuple(images.shape)}; it must be [N, C, H, W]")
    if images.dtype == torch.uint8:
        images = images.float().div_(127.5).sub_(1)
    elif not images.is_floating_point():
        raise TypeError(f"images is {images.dtype}; it must be uint8 in 0..255 or floating point in [-1, 1]")
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[..., top : top + side, left : left + side]
    if side == size:
        return images
    # Antialiased weights are never negative, but their sum can miss 1 by an ulp.
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True).clamp(-1, 1)


def _draw_crop(draws: Tensor, pipeline: PipelineConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn uniform draws into crops (top, left, height, width), each [N] float64 in shares of the image's side."""
    # In float64, so that the ulp by which a logarithm may differ between a vector lane and a tail never shows.
    draws = draws.double()
    smallest, largest = pipeline.crop_scale
    area = smallest + (largest - smallest) * draws[:, _AREA]
    # A crop of sides sqrt(area ratio) and sqrt(area / ratio) fits where area <= ratio <= 1 / area.
    low = torch.maximum(torch.full_like(area, pipeline.crop_ratio[0]), area).minimum(1 / area).log()
    high = torch.minimum(torch.full_like(area, pipeline.crop_ratio[1]), 1 / area).maximum(area).log()
    root_ratio = ((low + (high - low) * draws[:, _RATIO]) / 2).exp()
    cropped = draws[:, _CROP] < pipeline.crop_probability
    height = torch.where(cropped, area.sqrt() / root_ratio, 1.0).clamp(max=1)
    width = torch.where(cropped, area.sqrt() * root_ratio, 1.0).clamp(max=1)
    return draws[:, _TOP] * (1 - height), draws[:, _LEFT] * (1 - width), height, width


def _resample(
    images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor, size: int
) -> Tensor:
    """Cut a box out of each image and resize it, in grey levels 0..255.

    The filter is that of `interpolate(mode="bilinear", antialias=True)` on the cut: a triangle as wide as two pixels of
    the coarser grid. Weights are multiples of 2^-10 and rows are rounded to 1/8 of a level between the two passes:
    every product and sum is then exact in fp32 (even from TF32 factors), so the result does not depend on the
    batch, the threads or the matrix library. What this costs is below the rounding to 8 bits of an image file.

    Args:
        images: [N, C, S, S] uint8. top, left, height, width: [N] float64 in shares of S. flip: [N] bool.

    Returns:
        [N, C, size, size] float32.
    """
    side = images.shape[-1]
    start, length = torch.cat((top, left)) * side, torch.cat((height, width)) * side
    flips = torch.cat((torch.zeros_like(flip), flip))
    rows, columns = _filter(start, length, flips, side, size).chunk(2)  # [N, size, S] each
    reduced = torch.matmul(rows[:, None], images.float()).mul_(8).round_().div_(8)  # [N, C, size, S]
    return torch.matmul(reduced, columns[:, None].transpose(-1, -2))


def _filter(start: Tensor, length: Tensor, flip: Tensor, side: int, size: int) -> Tensor:
    """Return the weights [N, size, side] float32 of each input pixel in each output pixel along one axis.

    Args:
        start, length: [N] float64, the cut in pixels. flip: [N] bool, reverse the output.
    """
    pixel = length / size  # of the output, in input pixels
    output = torch.arange(size, dtype=torch.float64, device=start.device)
    output = torch.where(flip[:, None], size - 1 - output, output)
    centre = start[:, None] + (output + 0.5) * pixel[:, None]  # [N, size]
    inputs = torch.arange(side, device=start.device) + 0.5
    # From here on in fp32, with the offsets taken where they are small.
    weight = (inputs - centre[..., None].float()).abs_().div_(pixel.clamp(min=1)[:, None, None].float())
    weight.neg_().add_(1).clamp_(min=0)
    # Pixels that the cut does not touch count for nothing, so that a crop never sees beyond its edges.
    touched = (inputs > start[:, None] - 0.5) & (inputs < (start + length)[:, None] + 0.5)
    weight.mul_(touched[:, None])
    steps = weight.mul_(1024 / weight.sum(-1, keepdim=True)).round_()
    # What the rounding lost or gained goes to the pixel under the centre, whose weight is the largest.
    nearest = centre.floor().long().clamp_(0, side - 1)[..., None]
    return steps.scatter_add_(-1, nearest, 1024 - steps.sum(-1, keepdim=True)).div_(1024)


def _check_view(
    images: Tensor, pipeline: PipelineConfig, size: int, sample_ids: Tensor, epochs: Tensor, role: str
) -> None:
    """Raise a clear line for what `make_view` does not accept."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images is {images.dtype}; it must be uint8")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3]:
        raise ValueError(f"images has shape {tuple(images.shape)}; it must be [N, C, S, S] with 1 or 3 channels")
    if size < 1:
        raise ValueError(f"size is {size}; it must be positive")
    if role not in _ROLES:
        raise ValueError(f"role is {role!r}; it must be one of {list(_ROLES)}")
    for name, ids in (("sample_ids", sample_ids), ("epochs", epochs)):
        if ids.shape != images.shape[:1] or ids.dtype != torch.int64:
            raise ValueError(f"{name} is {ids.dtype} of shape {tuple(ids.shape)}; it must be int64 [{len(images)}]")
    for name in ("crop_probability", "flip_probability", "randaugment_probability"):
        if not 0 <= getattr(pipeline, name) <= 1:
            raise ValueError(f"{name} is {getattr(pipeline, name)}; it must lie in [0, 1]")
    if not 0 < pipeline.crop_scale[0] <= pipeline.crop_scale[1] <= 1:
        raise ValueError(f"crop_scale is {pipeline.crop_scale}; it must be (low, high) with 0 < low <= high <= 1")
    if not 0 < pipeline.crop_ratio[0] <= pipeline.crop_ratio[1]:
        raise ValueError(f"crop_ratio is {pipeline.crop_ratio}; it must be (low, high) with 0 < low <= high")
    if not 0 <= pipeline.randaugment_magnitude <= 30:
        raise ValueError(f"randaugment_magnitude is {pipeline.randaugment_magnitude}; it must lie in 0..30")
    if pipeline.randaugment_ops < 0 or pipeline.noise_std < 0:
        name = "randaugment_ops" if pipeline.randaugment_ops < 0 else "noise_std"
        raise ValueError(f"{name} is {getattr(pipeline, name)}; it must not be negative")
