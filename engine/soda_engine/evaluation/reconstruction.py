"""Reconstruction: images through the bottleneck and back, and how near they come in PSNR and SSIM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from soda_engine.data.views import plain_view

if TYPE_CHECKING:
    from soda_engine.models.soda import Soda

SSIM_RADIUS, SSIM_SIGMA = 5, 1.5
"""The usual SSIM window: a Gaussian of sigma 1.5 cut at 5 pixels, 11 wide (Wang et al. 2004)."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Images and what the model made of them, on the CPU."""

    target: Tensor
    """[N, C, S, S] float32 in [-1, 1], at the denoiser's size."""
    reconstruction: Tensor
    """Like `target`."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionScores:
    """PSNR in dB and SSIM, each an image and its mean over images."""

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    mean_psnr: float
    """Mean over images of their PSNR (not the PSNR of the mean error)."""
    mean_ssim: float
    ssim_window: int
    """Side in pixels of the SSIM window that was used."""


# Not inference mode: a model may keep a table that it moves to its device here, and train with it later.
@torch.no_grad()
def reconstruct(
    model: Soda,
    images: Tensor,
    *,
    batch_size: int = 64,
    seed: int = 0,
    sample_ids: Sequence[int] | Tensor | None = None,
    progress: bool = False,
    **sample_options: Any,
) -> Reconstruction:
    """Encode images and sample them again from z alone.

    Args:
        model: the model.
        images: [N, C, H, W], uint8 or float in [-1, 1], of any size.
        batch_size: images sampled together; it changes speed and memory, not what noise an image gets.
        seed: of the sampler's noise.
        sample_ids: [N] ids that key the noise; None: 0 … N − 1.
        progress: show a bar.
        **sample_options: passed on to `Soda.sample`, such as num_steps=50 or cfg_scale=1.5.

    Returns:
        The images resized to the denoiser's size, and their reconstructions.

    Raises:
        ValueError: `images` is not a batch of at least one image, or `sample_ids` has another length.
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images has shape {tuple(images.shape)}; it must be [N, C, H, W] with N of at least 1")
    ids = torch.arange(len(images)) if sample_ids is None else torch.as_tensor(sample_ids, dtype=torch.int64).cpu()
    if ids.shape != (len(images),):
        raise ValueError(f"sample_ids has shape {tuple(ids.shape)}; there are {len(images)} images")
    device = next(model.parameters()).device
    targets, reconstructions = [], []
    with tqdm(total=len(images), unit="img", desc="reconstruct", disable=not progress) as bar:
        for batch, batch_ids in zip(images.split(batch_size), ids.split(batch_size), strict=True):
            batch = batch.to(device)
            z = model.encode(batch)
            sampled = model.sample(z, seed=seed, sample_ids=batch_ids.to(device), **sample_options)
            targets.append(plain_view(batch, model.config.denoiser.image_size).float().cpu())
            reconstructions.append(sampled.float().clamp(-1, 1).cpu())
            bar.update(len(batch))
    return Reconstruction(target=torch.cat(targets), reconstruction=torch.cat(reconstructions))


def score(target: Tensor, reconstruction: Tensor, *, batch_size: int = 256) -> ReconstructionScores:
    """Measure PSNR and SSIM of each image on [0, 1], by torchmetrics.

    The SSIM window is the usual Gaussian 11 pixels wide with sigma 1.5. On images of less than 11 pixels a side it is
    the widest odd window that fits, with sigma in the same proportion (7 pixels and 0.9 on 8x8 digits), since an
    11-pixel window would see mostly mirrored borders. 16x16 images have the usual one. Values with different windows
    are not to be compared.

    Args:
        target: [N, C, H, W] in [-1, 1].
        reconstruction: like `target`.
        batch_size: images measured at a time.

    Returns:
        Scores an image and their means; two equal images have infinite PSNR.

    Raises:
        ValueError: the shapes differ, there is no image, or a side is less than 3 pixels.
    """
    if target.shape != reconstruction.shape:
        raise ValueError(f"reconstruction has shape {tuple(reconstruction.shape)}; target has {tuple(target.shape)}")
    if target.ndim != 4 or not len(target) or min(target.shape[-2:]) < 3:
        raise ValueError(f"target has shape {tuple(target.shape)}; it must be [N, C, H, W], N > 0, sides of 3 or more")
    # torchmetrics takes two seconds to import, which a command that measures nothing need not wait for.
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    radius = min(SSIM_RADIUS, (min(target.shape[-2:]) - 1) // 2)
    window = 2 * radius + 1
    psnr: list[float] = []
    ssim: list[float] = []
    for batch in zip(target.split(batch_size), reconstruction.split(batch_size), strict=True):
        wanted, made = ((images.float().clamp(-1, 1) + 1) / 2 for images in batch)
        decibels = peak_signal_noise_ratio(made, wanted, data_range=1.0, reduction="none", dim=(1, 2, 3))
        similarity = structural_similarity_index_measure(
            made,
            wanted,
            sigma=SSIM_SIGMA * radius / SSIM_RADIUS,
            kernel_size=window,
            data_range=1.0,
            reduction="none",
        )
        assert isinstance(similarity, Tensor)  # a pair only where the full image is asked for
        psnr.extend(decibels.reshape(-1).tolist())
        ssim.extend(similarity.reshape(-1).tolist())
    return ReconstructionScores(
        psnr=tuple(psnr),
        ssim=tuple(ssim),
        mean_psnr=sum(psnr) / len(psnr),
        mean_ssim=sum(ssim) / len(ssim),
        ssim_window=window,
    )
