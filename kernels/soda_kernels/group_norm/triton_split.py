"""Group norm in several launches, where one program cannot own whole groups: partial sums, their fold, the apply pass.

Forward: per-channel means and squared deviations of chunks of space, merged after Chan, then y. Backward: per-channel
sums of chunks, folded into the coefficients of dx and every parameter's gradient. Each slot of the fp32 workspace has
one writer, so results do not depend on the order of programs. Memory traffic: 3 image tensors forward, 5 backward.

Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
"""

from __future__ import annotations

import triton
import triton.language as tl

from soda_kernels.group_norm import triton_device as device


@triton.jit
def _modulated_group_norm_fwd_statistics_kernel(
    x_ptr, skip_ptr, residual_ptr, summed_ptr, partials_ptr,
    spatial, channels, skip_channels, num_slabs, slabs_of_x, num_chunks, residual_scale,
    SLAB: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: the mean and squared deviations of SLAB channels over a chunk of ROWS * TILES positions."""
    slab, chunk, sample = device.chunk_of(tl.program_id(0), num_slabs, num_chunks)
    part_slab, source_ptr, part_channels, part_start = device.part_of(
        slab, slabs_of_x, x_ptr, skip_ptr, channels, skip_channels
    )
    column, row = tl.arange(0, SLAB), tl.arange(0, ROWS)
    part_channel = part_slab * SLAB
    owned = part_channel + column < part_channels
    first_row = chunk * (ROWS * TILES)
    stop_row = tl.minimum(first_row + ROWS * TILES, spatial)
    if CHANNELS_LAST:
        anchors = (sample * spatial + first_row) * part_channels + part_channel + column
    else:
        anchors = (sample * part_channels + part_channel + column) * spatial + first_row
    pivot = tl.load(source_ptr + anchors, mask=owned, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        pivot += tl.load(residual_ptr + anchors, mask=owned, other=0.0).to(tl.float32)
        # Rounded as the sum is, whose norm then has the same bits.
        pivot = device.scaled(pivot, residual_scale).to(source_ptr.dtype.element_ty).to(tl.float32)

    position_mean = tl.zeros((ROWS, SLAB), tl.float32)
    position_squares = tl.zeros((ROWS, SLAB), tl.float32)
    for start in range(first_row, stop_row, ROWS):
        mask = (start + row < stop_row)[:, None] & owned[None, :]
        x = device.load_sum(
            source_ptr, residual_ptr, residual_scale, summed_ptr, sample, start, part_channel, spatial, part_channels,
            mask, ROWS, SLAB, CHANNELS_LAST, WIDE,
        )  # fmt: skip
        x = tl.where(mask, x - pivot[None, :], 0.0)
        delta = tl.where(mask, x - position_mean, 0.0)
        position_mean += delta / tl.cast((start - first_row) // ROWS + 1, tl.float32)
        position_squares += delta * (x - position_mean)

    counts = ((stop_row - first_row - row + ROWS - 1) // ROWS).to(tl.float32)[:, None]
    mean = tl.sum(counts * position_mean, axis=0) / tl.cast(stop_row - first_row, tl.float32)
    away = position_mean - mean[None, :]
    squares = tl.sum(position_squares + counts * away * away, axis=0)
    all_channels = channels + skip_channels
    slot = (sample * num_chunks + chunk) * 2 * all_channels + part_start + part_channel + column
    tl.store(partials_ptr + slot, mean + pivot, mask=owned)
    tl.store(partials_ptr + slot + all_channels, squares, mask=owned)


@triton.jit
def _modulated_group_norm_fwd_fold_kernel(
    partials_ptr, weight_ptr, bias_ptr, scale1_ptr, shift1_ptr, scale2_ptr, shift2_ptr,
    mean_ptr, rstd_ptr, coefficients_ptr,
    spatial, all_channels, num_slabs, num_chunks, chunk_rows,
    scale1_stride, shift1_stride, scale2_stride, shift2_stride, scale_offset, eps,
    GROUP_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, SLAB: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program: GROUPS whole groups of a sample; their statistics, and scale and shift of each channel."""
    slab = tl.program_id(0) % num_slabs
    sample = tl.cast(tl.program_id(0) // num_slabs, tl.int64)
    column, index, group = tl.arange(0, SLAB), tl.arange(0, CHUNKS), tl.arange(0, GROUPS_PADDED)
    owned = column < GROUPS * GROUP_CHANNELS
    first_channel = slab * (GROUPS * GROUP_CHANNELS)
    channel = first_channel + column
    elements = tl.cast(spatial, tl.float32) * GROUP_CHANNELS
    means_ptr = partials_ptr + sample * num_chunks * 2 * all_channels + channel[None, :]

    # Around the mean of the first chunk's first channel of the group: exact digits when the mean is large.
    pivot = tl.load(
        partials_ptr + sample * num_chunks * 2 * all_channels + channel // GROUP_CHANNELS * GROUP_CHANNELS,
        mask=owned, other=0.0,
    )  # fmt: skip
    total = tl.zeros((CHUNKS, SLAB), tl.float32)
    for start in range(0, num_chunks, CHUNKS):
        chunk = (start + index)[:, None]
        mask = (chunk < num_chunks) & owned[None, :]
        count = tl.minimum(spatial - chunk * chunk_rows, chunk_rows).to(tl.float32)
        means = tl.load(means_ptr + chunk * 2 * all_channels, mask=mask, other=0.0)
        total += tl.where(mask, count * (means - pivot[None, :]), 0.0)
    away_g = device.group_sum(tl.sum(total, axis=0), GROUP_CHANNELS, GROUPS_PADDED, SLAB) / elements
    away_c = device.spread(away_g, GROUP_CHANNELS, GROUPS_PADDED, SLAB)

    total = tl.zeros((CHUNKS, SLAB), tl.float32)
    for start in range(0, num_chunks, CHUNKS):
        chunk = (start + index)[:, None]
        mask = (chunk < num_chunks) & owned[None, :]
        count = tl.minimum(spatial - chunk * chunk_rows, chunk_rows).to(tl.float32)
        means = tl.load(means_ptr + chunk * 2 * all_channels, mask=mask, other=0.0)
        squares = tl.load(means_ptr + (chunk * 2 + 1) * all_channels, mask=mask, other=0.0)
        away = (means - pivot[None, :]) - away_c[None, :]
        total += tl.where(mask, squares + count * away * away, 0.0)
    squares_g = device.group_sum(tl.sum(total, axis=0), GROUP_CHANNELS, GROUPS_PADDED, SLAB)

    rstd = 1.0 / tl.sqrt_rn(squares_g / elements + eps)
    first_of_group = tl.where(column % GROUP_CHANNELS == 0, pivot, 0.0)
    pivot_g = device.group_sum(first_of_group, GROUP_CHANNELS, GROUPS_PADDED, SLAB)
    mean = pivot_g + away_g
    statistic = sample * (all_channels // GROUP_CHANNELS) + first_channel // GROUP_CHANNELS + group
    tl.store(mean_ptr + statistic, mean, mask=group < GROUPS)
    tl.store(rstd_ptr + statistic, rstd, mask=group < GROUPS)

    scale, shift = device.folded(
        weight_ptr, bias_ptr, scale1_ptr, shift1_ptr, scale2_ptr, shift2_ptr, sample,
        scale1_stride, shift1_stride, scale2_stride, shift2_stride, channel, owned, scale_offset, SLAB,
    )  # fmt: skip
    scale *= device.spread(rstd, GROUP_CHANNELS, GROUPS_PADDED, SLAB)
    # What the mean lost when it was rounded to fp32 goes into the shift.
    lost = (pivot_g - mean) + away_g
    shift -= scale * device.spread(lost, GROUP_CHANNELS, GROUPS_PADDED, SLAB)
    slot = sample * 2 * all_channels + channel
    tl.store(coefficients_ptr + slot, scale, mask=owned)
    tl.store(coefficients_ptr + slot + all_channels, shift, mask=owned)


@triton.jit
def _modulated_group_norm_fwd_apply_kernel(
    x_ptr, skip_ptr, seed_ptr, mean_ptr, coefficients_ptr, y_ptr,
    spatial, channels, skip_channels, num_slabs, slabs_of_x, num_chunks, num_programs, threshold, keep_scale,
    GROUP_CHANNELS: tl.constexpr, SLAB: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr,
    SEED_PER_SAMPLE: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """One program: y of SLAB channels over a chunk of ROWS * TILES positions."""
    # Backwards: what the statistics kernel read last is still in the L2 cache.
    slab, chunk, sample = device.chunk_of(num_programs - 1 - tl.program_id(0), num_slabs, num_chunks)
    part_slab, source_ptr, part_channels, part_start = device.part_of(
        slab, slabs_of_x, x_ptr, skip_ptr, channels, skip_channels
    )
    all_channels = channels + skip_channels
    column, row = tl.arange(0, SLAB), tl.arange(0, ROWS)
    part_channel = part_slab * SLAB
    owned = part_channel + column < part_channels
    first_channel = part_start + part_channel
    channel = first_channel + column
    first_row = chunk * (ROWS * TILES)
    stop_row = tl.minimum(first_row + ROWS * TILES, spatial)
    statistic = sample * (all_channels // GROUP_CHANNELS) + channel // GROUP_CHANNELS
    mean = tl.load(mean_ptr + statistic, mask=owned, other=0.0)
    slot = sample * 2 * all_channels + channel
    scale = tl.load(coefficients_ptr + slot, mask=owned, other=0.0)
    shift = tl.load(coefficients_ptr + slot + all_channels, mask=owned, other=0.0)
    for start in range(first_row, stop_row, ROWS):
        mask = (start + row < stop_row)[:, None] & owned[None, :]
        x = device.load(
            source_ptr, sample, start, part_channel, spatial, part_channels, mask, ROWS, SLAB, CHANNELS_LAST, WIDE
        )
        y = device.activate((x - mean[None, :]) * scale[None, :] + shift[None, :], SILU)
        if DROPOUT:
            keep = device.keep_mask(
                seed_ptr, sample, start, first_channel, spatial, threshold, ROWS, SLAB, SEED_PER_SAMPLE, EIGHTS
            )
            y *= tl.where(keep, keep_scale, 0.0)  # a NaN stays one
        y_tile = device.tile(
            y_ptr, sample, start, first_channel, spatial, all_channels, ROWS, SLAB, CHANNELS_LAST, WIDE
        )
        tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def _modulated_group_norm_bwd_sums_kernel(
    dy_ptr, x_ptr, skip_ptr, weight_ptr, bias_ptr, scale1_ptr, shift1_ptr, scale2_ptr, shift2_ptr,
    mean_ptr, rstd_ptr, seed_ptr, partials_ptr,
    spatial, channels, skip_channels, num_slabs, slabs_of_x, num_chunks,
    scale1_stride, shift1_stride, scale2_stride, shift2_stride, scale_offset, threshold, keep_scale,
    GROUP_CHANNELS: tl.constexpr, SLAB: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr,
    SEED_PER_SAMPLE: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """One program: sum dp and sum dp * x_hat of SLAB channels over a chunk of ROWS * TILES positions."""
    slab, chunk, sample = device.chunk_of(tl.program_id(0), num_slabs, num_chunks)
    part_slab, source_ptr, part_channels, part_start = device.part_of(
        slab, slabs_of_x, x_ptr, skip_ptr, channels, skip_channels
    )
    all_channels = channels + skip_channels
    column, row = tl.arange(0, SLAB), tl.arange(0, ROWS)
    part_channel = part_slab * SLAB
    owned = part_channel + column < part_channels
    first_channel = part_start + part_channel
    channel = first_channel + column
    first_row = chunk * (ROWS * TILES)
    stop_row = tl.minimum(first_row + ROWS * TILES, spatial)
    statistic = sample * (all_channels // GROUP_CHANNELS) + channel // GROUP_CHANNELS
    mean = tl.load(mean_ptr + statistic, mask=owned, other=0.0)
    rstd = tl.load(rstd_ptr + statistic, mask=owned, other=0.0)
    scale, shift = device.folded(
        weight_ptr, bias_ptr, scale1_ptr, shift1_ptr, scale2_ptr, shift2_ptr, sample,
        scale1_stride, shift1_stride, scale2_stride, shift2_stride, channel, owned, scale_offset, SLAB,
    )  # fmt: skip
    position_dshift = tl.zeros((ROWS, SLAB), tl.float32)
    position_dscale = tl.zeros((ROWS, SLAB), tl.float32)
    for start in range(first_row, stop_row, ROWS):
        mask = (start + row < stop_row)[:, None] & owned[None, :]
        x, dp = device.load_gradient(
            source_ptr, dy_ptr, seed_ptr, mean, rstd * scale, shift, sample, start, part_channel, first_channel,
            spatial, part_channels, all_channels, mask, threshold, keep_scale,
            ROWS, SLAB, CHANNELS_LAST, WIDE, SILU, DROPOUT, SEED_PER_SAMPLE, EIGHTS,
        )  # fmt: skip
        position_dshift += dp
        position_dscale += dp * x
    slot = (sample * num_chunks + chunk) * 2 * all_channels + channel
    tl.store(partials_ptr + slot, tl.sum(position_dshift, axis=0), mask=owned)
    tl.store(partials_ptr + slot + all_channels, tl.sum(position_dscale, axis=0) * rstd, mask=owned)


@triton.jit
def _modulated_group_norm_bwd_fold_kernel(
    partials_ptr, weight_ptr, bias_ptr, scale1_ptr, shift1_ptr, scale2_ptr, shift2_ptr, rstd_ptr,
    dscale1_ptr, dshift1_ptr, dscale2_ptr, dshift2_ptr, coefficients_ptr, group_coefficients_ptr, sums_ptr,
    num_samples, spatial, all_channels, num_slabs, num_chunks,
    scale1_stride, shift1_stride, scale2_stride, shift2_stride, scale_offset,
    GROUP_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, SLAB: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program: GROUPS whole groups of a sample; what dx takes of each channel and group, and their gradients.

    A channel's coefficients are scale and shift of p = (x - mean) * scale + shift; a group's are c1 and c2 of
    dx = scale * dp - c1 - c2 * (x - mean), side by side.
    """
    slab = tl.program_id(0) % num_slabs
    sample = tl.cast(tl.program_id(0) // num_slabs, tl.int64)
    column, index, group = tl.arange(0, SLAB), tl.arange(0, CHUNKS), tl.arange(0, GROUPS_PADDED)
    owned = column < GROUPS * GROUP_CHANNELS
    channel = slab * (GROUPS * GROUP_CHANNELS) + column
    elements = tl.cast(spatial, tl.float32) * GROUP_CHANNELS
    position_dshift = tl.zeros((CHUNKS, SLAB), tl.float32)
    position_dscale = tl.zeros((CHUNKS, SLAB), tl.float32)
    first = partials_ptr + sample * num_chunks * 2 * all_channels + channel[None, :]
    for start in range(0, num_chunks, CHUNKS):
        chunk = (start + index)[:, None]
        mask = (chunk < num_chunks) & owned[None, :]
        position_dshift += tl.load(first + chunk * 2 * all_channels, mask=mask, other=0.0)
        position_dscale += tl.load(first + (chunk * 2 + 1) * all_channels, mask=mask, other=0.0)
    dshift, dscale = tl.sum(position_dshift, axis=0), tl.sum(position_dscale, axis=0)

    scale, shift = device.folded(
        weight_ptr, bias_ptr, scale1_ptr, shift1_ptr, scale2_ptr, shift2_ptr, sample,
        scale1_stride, shift1_stride, scale2_stride, shift2_stride, channel, owned, scale_offset, SLAB,
    )  # fmt: skip
    statistic = sample * (all_channels // GROUP_CHANNELS) + slab * GROUPS + group
    rstd = tl.load(rstd_ptr + statistic, mask=group < GROUPS, other=0.0)
    slot = coefficients_ptr + sample * 2 * all_channels + channel
    tl.store(slot, scale * device.spread(rstd, GROUP_CHANNELS, GROUPS_PADDED, SLAB), mask=owned)
    tl.store(slot + all_channels, shift, mask=owned)
    c1 = device.group_sum(scale * dshift, GROUP_CHANNELS, GROUPS_PADDED, SLAB) / elements
    c2 = device.group_sum(scale * dscale, GROUP_CHANNELS, GROUPS_PADDED, SLAB) / elements
    tl.store(group_coefficients_ptr + 2 * statistic, c1 * rstd, mask=group < GROUPS)
    tl.store(group_coefficients_ptr + 2 * statistic + 1, c2 * rstd * rstd, mask=group < GROUPS)

    dscale, dshift = device.parameter_gradients(
        dscale, dshift, weight_ptr, bias_ptr, scale1_ptr, shift1_ptr, scale2_ptr,
        dscale1_ptr, dshift1_ptr, dscale2_ptr, dshift2_ptr, sample,
        scale1_stride, shift1_stride, scale2_stride, all_channels, channel, owned, scale_offset, SLAB,
    )  # fmt: skip
    if sums_ptr is not None:
        own = sums_ptr + sample * all_channels + channel
        tl.store(own, dscale, mask=owned)
        tl.store(own + tl.cast(num_samples, tl.int64) * all_channels, dshift, mask=owned)


@triton.jit
def _modulated_group_norm_bwd_apply_kernel(
    dy_ptr, dsummed_ptr, x_ptr, skip_ptr, seed_ptr, mean_ptr, coefficients_ptr, group_coefficients_ptr,
    dx_ptr, dskip_ptr,
    spatial, channels, skip_channels, num_slabs, slabs_of_x, num_chunks, num_programs, threshold, keep_scale,
    residual_scale,
    GROUP_CHANNELS: tl.constexpr, SLAB: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr,
    SEED_PER_SAMPLE: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """One program: dx of SLAB channels over a chunk of ROWS * TILES positions."""
    # Backwards: what the sums kernel read last is still in the L2 cache.
    slab, chunk, sample = device.chunk_of(num_programs - 1 - tl.program_id(0), num_slabs, num_chunks)
    part_slab, source_ptr, part_channels, part_start = device.part_of(
        slab, slabs_of_x, x_ptr, skip_ptr, channels, skip_channels
    )
    target_ptr = dx_ptr if skip_ptr is None else tl.where(slab >= slabs_of_x, dskip_ptr, dx_ptr)
    all_channels = channels + skip_channels
    column, row = tl.arange(0, SLAB), tl.arange(0, ROWS)
    part_channel = part_slab * SLAB
    owned = part_channel + column < part_channels
    first_channel = part_start + part_channel
    channel = first_channel + column
    first_row = chunk * (ROWS * TILES)
    stop_row = tl.minimum(first_row + ROWS * TILES, spatial)
    statistic = sample * (all_channels // GROUP_CHANNELS) + channel // GROUP_CHANNELS
    mean = tl.load(mean_ptr + statistic, mask=owned, other=0.0)
    slot = coefficients_ptr + sample * 2 * all_channels + channel
    scale = tl.load(slot, mask=owned, other=0.0)
    shift = tl.load(slot + all_channels, mask=owned, other=0.0)
    c1 = tl.load(group_coefficients_ptr + 2 * statistic, mask=owned, other=0.0)
    c2 = tl.load(group_coefficients_ptr + 2 * statistic + 1, mask=owned, other=0.0)
    for start in range(first_row, stop_row, ROWS):
        mask = (start + row < stop_row)[:, None] & owned[None, :]
        x, dp = device.load_gradient(
            source_ptr, dy_ptr, seed_ptr, mean, scale, shift, sample, start, part_channel, first_channel, spatial,
            part_channels, all_channels, mask, threshold, keep_scale,
            ROWS, SLAB, CHANNELS_LAST, WIDE, SILU, DROPOUT, SEED_PER_SAMPLE, EIGHTS,
        )  # fmt: skip
        device.store_input_gradient(
            target_ptr, dsummed_ptr, residual_scale, x, dp, scale, c1, c2, sample, start, part_channel, spatial,
            part_channels, mask, ROWS, SLAB, CHANNELS_LAST, WIDE,
        )  # fmt: skip


@triton.jit
def _modulated_group_norm_bwd_reduce_kernel(
    sums_ptr, dweight_ptr, dbias_ptr, num_blocks, all_channels, ROWS: tl.constexpr, SLAB: tl.constexpr
):
    """One program: the gradients of weight and bias of SLAB channels, summed over blocks in a fixed order."""
    channel, row = tl.program_id(0) * SLAB + tl.arange(0, SLAB), tl.arange(0, ROWS)
    owned = channel < all_channels
    dweight, dbias = tl.zeros((ROWS, SLAB), tl.float32), tl.zeros((ROWS, SLAB), tl.float32)
    for start in range(0, num_blocks, ROWS):
        block = (start + row).to(tl.int64)[:, None]
        mask = (block < num_blocks) & owned[None, :]
        own = sums_ptr + block * all_channels + channel[None, :]
        dweight += tl.load(own, mask=mask, other=0.0)
        dbias += tl.load(own + tl.cast(num_blocks, tl.int64) * all_channels, mask=mask, other=0.0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + channel, tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty), mask=owned)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + channel, tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty), mask=owned)
