"""How z and the time step reach the denoiser: the sections of z, which block each modulates, masks, time embedding.

The latent z of length d is cut into m + 1 sections. Section i modulates the blocks of the down path and of the up path
that mirror one another; the last section modulates the middle. In training some sections are zeroed, so that the
denoiser can later be guided by any subset of them.

Reference: Hudson et al. 2023 (arXiv 2311.17901), layer modulation and layer masking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soda_engine.config import DenoiserConfig
from soda_kernels import philox_uniform

# A sinusoidal embedding tells apart inputs about one radian away: t in [0, 1] is stretched to this range first.
TIME_RANGE = 1000.0
_MAX_PERIOD = 10000.0

Modulation: TypeAlias = tuple[Tensor, Tensor]
"""Scale and shift of each channel of each sample, [N, C] both."""


@dataclass(frozen=True, kw_only=True)
class SectionMap:
    """Which section of z modulates each residual block."""

    names: tuple[str, ...]
    """One name a section; the last is "middle", which modulates the middle blocks."""
    down: tuple[int, ...]
    """The section of each residual block of the down path, in the order they run."""
    up: tuple[int, ...]
    """The section of each residual block of the up path, in the order they run."""


def build_section_map(config: DenoiserConfig, pairing: str) -> SectionMap:
    """Pair the blocks of the down and the up path with sections of z.

    "level": section l modulates every block of resolution level l; a resampling block between levels l and l + 1
    counts to the finer one, l, on both paths.

    "block": section i modulates the i-th residual block of the down path, resampling ones included. A block of the up
    path has the section of the down block whose output it takes as its skip: where a plain convolution made that skip,
    the block before the convolution, or the first block for the input convolution. An upsampling block has the section
    of the downsampling block between the same two levels.

    Args:
        config: the denoiser's levels, blocks a level and way of resampling.
        pairing: "level" or "block".

    Returns:
        The map, with num_levels + 1 sections for "level" and one more than the blocks of the down path for "block".

    Raises:
        ValueError: `pairing` is neither.
    """
    if pairing not in ("level", "block"):
        raise ValueError(f"pairing is {pairing!r}; it must be 'level' or 'block'")
    by_level, num_levels = pairing == "level", len(config.multipliers)
    down: list[int] = []
    skips = [0]  # the section of the block that made each skip
    between: list[int] = []  # the section of the resampling between level l and l + 1
    for level in range(num_levels):
        for _ in range(config.blocks):
            down.append(level if by_level else len(down))
            skips.append(down[-1])
        if level < num_levels - 1:
            if config.resample_in_block:
                down.append(level if by_level else len(down))
            skips.append(down[-1])
            between.append(down[-1])
    num_paired = num_levels if by_level else len(down)
    up: list[int] = []
    for level in reversed(range(num_levels)):
        for _ in range(config.blocks + 1):
            skip = skips.pop()
            up.append(level if by_level else skip)
        if level > 0 and config.resample_in_block:
            up.append(between[level - 1])
    names = (*(f"{pairing}{index}" for index in range(num_paired)), "middle")
    return SectionMap(names=names, down=tuple(down), up=tuple(up))


def section_slices(dim: int, num_sections: int) -> tuple[slice, ...]:
    """Cut `dim` numbers into equal sections, the remainder going to the last one.

    Raises:
        ValueError: there are more sections than numbers.
    """
    if num_sections < 1 or dim < num_sections:
        raise ValueError(f"latent dim is {dim}; it must be at least the number of sections, {num_sections}")
    size = dim // num_sections
    starts = [index * size for index in range(num_sections)] + [dim]
    return tuple(slice(start, end) for start, end in zip(starts[:-1], starts[1:], strict=True))


def section_indices(sections: Sequence[str | int] | range, names: Sequence[str]) -> list[int]:
    """Turn names or indices of sections into indices.

    Raises:
        ValueError: one is neither a name nor an index in [0, len(names)), or a single name came instead of a list.
    """
    if isinstance(sections, str):
        raise ValueError(f"sections is {sections!r}; it must be a list, such as [{sections!r}]")
    indices = []
    for section in sections:
        if isinstance(section, str) and section in names:
            indices.append(list(names).index(section))
        elif isinstance(section, int) and not isinstance(section, bool) and 0 <= section < len(names):
            indices.append(section)
        else:
            raise ValueError(f"section {section!r} does not exist; it must be one of {list(names)} or its index")
    return indices


def draw_section_mask(
    num_sections: int,
    drop_all: float,
    drop_section: float,
    *,
    seed: int | Tensor,
    sample_ids: Tensor,
    step: int | Tensor,
) -> Tensor:
    """Draw which sections of z are kept: none with probability `drop_all`, else each with 1 - `drop_section`.

    A sample's mask depends on (seed, sample id, step) alone, not on the batch it is in.

    Args:
        num_sections: m + 1.
        drop_all, drop_section: in [0, 1].
        seed: an int or a 0-d tensor.
        sample_ids: [N] integers.
        step: an int, a 0-d or an [N] integer tensor.

    Returns:
        [N, m + 1] in fp32 on sample_ids' device, 1 for kept and 0 for zeroed.

    Raises:
        ValueError: a probability is outside [0, 1].
    """
    for name, value in (("drop_all", drop_all), ("drop_section", drop_section)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value}; it must be in [0, 1]")
    shape = (len(sample_ids), num_sections + 1)
    draws = philox_uniform(
        shape, seed=seed, sample_ids=sample_ids, step=step, stream="mask", device=sample_ids.device
    )  # [N, m + 2]: the first decides for the whole of z
    return ((draws[:, :1] >= drop_all) & (draws[:, 1:] >= drop_section)).float()


def mask_sections(z: Tensor, mask: Tensor, slices: Sequence[slice]) -> Tensor:
    """Multiply each section of z by its entry of the mask.

    Args:
        z: [N, d].
        mask: [m + 1], [1, m + 1] or [N, m + 1], 1 for kept and 0 for zeroed.
        slices: of `section_slices`.

    Returns:
        [N, d] in z's dtype.

    Raises:
        ValueError: the mask has another shape.
    """
    rows = mask.reshape(1, -1) if mask.ndim == 1 else mask
    if rows.ndim != 2 or rows.shape[1] != len(slices) or rows.shape[0] not in (1, z.shape[0]):
        raise ValueError(
            f"section_mask has shape {tuple(mask.shape)}; "
            f"it must be ({len(slices)},), (1, {len(slices)}) or ({z.shape[0]}, {len(slices)})"
        )
    rows = rows.to(z.dtype)
    return torch.cat([z[:, cut] * rows[:, index : index + 1] for index, cut in enumerate(slices)], dim=1)


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Embed times as [cos(1000 t w_i), sin(1000 t w_i)] with w_i = 10000^(-i / (dim / 2)).

    The times are stretched to [0, 1000] because on [0, 1] itself no angle would exceed one radian and most would stay
    near 0: nearly every channel would be constant, and the network would hardly see the time.

    Args:
        t: [N] in [0, 1].
        dim: even.

    Returns:
        [N, dim] in fp32.

    Reference:
        Vaswani et al. 2017, section 3.5.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = TIME_RANGE * t.float()[:, None] * torch.exp(-math.log(_MAX_PERIOD) * exponents)  # [N, half]
    return torch.cat((angles.cos(), angles.sin()), dim=1)


class TimeEmbedding(nn.Module):
    """Turn t in [0, 1] into the vector that every block projects: silu(W2 silu(W1 sinusoids(1000 t) + b1) + b2).

    Args:
        channels: width of the sinusoids, rounded up to even.
        dim: width of the result.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.channels = channels + channels % 2
        self.fc1 = nn.Linear(self.channels, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        """[N] -> [N, dim]."""
        embedding = sinusoidal_embedding(t, self.channels).to(self.fc1.weight.dtype)
        return F.silu(self.fc2(F.silu(self.fc1(embedding))))
