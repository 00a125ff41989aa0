"""How the images of noise-schedule sampling are laid over programs: the tiles of a problem, and which one to take."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from soda_kernels import _tuning

# Elements of a tile at the most and at the least, and how many programs a multiprocessor has to have before tiles grow.
# Fewer than 1024 would leave schedulers of a multiprocessor without a warp.
_MOST, _LEAST = 8192, 1024
# Of several channels where many registers are needed, and where moments from a launch before are merged: larger ones
# spill (compiled for sm_90 and sm_100).
_MOST_IN_MANY_REGISTERS = 4096
_PROGRAMS = 0.75
# Each program reads up to seven scalars in sectors of 32 bytes of their own, of what a tile of 1024 moves in bf16 up to
# 6%, of 8192 1%. Tiles stay so large that these are less than this share, though multiprocessors idle then. Estimated
# from compiled instructions (about 60 an element where noise is drawn, 128 a clock, 1.8 GHz, unmeasured), a program of
# 1024 elements takes 0.3 us, of 4096 1.1, and a launch 2 to 4: a single latent of SD 1.5 loses 0.3 to 0.8 us. A sample
# of CIFAR-10 is too small by itself: of its eps loss a program takes two, on 64 multiprocessors instead of 128, which
# loses 1.1 us. `candidates` has the smaller ones too.
_MOST_OF_SCALARS = 0.019
_SECTOR_BYTES, _SCALAR_BYTES = 32, 4
_MOST_SAMPLES = 2
_WIDEST = 64
# Of one channel a thread's fill an access of 16 bytes; of several, 8 spill in some tiles (compiled for sm_90).
_ELEMENTS_OF_A_THREAD = {False: 8, True: 4}
_MOST_WARPS = 32
# Of a sample that one program holds whole: the largest that do not spill on sm_80, sm_90, sm_100 and gfx942 (compiled).
# Where noise is drawn, elements of one channel and of several; where none is, they are taken as they lie in memory.
_MOST_OF_A_WHOLE = {False: 8192, True: 4096}
_MOST_OF_A_WHOLE_WITHOUT_NOISE = 16384
# To rescale guidance in larger samples, programs walk over a sample twice: all of it, then their part of its tiles.
# Either one program takes a sample, which moves the least bytes; or several share it, and each reads all of it from L2,
# but counted by programs up to 3.8 times the least; or a launch before takes moments. By estimates for an H200 from
# compiled instructions (not measured), 21 an element for the first walk and for the second 23 without noise, 35 of
# second order, 83 with noise and 117 of it in channels_last, one and several take, in us:
#     16 samples of 49152 elements, without noise      9.4  by 8 each  5.1
#     the same with noise, channels_last              22.2, 37.9       6.7, 8.9
#     32 samples of 16384 elements with noise          7.4,  9.9  by 4 3.0, 3.7
#     one such sample                                  7.4,  9.9  by 8 2.2, 2.6
# Unmeasured, one program takes a sample of up to so many elements, for the least bytes and one launch, beside a
# denoiser that takes milliseconds; `candidates` has the walks by several. Of larger samples it does where a sample's
# elements times the share of multiprocessors that are idle in the last wave are no more than the first number, which
# takes no longer than a launch before.
_MOST_IDLE_ELEMENTS = 8192
_MOST_ALONE = 49152
_TILE_OF_A_PART = 2048


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What the choice of a tile depends on."""

    kernel: str
    """The launch that goes over images, and what it does."""
    batch: int
    positions: int
    channels: int
    """1 where elements are taken as they lie in memory: all of a sample is one channel then."""
    element_bytes: tuple[int, ...]
    """The sizes that elements of images have."""
    draws: bool = True
    """Whether noise is drawn, for which registers are needed."""
    whole: bool = False
    """Whether moments of whole samples are needed: by a program that holds one or walks over it, if there is a way."""
    many_registers: bool = False
    """Whether the kernel needs more than others: a sampler's step, or v's loss where it writes a gradient."""

    moved: int = 1
    """Bytes of images, read and written, for each of their elements."""
    scalars: int = 0
    """Sectors of scalars that every program reads or writes beside them."""
    scalars_of_a_sample: int = 0
    """Those that a sample needs once, however many tiles it has."""
    sums: bool = False
    """Whether tiles of a sample are summed: one program may take several small samples then."""

    @property
    def key(self) -> str:
        """Name the problem in a table of tuned configs; batches within a factor of two share an entry."""
        bits = "+".join(str(8 * size) for size in self.element_bytes)
        shape = f"n{_tuning.power_of_two(self.batch)}-c{self.channels}-p{self.positions}"
        return f"{self.kernel}-{bits}bit-{shape}"


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """A launch config."""

    variant: ClassVar[str] = "tiles"

    positions: int
    """A multiple of four."""
    channels: int
    num_warps: int
    walkers: int = 0
    """Programs of a sample, each of which walks over all of it first, or 0 where each program has one tile."""
    samples: int = 1
    """Of a loss whose tile holds a sample: those that a program takes in turn, where they divide the batch."""


def choose(problem: Problem, device: torch.device) -> TileConfig:
    """Return the tile that was tuned for the problem on this GPU, or the heuristic's."""
    tuned = _tuning.look_up("diffusion", problem.key, device)
    return TileConfig(**tuned) if tuned else heuristic(problem, _tuning.num_multiprocessors(device))


def heuristic(problem: Problem, num_multiprocessors: int = 132) -> TileConfig:
    """Return the tile to take unmeasured.

    It is a whole sample if that is wanted and can be, or a walk over one; else as large as leaves programs enough, or
    larger so that scalars are few beside it, and wide enough to fill sectors.
    """
    if problem.whole:
        whole = _whole_sample(problem) or _walk(problem, num_multiprocessors)
        if whole is not None:
            return whole
    width, size = _width(problem), _MOST_IN_MANY_REGISTERS if problem.whole else _most(problem)
    while size > _LEAST and _programs(problem, _tile_of(problem, size, width)) < _PROGRAMS * num_multiprocessors:
        if _share_of_scalars(problem, _tile_of(problem, size // 2, width)) > _MOST_OF_SCALARS:
            break
        size //= 2
    tile = _tile_of(problem, size, width)
    few = _share_of_scalars(problem, tile) <= _MOST_OF_SCALARS
    return tile if few or not _takes_several(problem, tile) else dataclasses.replace(tile, samples=_MOST_SAMPLES)


def candidates(problem: Problem) -> Iterator[TileConfig]:
    """Yield the tiles that are worth a measurement; some may need more registers than there are."""
    widest = _width(problem)
    widths = [width for width in (16, 32) if width < widest] + [widest]
    sizes = [_LEAST // 2 << power for power in range(5)]
    tiles = [_tile_of(problem, *each) for each in itertools.product(sizes, widths, (4, 8, 16))]
    tiles += [dataclasses.replace(tile, samples=_MOST_SAMPLES) for tile in tiles if _takes_several(problem, tile)]
    if problem.whole:
        whole = _whole_sample(problem)
        tiles += [whole] if whole else [_walking(problem, 1 << power) for power in range(7)]
    yield from dict.fromkeys(tiles)


def _width(problem: Problem) -> int:
    return min(_tuning.power_of_two(problem.channels), _WIDEST)


def _most(problem: Problem) -> int:
    return _MOST_IN_MANY_REGISTERS if problem.many_registers and problem.channels > 1 else _MOST


def _programs(problem: Problem, tile: TileConfig) -> int:
    tiles = math.ceil(problem.positions / tile.positions) * math.ceil(problem.channels / tile.channels)
    return problem.batch * tiles


def _share_of_scalars(problem: Problem, tile: TileConfig) -> float:
    """Return how much sectors of scalars add to the least bytes of a sample, its images and the scalars themselves."""
    sectors = problem.scalars * _programs(problem, tile) // problem.batch + problem.scalars_of_a_sample
    least = problem.positions * problem.channels * problem.moved
    return (_SECTOR_BYTES * sectors - _SCALAR_BYTES * (problem.scalars + problem.scalars_of_a_sample)) / least


def _takes_several(problem: Problem, tile: TileConfig) -> bool:
    """Whether a program may take several samples: of a sum, where its tile holds one and they divide the batch."""
    return problem.sums and _programs(problem, tile) == problem.batch and problem.batch % _MOST_SAMPLES == 0


def _whole_sample(problem: Problem) -> TileConfig | None:
    """Return a tile that holds a whole sample in registers, or None where a sample is too large for that."""
    rows, width = max(4, _tuning.power_of_two(problem.positions)), _tuning.power_of_two(problem.channels)
    most = _MOST_OF_A_WHOLE[problem.channels > 1] if problem.draws else _MOST_OF_A_WHOLE_WITHOUT_NOISE
    return _tile(rows, width) if rows * width <= most else None


def _walk(problem: Problem, num_multiprocessors: int) -> TileConfig | None:
    """Return how programs walk over samples, or None where a launch before takes less time."""
    elements, waves = problem.positions * problem.channels, problem.batch / num_multiprocessors
    alone = elements <= _MOST_ALONE or elements * (math.ceil(waves) - waves) <= _MOST_IDLE_ELEMENTS
    return _walking(problem, 1) if alone else None


def _walking(problem: Problem, walkers: int) -> TileConfig:
    """Return a walk by so many programs, or as many as there are tiles."""
    tile = _tile_of(problem, _most(problem) if walkers == 1 else _TILE_OF_A_PART, _width(problem), 4)
    tiles = _programs(problem, tile) // problem.batch
    return dataclasses.replace(tile, walkers=min(walkers, 1 << tiles.bit_length() - 1))


def _tile_of(problem: Problem, size: int, width: int, elements_of_a_thread: int | None = None) -> TileConfig:
    """Return a tile of about so many elements, no longer than an image is."""
    rows = min(max(4, size // width), max(4, _tuning.power_of_two(problem.positions)))
    return _tile(rows, width, elements_of_a_thread)


def _tile(rows: int, width: int, elements_of_a_thread: int | None = None) -> TileConfig:
    num_warps = rows * width // (32 * (elements_of_a_thread or _ELEMENTS_OF_A_THREAD[width > 1]))
    return TileConfig(positions=rows, channels=width, num_warps=max(1, min(_MOST_WARPS, num_warps)))
