"""Kernels of noising, of the denoising loss and of their gradients. Noise is regenerated, never read or written."""

from __future__ import annotations

import triton
import triton.language as tl

from soda_kernels.diffusion.triton_device import draw_step_index, load, look_up, noise, normal_pair, place, words


@triton.jit
def _philox_kernel(
    out_ptr, seed_ptr, ids_ptr, step_ptr, num, chunks,
    BLOCK: tl.constexpr, STREAM: tl.constexpr, NORMAL: tl.constexpr, STEP_PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of one sample, normal or uniform."""
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    seed, sample_id = tl.load(seed_ptr), tl.load(ids_ptr + sample)
    step = tl.load(step_ptr + sample if STEP_PER_SAMPLE else step_ptr)
    block = (chunk.to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.int32)
    w0, w1, w2, w3 = words(seed, sample_id, step, block, STREAM)
    if NORMAL:
        n0, n1 = normal_pair(w0, w1)
        n2, n3 = normal_pair(w2, w3)
    else:
        n0, n1 = (w0 >> 8).to(tl.float32) * 2.0**-24, (w1 >> 8).to(tl.float32) * 2.0**-24
        n2, n3 = (w2 >> 8).to(tl.float32) * 2.0**-24, (w3 >> 8).to(tl.float32) * 2.0**-24
    values = tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(BLOCK)
    element = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + sample.to(tl.int64) * num + element, values.to(out_ptr.dtype.element_ty), element < num)


@triton.jit
def _draw_step_index_kernel(
    drawn_ptr, seed_ptr, ids_ptr, step_ptr, batch, num_steps, first_stratum, num_strata,
    BLOCK: tl.constexpr, SAMPLING: tl.constexpr, TIMESTEP: tl.constexpr, SHARED_ID: tl.constexpr,
    STEP_PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """The step indices of BLOCK samples."""
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = sample < batch
    sample_id = tl.load(ids_ptr + sample, exists, 0)
    # One for each sample either way, as the counter's words are.
    step = tl.load(step_ptr + (sample if STEP_PER_SAMPLE else sample * 0), exists, 0)
    index = draw_step_index(tl.load(seed_ptr), sample_id, step, sample, num_steps, first_stratum, num_strata, SAMPLING,
                            TIMESTEP, SHARED_ID)  # fmt: skip
    tl.store(drawn_ptr + sample, index, exists)


@triton.jit
def _add_noise_kernel(
    x0_ptr, x_t_ptr, index_ptr, drawn_ptr, alpha_ptr, sigma_ptr, alpha_stride, sigma_stride, seed_ptr, ids_ptr,
    step_ptr, num_steps, first_stratum, num_strata, positions, channels, position_chunks, chunks,
    x0_position_stride, x0_channel_stride, x_t_position_stride, x_t_channel_stride,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, FOURS: tl.constexpr, STREAM: tl.constexpr,
    STEP_PER_SAMPLE: tl.constexpr, SAMPLING: tl.constexpr, TIMESTEP: tl.constexpr, SHARED_ID: tl.constexpr,
):  # fmt: skip
    """x_t = alpha x0 + sigma noise in one tile of one sample.

    Without an index every program draws its sample's, and the one of the first tile writes it.
    """
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    first_position, first_channel = chunk % position_chunks * POSITIONS, chunk // position_chunks * CHANNELS
    position, channel, exists = place(first_position, first_channel, positions, channels, POSITIONS, CHANNELS)
    start = sample.to(tl.int64) * channels * positions
    seed, sample_id = tl.load(seed_ptr), tl.load(ids_ptr + sample)
    step = tl.load(step_ptr + sample if STEP_PER_SAMPLE else step_ptr)
    if index_ptr is None:
        index = draw_step_index(seed, sample_id, step, sample, num_steps, first_stratum, num_strata, SAMPLING, TIMESTEP,
                                SHARED_ID)  # fmt: skip
        tl.store(drawn_ptr + sample, index, chunk == 0)
    else:
        index = tl.load(index_ptr + sample)
    drawn = noise(seed, sample_id, step, first_position, first_channel, positions, POSITIONS, CHANNELS, STREAM, FOURS)
    x0 = load(x0_ptr + start + position * x0_position_stride + channel * x0_channel_stride, exists)
    alpha = look_up(alpha_ptr, index, num_steps, alpha_stride)
    x_t = x0 * alpha + drawn * look_up(sigma_ptr, index, num_steps, sigma_stride)
    to = x_t_ptr + start + position * x_t_position_stride + channel * x_t_channel_stride
    tl.store(to, x_t.to(x_t_ptr.dtype.element_ty), exists)


@triton.jit
def _scale_samples_kernel(
    image_ptr, scaled_ptr, factor_ptr, index_ptr, factor_stride, num_factors, num, chunks, BLOCK: tl.constexpr
):
    """A sample's elements as they lie in memory, BLOCK of them, times the sample's factor.

    It is factor[sample], or with an index factor[index[sample]].
    """
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    if index_ptr is None:
        factor = tl.load(factor_ptr + sample.to(tl.int64) * factor_stride)
    else:
        factor = look_up(factor_ptr, tl.load(index_ptr + sample), num_factors, factor_stride)
    element = chunk * BLOCK + tl.arange(0, BLOCK)
    at = sample.to(tl.int64) * num + element
    scaled = tl.load(image_ptr + at, element < num, 0.0).to(tl.float32) * factor.to(tl.float32)
    tl.store(scaled_ptr + at, scaled.to(scaled_ptr.dtype.element_ty), element < num)


@triton.jit
def _denoising_loss_kernel(
    prediction_ptr, x0_ptr, index_ptr, alpha_ptr, sigma_ptr, alpha_stride, sigma_stride, weights_ptr, weights_stride,
    seed_ptr, ids_ptr, step_ptr, dloss_ptr, partial_ptr, loss_ptr, gradient_ptr,
    num_steps, positions, channels, position_chunks, chunks, loss_share,
    prediction_position_stride, prediction_channel_stride, x0_position_stride, x0_channel_stride, dloss_stride,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, FOURS: tl.constexpr, STREAM: tl.constexpr,
    STEP_PER_SAMPLE: tl.constexpr, TARGET: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Of one tile of one sample, or of SAMPLES small samples: the sum of squared errors, or the gradient, or both.

    Where the tile is the sample, the sum becomes its loss at once. The gradient is dloss weight 2 / M (prediction -
    target), without a dloss for 1, laid out as the prediction.
    """
    first_sample, chunk = tl.program_id(0) // chunks * SAMPLES, tl.program_id(0) % chunks
    first_position, first_channel = chunk % position_chunks * POSITIONS, chunk // position_chunks * CHANNELS
    position, channel, exists = place(first_position, first_channel, positions, channels, POSITIONS, CHANNELS)
    for further in range(SAMPLES):
        sample = first_sample + further
        start = sample.to(tl.int64) * channels * positions
        at = start + position * prediction_position_stride + channel * prediction_channel_stride
        error = load(prediction_ptr + at, exists)
        x0 = 0.0
        if TARGET != "eps":
            x0 = load(x0_ptr + start + position * x0_position_stride + channel * x0_channel_stride, exists)
        if TARGET == "x0":
            error -= x0
        else:
            step = tl.load(step_ptr + sample if STEP_PER_SAMPLE else step_ptr)
            target = noise(tl.load(seed_ptr), tl.load(ids_ptr + sample), step, first_position, first_channel, positions,
                           POSITIONS, CHANNELS, STREAM, FOURS)  # fmt: skip
            if TARGET == "v":
                index = tl.load(index_ptr + sample)
                alpha = look_up(alpha_ptr, index, num_steps, alpha_stride)
                target = alpha * target - look_up(sigma_ptr, index, num_steps, sigma_stride) * x0
            error -= target
        weight = 1.0
        if weights_ptr is not None and (partial_ptr is None or gradient_ptr is not None):
            weight = look_up(weights_ptr, tl.load(index_ptr + sample), num_steps, weights_stride)
        if gradient_ptr is not None:
            factor = 2.0 * loss_share * weight
            if dloss_ptr is not None:
                factor *= tl.load(dloss_ptr + sample.to(tl.int64) * dloss_stride).to(tl.float32)
            tl.store(gradient_ptr + at, (error * factor).to(gradient_ptr.dtype.element_ty), exists)
        if partial_ptr is not None or loss_ptr is not None:
            squares = tl.where(exists, error * error, 0.0)
            total = tl.sum(tl.sum(squares, axis=1), axis=0)
            if loss_ptr is not None:
                tl.store(loss_ptr + sample, total * loss_share * weight)
            else:
                tl.store(partial_ptr + tl.program_id(0), total)


@triton.jit
def _denoising_loss_total_kernel(
    partial_ptr, index_ptr, weights_ptr, weights_stride, loss_ptr, num_steps, chunks, loss_share, BLOCK: tl.constexpr
):
    """One sample's loss, from its tiles' sums in their order."""
    sample = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, chunks, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + sample.to(tl.int64) * chunks + chunk, chunk < chunks, 0.0)
    loss = tl.sum(total, axis=0) * loss_share
    if weights_ptr is not None:
        loss *= look_up(weights_ptr, tl.load(index_ptr + sample), num_steps, weights_stride)
    tl.store(loss_ptr + sample, loss)
