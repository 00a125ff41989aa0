"""What the kernels of noise-schedule sampling share: tiles of images, and the noise that belongs to their elements.

A tile is [POSITIONS, CHANNELS] of one sample. Where every tensor is contiguous, all of a sample is one channel; in
channels_last its channels lie side by side. Each tensor has strides of its own, so that layouts may differ.
"""

from __future__ import annotations

import triton
import triton.language as tl

_TWO_PI_OVER_2_24 = tl.constexpr(2.0**-24 * 6.283185307179586)


@triton.jit
def place(first_position, first_channel, positions, channels, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return a tile's positions [POSITIONS, 1], channels [1, CHANNELS], and which of its elements exist."""
    position = first_position + tl.arange(0, POSITIONS)[:, None]
    channel = first_channel + tl.arange(0, CHANNELS)[None, :]
    return position, channel, (position < positions) & (channel < channels)


@triton.jit
def load(pointers, exists):
    """Return images in fp32, 0 or for bytes anything where nothing exists; bytes stand for x / 127.5 - 1."""
    values = tl.load(pointers, exists, 0).to(tl.float32)
    if pointers.dtype.element_ty == tl.uint8:
        # The difference is exact, so that small values keep their digits.
        values = (values - 127.5) * (1 / 127.5)
    return values


@triton.jit
def normal_pair(a, b):
    """Return the two normals of two words, by Box and Muller as in soda_kernels/_philox.py."""
    radius = tl.sqrt_rn(tl.log(a.to(tl.float32) * 2.0**-32 + 2.0**-33) * -2.0)
    turn = b >> 8
    cosine, sine = _cosine_and_sine(turn.to(tl.float32) * _TWO_PI_OVER_2_24, (turn + (1 << 21)) >> 22)
    return radius * cosine, radius * sine


@triton.jit
def _cosine_and_sine(angle, quarter):
    """Return both within 2 ulps for 0 <= angle < 2 pi, whose nearest multiple of pi / 2 is the quarter-th.

    The library's take any angle: for large ones they keep a table, which the compiler puts into local memory.
    """
    # Cody and Waite's reduction: the first three parts of pi / 2 have 12 bits, so that their products are exact.
    count = quarter.to(tl.float32)
    x = angle - count * 1.5703125 - count * 4.837512969970703125e-4 - count * 7.549533620476723e-8
    x -= count * 2.563344151594519e-12
    square = x * x
    # Polynomials for |x| <= pi / 4 of the Cephes library (Moshier 1992), sinf and cosf.
    sine = x + x * square * (-1.6666654611e-1 + square * (8.3321608736e-3 + square * -1.9515295891e-4))
    cosine = 4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    cosine = 1.0 - 0.5 * square + square * square * cosine
    swapped = (quarter & 1) != 0
    c, s = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -c, c), tl.where((quarter & 2) != 0, -s, s)


@triton.jit
def words(seed, sample_id, step, block, STREAM: tl.constexpr):
    """Return the four words of Philox4x32-10 for each block of a sample: the counter of soda_kernels/_philox.py."""
    zero = tl.zeros_like(block)
    low = tl.cast(sample_id, tl.int32)
    high = tl.cast((sample_id >> 32) & 0x00FFFFFF, tl.int32) | (STREAM << 24)
    return tl.philox(seed, block, zero + low, zero + high, zero + tl.cast(step, tl.int32))


@triton.jit
def noise(
    seed, sample_id, step, first_position, first_channel, positions,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, STREAM: tl.constexpr, FOURS: tl.constexpr,
):  # fmt: skip
    """Return the normals of a tile's logical elements, channel * positions + position.

    With FOURS, positions come in whole blocks of four, each of which is computed once; else every element computes its
    own.
    """
    if FOURS:
        channel = (first_channel + tl.arange(0, CHANNELS)).to(tl.int64)[None, :] * (positions // 4)
        block = (channel + (first_position // 4 + tl.arange(0, POSITIONS // 4))[:, None]).to(tl.int32)
        w0, w1, w2, w3 = words(seed, sample_id, step, block, STREAM)
        n0, n1 = normal_pair(w0, w1)
        n2, n3 = normal_pair(w2, w3)
        fours = tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(POSITIONS // 4, CHANNELS, 4)
        return fours.permute(0, 2, 1).reshape(POSITIONS, CHANNELS)
    else:
        channel = (first_channel + tl.arange(0, CHANNELS)).to(tl.int64)[None, :] * positions
        element = channel + (first_position + tl.arange(0, POSITIONS))[:, None]
        w0, w1, w2, w3 = words(seed, sample_id, step, (element >> 2).to(tl.int32), STREAM)
        second = (element & 2) != 0
        even, odd = normal_pair(tl.where(second, w2, w0), tl.where(second, w3, w1))
        return tl.where((element & 1) != 0, odd, even)


@triton.jit
def draw_step_index(
    seed, sample_id, step, place, num_steps, first_stratum, num_strata, SAMPLING: tl.constexpr, STREAM: tl.constexpr,
    SHARED_ID: tl.constexpr,
):  # fmt: skip
    """Return the step index of a sample, or of a vector of samples, by the formulas of reference.py.

    Args:
        place: the sample's in the call.
    """
    zero = tl.cast(sample_id, tl.int32) * 0
    w0, w1, _, _ = words(seed, sample_id, step, zero, STREAM)
    if SAMPLING == "stratified":
        shared, _, _, _ = words(seed, tl.cast(sample_id, tl.int64) * 0 + SHARED_ID, step, zero, STREAM)
        strata = tl.cast(num_strata, tl.int64)
        stratum = (tl.cast(place, tl.int64) + first_stratum + (shared.to(tl.int64) * strata >> 32)) % strata
        return ((stratum << 24) + (w0 >> 8).to(tl.int64)) * num_steps // (strata << 24)
    else:
        if SAMPLING == "logit_normal":
            share, _ = normal_pair(w0, w1)
            share = 1.0 / (1.0 + tl.exp(-share))
        else:
            share = (w0 >> 8).to(tl.float32) * 2.0**-24
        return tl.minimum((share * num_steps).to(tl.int64), num_steps - 1)


@triton.jit
def look_up(table_ptr, index, num_steps, stride):
    """Return table[index] in fp32, or NaN for an index that the table does not have."""
    return tl.load(table_ptr + index * stride, (index >= 0) & (index < num_steps), float("nan")).to(tl.float32)
