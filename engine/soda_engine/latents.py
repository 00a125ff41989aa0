"""Editing in the space of z: between two images, sections of one in the other, and along directions found by PCA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from soda_engine.models.modulation import section_indices
from soda_kernels import philox_normal


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Principal directions of a set of latents, widest first."""

    mean: Tensor
    """[d]"""
    components: Tensor
    """[k, d], orthonormal rows."""
    stddevs: Tensor
    """[k]; standard deviation of the latents along each row."""
    variance_shares: Tensor
    """[k]; share of the whole variance along each row."""


def interpolate(
    z_a: Tensor, z_b: Tensor, num_steps: int, *, method: Literal["linear", "spherical"] = "linear"
) -> Tensor:
    """Walk from z_a to z_b in equal steps, both ends included.

    linear: (1 − w)·z_a + w·z_b. spherical: the direction turns along the great circle at constant speed, and the length
    goes linearly from that of z_a to that of z_b.

    Args:
        z_a: [..., d].
        z_b: like z_a.
        num_steps: at least 2.
        method: linear, or spherical where lengths should not shrink on the way.

    Returns:
        [..., num_steps, d].

    Raises:
        ValueError: the shapes differ, `num_steps` is below 2, `method` is unknown, or, for spherical, a latent is zero
            or z_b points against z_a, so that no shortest arc is defined.

    Reference: Shoemake 1985, "Animating rotation with quaternion curves", for the spherical formula.
    """
    if z_a.shape != z_b.shape:
        raise ValueError(f"z_b has shape {tuple(z_b.shape)}; z_a has {tuple(z_a.shape)}")
    if num_steps < 2:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 2, for both ends")
    if method not in ("linear", "spherical"):
        raise ValueError(f"method is {method!r}; it must be 'linear' or 'spherical'")
    w = torch.linspace(0, 1, num_steps, dtype=z_a.dtype, device=z_a.device)[:, None]  # [steps, 1]
    z_a, z_b = z_a.unsqueeze(-2), z_b.unsqueeze(-2)  # [..., 1, d]
    if method == "linear":
        return (1 - w) * z_a + w * z_b
    length_a, length_b = z_a.norm(dim=-1, keepdim=True), z_b.norm(dim=-1, keepdim=True)
    if not bool((length_a > 0).all() and (length_b > 0).all()):
        raise ValueError("a latent is zero and has no direction; use method='linear'")
    unit_a, unit_b = z_a / length_a, z_b / length_b
    # Twice the angle between a unit vector and the bisector: exact for small angles, where acos of a cosine is not.
    angle = 2 * torch.atan2((unit_a - unit_b).norm(dim=-1, keepdim=True), (unit_a + unit_b).norm(dim=-1, keepdim=True))
    if bool((torch.pi - angle < 1e-3).any()):
        raise ValueError("z_b points against z_a, so no shortest arc joins them; use method='linear'")
    near = angle < 1e-4
    safe = torch.where(near, torch.ones_like(angle), angle)
    weight_a = torch.where(near, 1 - w, torch.sin((1 - w) * safe) / torch.sin(safe))
    weight_b = torch.where(near, w, torch.sin(w * safe) / torch.sin(safe))
    return (weight_a * unit_a + weight_b * unit_b) * ((1 - w) * length_a + w * length_b)


def mix_sections(
    z_a: Tensor,
    z_b: Tensor,
    sections: Sequence[int | str],
    *,
    section_slices: Sequence[slice],
    section_names: Sequence[str],
) -> Tensor:
    """Put the given sections of z_b into z_a.

    Args:
        z_a: [..., d].
        z_b: like z_a.
        sections: indices or names of the sections to take from z_b; the others stay those of z_a.
        section_slices: where each section lies in z: `Soda.section_slices`.
        section_names: what each section is called: `Soda.section_names`.

    Returns:
        [..., d], a new tensor.

    Raises:
        ValueError: the shapes differ, or there is no such section.
    """
    if z_a.shape != z_b.shape:
        raise ValueError(f"z_b has shape {tuple(z_b.shape)}; z_a has {tuple(z_a.shape)}")
    mixed = z_a.clone()
    for index in section_indices(sections, section_names):
        mixed[..., section_slices[index]] = z_b[..., section_slices[index]]
    return mixed


def principal_directions(z: Tensor, num_directions: int) -> Directions:
    """Find the directions along which latents vary most: eigenvectors of their covariance, computed in fp64.

    The sign of a direction is chosen so that its largest coordinate in size is positive.

    Args:
        z: [N, d], N of at least 2.
        num_directions: k, at most min(N − 1, d).

    Returns:
        The directions, in the dtype of z and on its device.

    Raises:
        ValueError: z is not a matrix of at least two finite rows, or has no k directions.
    """
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"z has shape {tuple(z.shape)}; it must be [N, d] with N of at least 2")
    most = min(len(z) - 1, z.shape[1])
    if not 1 <= num_directions <= most:
        raise ValueError(f"num_directions is {num_directions}; {len(z)} latents of {z.shape[1]} dims have 1 to {most}")
    if not bool(torch.isfinite(z).all()):
        raise ValueError("z has NaN or infinite values; encode again or drop those rows")
    exact = z.double()
    mean = exact.mean(dim=0)
    variances, vectors = torch.linalg.eigh((exact - mean).T @ (exact - mean) / (len(z) - 1))  # ascending
    variances = variances.clamp(min=0)
    top = variances.flip(0)[:num_directions]
    components = vectors.T.flip(0)[:num_directions]  # [k, d]
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    components = components * largest.sign()
    return Directions(
        mean=mean.to(z.dtype),
        components=components.to(z.dtype),
        stddevs=top.sqrt().to(z.dtype),
        variance_shares=(top / variances.sum().clamp(min=torch.finfo(torch.float64).tiny)).to(z.dtype),
    )


def traverse(
    z: Tensor, directions: Directions, index: int, amounts: Sequence[float] = (-3, -2, -1, 0, 1, 2, 3)
) -> Tensor:
    """Move latents along one principal direction: z + amount · stddev · direction.

    Args:
        z: [..., d].
        directions: what `principal_directions` found.
        index: which direction, 0 the widest.
        amounts: how far, in standard deviations of the latents along it.

    Returns:
        [..., len(amounts), d].

    Raises:
        ValueError: there is no such direction, or z has other dims.
    """
    if not 0 <= index < len(directions.components):
        raise ValueError(f"index is {index}; there are directions 0 to {len(directions.components) - 1}")
    if z.shape[-1] != len(directions.mean):
        raise ValueError(f"z has {z.shape[-1]} dims; the directions have {len(directions.mean)}")
    step = (directions.stddevs[index] * directions.components[index]).to(z)
    return z.unsqueeze(-2) + torch.tensor(amounts, dtype=z.dtype, device=z.device)[:, None] * step


def gaussian_latents(z: Tensor, num_samples: int, *, seed: int = 0) -> Tensor:
    """Draw latents from the Gaussian with the mean and covariance of given ones: a simple prior of ours.

    Args:
        z: [N, d], N of at least 2.
        num_samples: how many to draw.
        seed: keys the draws.

    Returns:
        [num_samples, d], in the dtype of z and on its device.

    Raises:
        ValueError: z is not a matrix of at least two finite rows.
    """
    directions = principal_directions(z, min(len(z) - 1, z.shape[1]))
    shape = (num_samples, len(directions.stddevs))
    draws = philox_normal(shape, seed=seed, sample_ids=range(num_samples), stream="noise").to(z)
    return directions.mean + (draws * directions.stddevs) @ directions.components
