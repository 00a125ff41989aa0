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
_MOST_WARPS = 16
# Of a sample that one program holds whole: the largest that do not spill on sm_80, sm_90, sm_100 and gfx942 (compiled).
# Where noise is drawn, elements of one channel and of several; where none is, they are taken as they lie in memory.
_MOST_OF_A_WHOLE = {False: 8192, True: 4096}
_MOST_OF_A_WHOLE_WITHOUT_NOISE = 16384


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
    return _tile(rows, width)


def choose_whole(positions: int, channels: int, *, draws: bool) -> TileConfig | None:
    """Return a tile that holds a whole sample in registers, or None where a sample is too large for that.

    Args:
        draws: whether noise is drawn, for which registers are needed too.
    """
    rows, width = max(4, _tuning.power_of_two(positions)), _tuning.power_of_two(channels)
    most = _MOST_OF_A_WHOLE[channels > 1] if draws else _MOST_OF_A_WHOLE_WITHOUT_NOISE
    return _tile(rows, width) if rows * width <= most else None


def _tile(rows: int, width: int) -> TileConfig:
    num_warps = rows * width // (32 * _ELEMENTS_OF_A_THREAD[width > 1])
    return TileConfig(positions=rows, channels=width, num_warps=max(1, min(_MOST_WARPS, num_warps)))
