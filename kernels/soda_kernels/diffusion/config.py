"""How the images of noise-schedule sampling are laid over programs: the tiles of a problem, and which one to take."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from soda_kernels import _tuning

# Elements of a tile at the most and at the least; how many programs of a multiprocessor are wanted before tiles grow.
_MOST, _LEAST = 4096, 512
_PROGRAMS = 4
# Of one channel a thread's fill an access of 16 bytes; of several, 8 spill in some tiles (compiled for sm_90).
_ELEMENTS_OF_A_THREAD = {False: 8, True: 4}
_WIDEST = 64


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What the choice of a tile depends on."""

    kernel: str
    """The op, or the part of it, whose launch goes over images."""
    batch: int
    positions: int
    channels: int
    """1 where every image is contiguous: all of a sample is one channel then."""
    element_bytes: int
    """Of the widest image."""

    @property
    def key(self) -> str:
        """Name the problem in a table of tuned configs; batches within a factor of two share an entry."""
        shape = f"n{_tuning.power_of_two(self.batch)}-c{self.channels}-p{self.positions}"
        return f"{self.kernel}-{8 * self.element_bytes}bit-{shape}"


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """A launch config."""

    variant: ClassVar[str] = "tiles"

    positions: int
    """A multiple of four."""
    channels: int
    num_warps: int


def choose(batch: int, positions: int, channels: int, device: torch.device) -> TileConfig:
    """Return the tile that was tuned for the problem on this GPU, or the heuristic's."""
    problem = Problem(kernel="any", batch=batch, positions=positions, channels=channels, element_bytes=4)
    tuned = _tuning.look_up("diffusion", problem.key, device)
    return TileConfig(**tuned) if tuned else heuristic(problem, _tuning.num_multiprocessors(device))


def heuristic(problem: Problem, num_multiprocessors: int = 132) -> TileConfig:
    """Return the tile to take unmeasured: as large as leaves programs enough, wide enough to fill sectors."""
    wanted = _PROGRAMS * num_multiprocessors
    several = problem.channels > 1
    size = _MOST // 2 if several else _MOST
    while size > _LEAST and problem.batch * problem.positions * problem.channels < wanted * size:
        size //= 2
    width = min(_tuning.power_of_two(problem.channels), _WIDEST)
    return _tile(problem, size, width, _ELEMENTS_OF_A_THREAD[several])


def candidates(problem: Problem) -> Iterator[TileConfig]:
    """Yield the tiles that are worth a measurement; some may need more registers than there are."""
    widest = min(_tuning.power_of_two(problem.channels), _WIDEST)
    widths = [width for width in (16, 32, 64) if width < widest] + [widest]
    sizes = [_LEAST << power for power in range(5)]
    tiles = (_tile(problem, *each) for each in itertools.product(sizes, widths, (4, 8, 16)))
    yield from dict.fromkeys(tiles)


def _tile(problem: Problem, size: int, width: int, elements_of_a_thread: int) -> TileConfig:
    """Return a tile of about so many elements, no longer than an image is."""
    rows = min(max(4, size // width), max(4, _tuning.power_of_two(problem.positions)))
    num_warps = rows * width // (32 * elements_of_a_thread)
    return TileConfig(positions=rows, channels=width, num_warps=max(1, min(16, num_warps)))
