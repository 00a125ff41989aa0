"""A kernel that shows where the kernels of modulated group norm think a tile lies."""

from __future__ import annotations

import triton
import triton.language as tl

from soda_kernels.group_norm import triton_device as device


@triton.jit
def tile_offsets(
    x_ptr, out_ptr, sample, row, channel, spatial, channels,
    ROWS: tl.constexpr, SLAB: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store the byte offset of each element of a tile from the tensor's start; one program."""
    pointers = device.tile(x_ptr, sample, row, channel, spatial, channels, ROWS, SLAB, CHANNELS_LAST, WIDE)
    offsets = pointers.to(tl.int64) - x_ptr.to(tl.int64)
    tl.store(out_ptr + tl.arange(0, ROWS)[:, None] * SLAB + tl.arange(0, SLAB)[None, :], offsets)
