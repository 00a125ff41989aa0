"""Pictures of what z holds: reconstructions, interpolations, mixed sections, directions, variations, samples.

Each function encodes or takes latents, samples, and writes one PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soda_engine.data.views import plain_view
from soda_engine.evaluation.pictures import image_grid, labelled_rows, traversal_grid
from soda_engine.evaluation.reconstruction import ReconstructionScores, reconstruct, score
from soda_engine.latents import gaussian_latents, interpolate, mix_sections, principal_directions, traverse
from soda_engine.models.soda import Soda


@dataclass(frozen=True, kw_only=True)
class DrawnReconstruction:
    """Where a picture of reconstructions lies, and how close they are."""

    path: Path
    scores: ReconstructionScores


def draw_reconstructions(
    model: Soda, images: Tensor, path: Path, *, title: str | None = None, **sampling: Any
) -> DrawnReconstruction:
    """Draw images above what the model makes of their z alone.

    Args:
        model: the model. images: [N, C, H, W] uint8 or floats in [-1, 1]. path: the PNG. title: a line above.
        sampling: options of `Soda.sample`.
    """
    result = reconstruct(model, images, **sampling)
    labelled_rows([("image", result.target), ("from z", result.reconstruction)], path, title=title)
    return DrawnReconstruction(path=path, scores=score(result.target, result.reconstruction))


def draw_interpolations(
    model: Soda, images_a: Tensor, images_b: Tensor, path: Path, *, walk_length: int = 9, interpolation: Any = "linear",
    **sampling: Any,
) -> Path:  # fmt: skip
    """Draw a row for each pair of images: the walk from one z to the other, every image from the same noise.

    Args:
        model: the model. images_a, images_b: [N, C, H, W] uint8 or floats in [-1, 1]. path: the PNG.
        walk_length: images a walk, both ends included. interpolation: "linear" or "spherical".
        sampling: options of `Soda.sample`.
    """
    walks = interpolate(model.encode(images_a), model.encode(images_b), walk_length, method=interpolation)
    images = _sample_rows(model, walks, **sampling)
    rows = torch.cat((_shown(model, images_a)[:, None], images, _shown(model, images_b)[:, None]), dim=1)
    labels = ["image", *(f"{step / (walk_length - 1):.2g}" for step in range(walk_length)), "image"]
    return labelled_rows([("", row) for row in rows], path, column_labels=labels)


def draw_mixes(
    model: Soda, images_a: Tensor, images_b: Tensor, path: Path, *, sections: Sequence[str | int] | None = None,
    **sampling: Any,
) -> Path:  # fmt: skip
    """Draw images a and b, and a with sections of b's z: each section alone, or the given ones together."""
    z_a, z_b = model.encode(images_a), model.encode(images_b)
    chosen = [[name] for name in model.section_names] if sections is None else [list(sections)]
    latents = [("a from z", z_a)]
    for part in chosen:
        mixed = mix_sections(z_a, z_b, part, section_slices=model.section_slices, section_names=model.section_names)
        label = " + ".join(name if isinstance(name, str) else model.section_names[name] for name in part)
        latents.append((f"a, {label} of b", mixed))
    latents.append(("b from z", z_b))
    sampled = [(label, _sample_rows(model, z[:, None], **sampling)[:, 0]) for label, z in latents]
    return labelled_rows([("a", _shown(model, images_a)), *sampled, ("b", _shown(model, images_b))], path)


def draw_traversals(
    model: Soda, images: Tensor, latents: Tensor, path: Path, *, num_directions: int = 6,
    amounts: Sequence[float] = (-3, -2, -1, 0, 1, 2, 3), **sampling: Any,
) -> Path:  # fmt: skip
    """Draw each image moved along the widest principal directions of many latents [M, d]: a row a direction."""
    z = model.encode(images)
    directions = principal_directions(latents.to(z), num_directions)
    walks = torch.cat([traverse(z, directions, index, amounts) for index in range(num_directions)])
    shares = directions.variance_shares.tolist()
    labels = [f"{index + 1} ({share:.0%})" for index, share in enumerate(shares) for _ in range(len(z))]
    return traversal_grid(_sample_rows(model, walks, **sampling), path, amounts=list(amounts), row_labels=labels)


def draw_variations(model: Soda, images: Tensor, num_variations: int, path: Path, **sampling: Any) -> Path:
    """Draw each image above samples of its z from different noise: what z leaves open."""
    z, seed = model.encode(images), sampling.pop("seed", 0)
    rows = [("image", _shown(model, images))]
    for index in range(num_variations):
        rows.append((f"noise {index + 1}", model.sample(z, seed=seed + index, **sampling)))
    return labelled_rows(rows, path)


def draw_samples(model: Soda, latents: Tensor, num_samples: int, path: Path, *, seed: int = 0, **sampling: Any) -> Path:
    """Draw samples for z from a Gaussian fitted to many latents [M, d]; SODA itself has no prior over z."""
    z = gaussian_latents(latents.to(model.device), num_samples, seed=seed)
    return image_grid(model.sample(z, seed=seed, **sampling), path)


def _sample_rows(model: Soda, z: Tensor, **sampling: Any) -> Tensor:
    """Sample [rows, columns, d] latents; the images of a row start from the same noise."""
    rows, columns, _ = z.shape
    ids = torch.arange(rows, device=z.device).repeat_interleave(columns)
    return model.sample(z.flatten(0, 1), sample_ids=ids, **sampling).unflatten(0, (rows, columns))


def _shown(model: Soda, images: Tensor) -> Tensor:
    """Bring images to the size at which the model draws."""
    return plain_view(images.to(model.device), model.config.denoiser.image_size)
