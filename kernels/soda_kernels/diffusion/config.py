"""How the images of noise-schedule sampling are laid over programs: the tile of a problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from soda_kernels import _tuning

# Elements of a tile at the most and at the least; how many programs of a multiprocessor are wanted before tiles grow.
_MOST, _LEAST = 4096, 512
_PROGRAMS = 4
# Of one channel a thread's fill an access of 16 bytes; of several, 8 spill in some tiles (compiled for sm_90).
_ELEMENTS_OF_A_THREAD = {False: 8, True: 4}


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """A launch config."""

    positions: int
    """A multiple of four."""
    channels: int
    num_warps: int


def choose(batch: int, positions: int, channels: int, device: torch.device) -> TileConfig:
    """Return the tile to take unmeasured: as large as leaves programs enough, wide enough to fill sectors."""
    wanted = _PROGRAMS * _tuning.num_multiprocessors(device)
    several = channels > 1
    size = _MOST // 2 if several else _MOST
    while size > _LEAST and batch * positions * channels < wanted * size:
        size //= 2
    width = min(_tuning.power_of_two(channels), 64)
    rows = min(max(4, size // width), max(4, _tuning.power_of_two(positions)))
    num_warps = rows * width // (32 * _ELEMENTS_OF_A_THREAD[several])
    return TileConfig(positions=rows, channels=width, num_warps=max(1, min(16, num_warps)))
