"""What the kernels of modulated group norm share: tiles, group sums, folded modulations, dropout masks.

Every kernel works on tiles [ROWS, SLAB]: rows are positions in space, columns are channels, whatever the layout. Triton
orders a tile's threads along the axis that is contiguous in memory, so one text serves NCHW and channels_last.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Stream of the counter RNG, as in soda_kernels/_philox.py.
_DROPOUT_STREAM = tl.constexpr(2 << 24)


@triton.jit
def part_of(slab, slabs_of_x, x_ptr, skip_ptr, channels, skip_channels):
    """Return (slab in its part, the part's pointer, its channels, its first channel in the concatenation)."""
    if skip_ptr is None:
        return slab, x_ptr, channels, 0
    else:
        in_skip = slab >= slabs_of_x
        return (
            tl.where(in_skip, slab - slabs_of_x, slab),
            tl.where(in_skip, skip_ptr, x_ptr),
            tl.where(in_skip, skip_channels, channels),
            tl.where(in_skip, channels, 0),
        )


@triton.jit
def chunk_of(pid, num_slabs, num_chunks):
    """Return (slab, chunk, sample): neighbouring programs share rows of a channels_last tensor."""
    return pid % num_slabs, pid // num_slabs % num_chunks, tl.cast(pid // num_slabs // num_chunks, tl.int64)


@triton.jit
def tile(
    pointer, sample, row, channel, spatial, channels,
    ROWS: tl.constexpr, SLAB: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return the pointers of the tile that starts at (sample, row, channel) of a tensor (N, channels, spatial)."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, SLAB)
    if WIDE:  # a tile itself spans 2^31 elements
        rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    sample, row, channel = tl.cast(sample, tl.int64), tl.cast(row, tl.int64), tl.cast(channel, tl.int64)
    if CHANNELS_LAST:
        pointer += (sample * spatial + row) * channels + channel
        return pointer + (rows[:, None] * channels + columns[None, :])
    else:
        pointer += (sample * channels + channel) * spatial + row
        return pointer + (rows[:, None] + columns[None, :] * spatial)


@triton.jit
def load(
    pointer, sample, row, channel, spatial, channels, mask,
    ROWS: tl.constexpr, SLAB: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return a tile of an image in fp32, 0 outside the mask."""
    pointers = tile(pointer, sample, row, channel, spatial, channels, ROWS, SLAB, CHANNELS_LAST, WIDE)
    return tl.load(pointers, mask, 0.0).to(tl.float32)


@triton.jit
def scaled(values, residual_scale):
    """Return what belongs to the sum x + residual times its factor, which is None where it is 1."""
    return values if residual_scale is None else values * residual_scale


@triton.jit
def load_sum(
    source_ptr, residual_ptr, residual_scale, summed_ptr, sample, row, channel, spatial, channels, mask,
    ROWS: tl.constexpr, SLAB: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return a tile of x in fp32, or of the sum rounded to x's dtype and stored if `summed_ptr` is given."""
    x = tl.load(tile(source_ptr, sample, row, channel, spatial, channels, ROWS, SLAB, CHANNELS_LAST, WIDE), mask, 0.0)
    if residual_ptr is not None:
        other = tile(residual_ptr, sample, row, channel, spatial, channels, ROWS, SLAB, CHANNELS_LAST, WIDE)
        x = scaled(x.to(tl.float32) + tl.load(other, mask, 0.0).to(tl.float32), residual_scale).to(x.dtype)
    if summed_ptr is not None:
        tl.store(tile(summed_ptr, sample, row, channel, spatial, channels, ROWS, SLAB, CHANNELS_LAST, WIDE), x, mask)
    return x.to(tl.float32)


@triton.jit
def load_gradient(
    source_ptr, dy_ptr, seed_ptr, mean, scale, shift, sample, row, part_channel, channel, spatial, part_channels,
    channels, mask, threshold, keep_scale,
    ROWS: tl.constexpr, SLAB: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    SILU: tl.constexpr, DROPOUT: tl.constexpr, SEED_PER_SAMPLE: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """Return a tile of x - mean and of dp, the gradient before the activation; both are 0 outside the mask."""
    x = load(source_ptr, sample, row, part_channel, spatial, part_channels, mask, ROWS, SLAB, CHANNELS_LAST, WIDE)
    x = tl.where(mask, x - mean[None, :], 0.0)
    dp = load(dy_ptr, sample, row, channel, spatial, channels, mask, ROWS, SLAB, CHANNELS_LAST, WIDE)
    if DROPOUT:
        keep = keep_mask(seed_ptr, sample, row, channel, spatial, threshold, ROWS, SLAB, SEED_PER_SAMPLE, EIGHTS)
        dp *= tl.where(keep, keep_scale, 0.0)
    return x, activation_gradient(x * scale[None, :] + shift[None, :], dp, SILU)


@triton.jit
def store_input_gradient(
    target_ptr, dsummed_ptr, residual_scale, x, dp, scale, c1, c2, sample, row, channel, spatial, channels, mask,
    ROWS: tl.constexpr, SLAB: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store a tile of dx = scale * dp - c1 - (x - mean) * c2 plus the sum's own gradient, times the sum's factor."""
    dx = scale[None, :] * dp - c1[None, :] - x * c2[None, :]
    if dsummed_ptr is not None:
        dx += load(dsummed_ptr, sample, row, channel, spatial, channels, mask, ROWS, SLAB, CHANNELS_LAST, WIDE)
    dx = scaled(dx, residual_scale)  # not the coefficients, which a program would hold twice
    target = tile(target_ptr, sample, row, channel, spatial, channels, ROWS, SLAB, CHANNELS_LAST, WIDE)
    tl.store(target, dx.to(target_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def group_sum(values, GROUP_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SLAB: tl.constexpr):
    """Sum [SLAB] channels into [GROUPS] groups of GROUP_CHANNELS neighbours."""
    member = tl.arange(0, SLAB)[None, :] // GROUP_CHANNELS == tl.arange(0, GROUPS)[:, None]
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@triton.jit
def spread(values, GROUP_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SLAB: tl.constexpr):
    """Give each of [SLAB] channels its group's of the [GROUPS] values, and 0 to channels beyond them."""
    member = tl.arange(0, SLAB)[None, :] // GROUP_CHANNELS == tl.arange(0, GROUPS)[:, None]
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@triton.jit
def folded(
    weight_ptr, bias_ptr, scale1_ptr, shift1_ptr, scale2_ptr, shift2_ptr, sample,
    scale1_stride, shift1_stride, scale2_stride, shift2_stride, channel, mask, scale_offset, SLAB: tl.constexpr,
):  # fmt: skip
    """Return scale and shift [SLAB], in fp32, of weight and bias followed by the modulations that are not None."""
    scale, shift = tl.full((SLAB,), 1.0, tl.float32), tl.zeros((SLAB,), tl.float32)
    if weight_ptr is not None:
        scale = tl.load(weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    if scale1_ptr is not None:
        factor = _load_factor(scale1_ptr + sample * scale1_stride + channel, mask, scale_offset)
        scale *= factor
        shift = shift * factor + tl.load(shift1_ptr + sample * shift1_stride + channel, mask, 0.0).to(tl.float32)
    if scale2_ptr is not None:
        factor = _load_factor(scale2_ptr + sample * scale2_stride + channel, mask, scale_offset)
        scale *= factor
        shift = shift * factor + tl.load(shift2_ptr + sample * shift2_stride + channel, mask, 0.0).to(tl.float32)
    return scale, shift


@triton.jit
def parameter_gradients(
    dscale, dshift, weight_ptr, bias_ptr, scale1_ptr, shift1_ptr, scale2_ptr,
    dscale1_ptr, dshift1_ptr, dscale2_ptr, dshift2_ptr, sample,
    scale1_stride, shift1_stride, scale2_stride, channels, channel, mask, scale_offset, SLAB: tl.constexpr,
):  # fmt: skip
    """Store the modulations' gradients and return this sample's terms of those of weight and bias.

    (dscale, dshift) are the gradients of the folded pair. Parameters are loaded again, from the L1 cache: held since
    their first use they would cost the image tile its registers.
    """
    own = sample * channels + channel
    if scale2_ptr is not None:
        scale, shift = folded(
            weight_ptr, bias_ptr, scale1_ptr, shift1_ptr, None, None, sample, scale1_stride, shift1_stride, 0, 0,
            channel, mask, scale_offset, SLAB,
        )  # fmt: skip
        tl.store(dscale2_ptr + own, (scale * dscale + shift * dshift).to(dscale2_ptr.dtype.element_ty), mask=mask)
        tl.store(dshift2_ptr + own, dshift.to(dshift2_ptr.dtype.element_ty), mask=mask)
        factor = _load_factor(scale2_ptr + sample * scale2_stride + channel, mask, scale_offset)
        dscale *= factor
        dshift *= factor
    if scale1_ptr is not None:
        scale, shift = folded(
            weight_ptr, bias_ptr, None, None, None, None, sample, 0, 0, 0, 0, channel, mask, scale_offset, SLAB
        )
        tl.store(dscale1_ptr + own, (scale * dscale + shift * dshift).to(dscale1_ptr.dtype.element_ty), mask=mask)
        tl.store(dshift1_ptr + own, dshift.to(dshift1_ptr.dtype.element_ty), mask=mask)
        factor = _load_factor(scale1_ptr + sample * scale1_stride + channel, mask, scale_offset)
        dscale *= factor
        dshift *= factor
    return dscale, dshift


@triton.jit
def _load_factor(pointers, mask, scale_offset):
    """Return scale + offset, formed in fp32: a bf16 sum would lose the scale."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32) + scale_offset


@triton.jit
def keep_mask(
    seed_ptr, sample, row, channel, spatial, threshold,
    ROWS: tl.constexpr, SLAB: tl.constexpr, SEED_PER_SAMPLE: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """Return the dropout mask of a tile: the 16 random bits of each logical element against the threshold.

    Element e = channel * spatial + row of a sample is half e % 2 of word e // 2 % 4 of the counter's block e // 8. With
    EIGHTS, rows come in whole blocks of eight, each of which is computed once; else every element computes its own.
    """
    seed = tl.load(seed_ptr + sample if SEED_PER_SAMPLE else seed_ptr)
    sample_id = 0 if SEED_PER_SAMPLE else sample
    channels = channel + tl.arange(0, SLAB)
    if EIGHTS:
        first = channels.to(tl.int64)[None, :] * (spatial // 8) + row // 8
        block = (first + tl.arange(0, ROWS // 8)[:, None]).to(tl.int32)
        w0, w1, w2, w3 = _words(seed, sample_id, block)
        bits = _keep(w0, threshold, 0) | _keep(w1, threshold, 2) | _keep(w2, threshold, 4) | _keep(w3, threshold, 6)
        each = (bits[:, None, :] >> tl.arange(0, 8)[None, :, None]) & 1
        return tl.reshape(each, (ROWS, SLAB)) != 0
    else:
        element = channels.to(tl.int64)[None, :] * spatial + (row + tl.arange(0, ROWS))[:, None]
        w0, w1, w2, w3 = _words(seed, sample_id, (element >> 3).to(tl.int32))
        word = (element & 7).to(tl.int32) >> 1
        chosen = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
        half = tl.where((element & 1) == 1, chosen >> 16, chosen & 0xFFFF)
        return half.to(tl.int32) >= threshold


@triton.jit
def _words(seed, sample_id, block):
    """Return the four words of Philox4x32-10 for each block of a sample."""
    zero = tl.zeros_like(block)
    return tl.philox(seed, block, zero + tl.cast(sample_id, tl.int32), zero + _DROPOUT_STREAM, zero)


@triton.jit
def _keep(word, threshold, bit: tl.constexpr):
    """Return the keep bits of a word's two halves, shifted to their place."""
    low, high = (word & 0xFFFF).to(tl.int32), (word >> 16).to(tl.int32)
    return ((low >= threshold).to(tl.int32) << bit) | ((high >= threshold).to(tl.int32) << (bit + 1))


@triton.jit
def activate(p, SILU: tl.constexpr):
    """Return silu(p) or p."""
    return p * tl.sigmoid(p) if SILU else p


@triton.jit
def activation_gradient(p, dy, SILU: tl.constexpr):
    """Return dy * silu'(p) or dy."""
    if SILU:
        gate = tl.sigmoid(p)
        return dy * gate * (1.0 + p * (1.0 - gate))
    else:
        return dy
