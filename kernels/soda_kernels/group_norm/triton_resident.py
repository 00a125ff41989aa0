"""Group norm in one launch: a program owns whole groups of a sample, and nothing of them is read from memory twice.

Where one tile holds the groups they stay in registers; otherwise the program walks over them twice, and the second
walk finds them in the L1 or L2 cache. Memory traffic is the floor in both cases: x read, y written; x and dy read, dx
written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from soda_kernels.group_norm import triton_device as device


@triton.jit
def _modulated_group_norm_fwd_resident_kernel(
    x_ptr, skip_ptr, residual_ptr, weight_ptr, bias_ptr, scale1_ptr, shift1_ptr, scale2_ptr, shift2_ptr, seed_ptr,
    y_ptr, summed_ptr, mean_ptr, rstd_ptr,
    num_samples, spatial, channels, skip_channels, num_slabs, slabs_of_x,
    scale1_stride, shift1_stride, scale2_stride, shift2_stride, scale_offset, eps, threshold, keep_scale,
    residual_scale,
    GROUP_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, SLAB: tl.constexpr,
    ROWS: tl.constexpr, HELD: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    SILU: tl.constexpr, DROPOUT: tl.constexpr, SEED_PER_SAMPLE: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """One program: GROUPS whole groups of up to SAMPLES samples."""
    slab = tl.program_id(0) % num_slabs
    first_sample = tl.program_id(0) // num_slabs * SAMPLES
    part_slab, source_ptr, part_channels, part_start = device.part_of(
        slab, slabs_of_x, x_ptr, skip_ptr, channels, skip_channels
    )
    all_channels = channels + skip_channels
    num_groups = all_channels // GROUP_CHANNELS
    part_channel = part_slab * (GROUPS * GROUP_CHANNELS)
    first_channel = part_start + part_channel
    column, row = tl.arange(0, SLAB), tl.arange(0, ROWS)
    group = tl.arange(0, GROUPS_PADDED)
    owned = column < GROUPS * GROUP_CHANNELS
    channel = first_channel + column
    elements = tl.cast(spatial, tl.float32) * GROUP_CHANNELS

    for sample in range(first_sample, tl.minimum(first_sample + SAMPLES, num_samples)):
        wide_sample = tl.cast(sample, tl.int64)
        # Sums are taken of x minus one element of the group: exact digits when the mean is large.
        group_channel = part_channel + group * GROUP_CHANNELS
        if CHANNELS_LAST:
            anchor = wide_sample * spatial * part_channels + group_channel
        else:
            anchor = (wide_sample * part_channels + group_channel) * spatial
        pivot_g = tl.load(source_ptr + anchor, mask=group < GROUPS, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            pivot_g += tl.load(residual_ptr + anchor, mask=group < GROUPS, other=0.0).to(tl.float32)
            # Rounded as the sum is, whose norm then has the same bits.
            pivot_g = device.scaled(pivot_g, residual_scale).to(source_ptr.dtype.element_ty).to(tl.float32)
        pivot = device.spread(pivot_g, GROUP_CHANNELS, GROUPS_PADDED, SLAB)

        if HELD:
            mask = (row < spatial)[:, None] & owned[None, :]
            x = device.load_sum(
                source_ptr, residual_ptr, residual_scale, summed_ptr, wide_sample, 0, part_channel, spatial,
                part_channels, mask, ROWS, SLAB, CHANNELS_LAST, WIDE,
            )  # fmt: skip
            x = tl.where(mask, x - pivot[None, :], 0.0)
            sums = device.group_sum(tl.sum(x, axis=0), GROUP_CHANNELS, GROUPS_PADDED, SLAB)
            mean = sums / elements
            mean_c = device.spread(mean, GROUP_CHANNELS, GROUPS_PADDED, SLAB)
            x = tl.where(mask, x - mean_c[None, :], 0.0)
            squares = device.group_sum(tl.sum(x * x, axis=0), GROUP_CHANNELS, GROUPS_PADDED, SLAB)
        else:
            # Welford's recurrence for each position of the tile: no thread waits for another until the end.
            position_mean = tl.zeros((ROWS, SLAB), tl.float32)
            position_squares = tl.zeros((ROWS, SLAB), tl.float32)
            for start in range(0, spatial, ROWS):
                mask = (start + row < spatial)[:, None] & owned[None, :]
                x = device.load_sum(
                    source_ptr, residual_ptr, residual_scale, summed_ptr, wide_sample, start, part_channel, spatial,
                    part_channels, mask, ROWS, SLAB, CHANNELS_LAST, WIDE,
                )  # fmt: skip
                x = tl.where(mask, x - pivot[None, :], 0.0)
                delta = tl.where(mask, x - position_mean, 0.0)
                position_mean += delta / tl.cast(start // ROWS + 1, tl.float32)
                position_squares += delta * (x - position_mean)
            counts = ((spatial - row + ROWS - 1) // ROWS).to(tl.float32)[:, None]
            sums = device.group_sum(tl.sum(counts * position_mean, axis=0), GROUP_CHANNELS, GROUPS_PADDED, SLAB)
            mean = sums / elements
            mean_c = device.spread(mean, GROUP_CHANNELS, GROUPS_PADDED, SLAB)
            away = tl.where(owned[None, :], position_mean - mean_c[None, :], 0.0)
            squares = tl.sum(position_squares + counts * away * away, axis=0)
            squares = device.group_sum(squares, GROUP_CHANNELS, GROUPS_PADDED, SLAB)

        rstd = 1.0 / tl.sqrt_rn(squares / elements + eps)
        statistic = wide_sample * num_groups + first_channel // GROUP_CHANNELS + group
        tl.store(mean_ptr + statistic, mean + pivot_g, mask=group < GROUPS)
        tl.store(rstd_ptr + statistic, rstd, mask=group < GROUPS)

        scale, shift = device.folded(
            weight_ptr, bias_ptr, scale1_ptr, shift1_ptr, scale2_ptr, shift2_ptr, wide_sample,
            scale1_stride, shift1_stride, scale2_stride, shift2_stride, channel, owned, scale_offset, SLAB,
        )  # fmt: skip
        scale *= device.spread(rstd, GROUP_CHANNELS, GROUPS_PADDED, SLAB)
        if HELD:
            y = device.activate(x * scale[None, :] + shift[None, :], SILU)
            if DROPOUT:
                keep = device.keep_mask(
                    seed_ptr, sample, 0, first_channel, spatial, threshold, ROWS, SLAB, SEED_PER_SAMPLE, EIGHTS
                )
                y *= tl.where(keep, keep_scale, 0.0)  # a NaN stays one
            y_tile = device.tile(
                y_ptr, wide_sample, 0, first_channel, spatial, all_channels, ROWS, SLAB, CHANNELS_LAST, WIDE
            )
            tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")
        else:
            num_tiles = tl.cdiv(spatial, ROWS)
            for index in range(num_tiles):
                start = (num_tiles - 1 - index) * ROWS  # the tiles read last are the nearest in the caches
                mask = (start + row < spatial)[:, None] & owned[None, :]
                x = device.load_sum(
                    source_ptr, residual_ptr, residual_scale, None, wide_sample, start, part_channel, spatial,
                    part_channels, mask, ROWS, SLAB, CHANNELS_LAST, WIDE,
                )  # fmt: skip
                x = (x - pivot[None, :]) - mean_c[None, :]
                y = device.activate(x * scale[None, :] + shift[None, :], SILU)
                if DROPOUT:
                    keep = device.keep_mask(
                        seed_ptr, sample, start, first_channel, spatial, threshold, ROWS, SLAB, SEED_PER_SAMPLE, EIGHTS
                    )
                    y *= tl.where(keep, keep_scale, 0.0)  # a NaN stays one
                y_tile = device.tile(
                    y_ptr, wide_sample, start, first_channel, spatial, all_channels, ROWS, SLAB, CHANNELS_LAST, WIDE
                )
                tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def _modulated_group_norm_bwd_resident_kernel(
    dy_ptr, dsummed_ptr, x_ptr, skip_ptr, weight_ptr, bias_ptr, scale1_ptr, shift1_ptr, scale2_ptr, shift2_ptr,
    mean_ptr, rstd_ptr, seed_ptr,
    dx_ptr, dskip_ptr, dscale1_ptr, dshift1_ptr, dscale2_ptr, dshift2_ptr, sums_ptr,
    num_samples, spatial, channels, skip_channels, num_slabs, slabs_of_x, num_blocks,
    scale1_stride, shift1_stride, scale2_stride, shift2_stride, scale_offset, threshold, keep_scale, residual_scale,
    GROUP_CHANNELS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, SLAB: tl.constexpr,
    ROWS: tl.constexpr, HELD: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    SILU: tl.constexpr, DROPOUT: tl.constexpr, SEED_PER_SAMPLE: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """One program: GROUPS whole groups of up to SAMPLES samples, whose sums for weight and bias are one row."""
    slab = tl.program_id(0) % num_slabs
    block = tl.program_id(0) // num_slabs
    part_slab, source_ptr, part_channels, part_start = device.part_of(
        slab, slabs_of_x, x_ptr, skip_ptr, channels, skip_channels
    )
    target_ptr = dx_ptr if skip_ptr is None else tl.where(slab >= slabs_of_x, dskip_ptr, dx_ptr)
    all_channels = channels + skip_channels
    num_groups = all_channels // GROUP_CHANNELS
    part_channel = part_slab * (GROUPS * GROUP_CHANNELS)
    first_channel = part_start + part_channel
    column, row = tl.arange(0, SLAB), tl.arange(0, ROWS)
    owned = column < GROUPS * GROUP_CHANNELS
    channel = first_channel + column
    elements = tl.cast(spatial, tl.float32) * GROUP_CHANNELS
    dweight, dbias = tl.zeros((SLAB,), tl.float32), tl.zeros((SLAB,), tl.float32)

    for sample in range(block * SAMPLES, tl.minimum((block + 1) * SAMPLES, num_samples)):
        wide_sample = tl.cast(sample, tl.int64)
        scale, shift = device.folded(
            weight_ptr, bias_ptr, scale1_ptr, shift1_ptr, scale2_ptr, shift2_ptr, wide_sample,
            scale1_stride, shift1_stride, scale2_stride, shift2_stride, channel, owned, scale_offset, SLAB,
        )  # fmt: skip
        statistic = wide_sample * num_groups + channel // GROUP_CHANNELS
        mean = tl.load(mean_ptr + statistic, mask=owned, other=0.0)
        rstd = tl.load(rstd_ptr + statistic, mask=owned, other=0.0)

        # dshift = sum dp, dscale = sum dp * x_hat over space
        if HELD:
            mask = (row < spatial)[:, None] & owned[None, :]
            x, dp = device.load_gradient(
                source_ptr, dy_ptr, seed_ptr, mean, rstd * scale, shift, sample, 0, part_channel, first_channel,
                spatial, part_channels, all_channels, mask, threshold, keep_scale,
                ROWS, SLAB, CHANNELS_LAST, WIDE, SILU, DROPOUT, SEED_PER_SAMPLE, EIGHTS,
            )  # fmt: skip
            dshift = tl.sum(dp, axis=0)
            dscale = tl.sum(dp * x, axis=0) * rstd
        else:
            position_dshift = tl.zeros((ROWS, SLAB), tl.float32)
            position_dscale = tl.zeros((ROWS, SLAB), tl.float32)
            for start in range(0, spatial, ROWS):
                mask = (start + row < spatial)[:, None] & owned[None, :]
                x, dp = device.load_gradient(
                    source_ptr, dy_ptr, seed_ptr, mean, rstd * scale, shift, sample, start, part_channel, first_channel,
                    spatial, part_channels, all_channels, mask, threshold, keep_scale,
                    ROWS, SLAB, CHANNELS_LAST, WIDE, SILU, DROPOUT, SEED_PER_SAMPLE, EIGHTS,
                )  # fmt: skip
                position_dshift += dp
                position_dscale += dp * x
            dshift = tl.sum(position_dshift, axis=0)
            dscale = tl.sum(position_dscale, axis=0) * rstd

        c1 = device.group_sum(scale * dshift, GROUP_CHANNELS, GROUPS_PADDED, SLAB) / elements
        c2 = device.group_sum(scale * dscale, GROUP_CHANNELS, GROUPS_PADDED, SLAB) / elements
        c1 = device.spread(c1, GROUP_CHANNELS, GROUPS_PADDED, SLAB) * rstd
        c2 = device.spread(c2, GROUP_CHANNELS, GROUPS_PADDED, SLAB) * rstd * rstd
        if HELD:
            device.store_input_gradient(
                target_ptr, dsummed_ptr, residual_scale, x, dp, rstd * scale, c1, c2, sample, 0, part_channel, spatial,
                part_channels, mask, ROWS, SLAB, CHANNELS_LAST, WIDE,
            )  # fmt: skip
        else:
            num_tiles = tl.cdiv(spatial, ROWS)
            for index in range(num_tiles):
                start = (num_tiles - 1 - index) * ROWS  # the tiles read last are the nearest in the caches
                mask = (start + row < spatial)[:, None] & owned[None, :]
                x, dp = device.load_gradient(
                    source_ptr, dy_ptr, seed_ptr, mean, rstd * scale, shift, sample, start, part_channel, first_channel,
                    spatial, part_channels, all_channels, mask, threshold, keep_scale,
                    ROWS, SLAB, CHANNELS_LAST, WIDE, SILU, DROPOUT, SEED_PER_SAMPLE, EIGHTS,
                )  # fmt: skip
                device.store_input_gradient(
                    target_ptr, dsummed_ptr, residual_scale, x, dp, rstd * scale, c1, c2, sample, start, part_channel,
                    spatial, part_channels, mask, ROWS, SLAB, CHANNELS_LAST, WIDE,
                )  # fmt: skip

        dscale, dshift = device.parameter_gradients(
            dscale, dshift, weight_ptr, bias_ptr, scale1_ptr, shift1_ptr, scale2_ptr,
            dscale1_ptr, dshift1_ptr, dscale2_ptr, dshift2_ptr, wide_sample,
            scale1_stride, shift1_stride, scale2_stride, all_channels, channel, owned, scale_offset, SLAB,
        )  # fmt: skip
        if SAMPLES == 1:  # sums over one sample would still cost registers
            dweight, dbias = dscale, dshift
        else:
            dweight += dscale
            dbias += dshift

    if sums_ptr is not None:
        own = tl.cast(block, tl.int64) * all_channels + channel
        tl.store(sums_ptr + own, dweight, mask=owned)
        tl.store(sums_ptr + tl.cast(num_blocks, tl.int64) * all_channels + own, dbias, mask=owned)
