"""The kernels of a sampler step: guidance, its rescaling, x0, clipping, the step and its noise in one pass.

Formulas and their sources stand in reference.py; every program forms the step's few coefficients from the tables again.
To rescale guidance takes the standard deviations of whole samples. They come from the program that steps where it holds
a whole sample or walks over one first, else from a kernel before it, which leaves a few moments of each sample in their
order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from soda_kernels.diffusion.triton_device import load, look_up, noise, place


@triton.jit
def _sampler_step_kernel(
    x_t_ptr, cond_ptr, uncond_ptr, previous_x0_ptr, x_next_ptr, x0_ptr,
    alpha_ptr, sigma_ptr, logsnr_ptr, alpha_stride, sigma_stride, logsnr_stride,
    step_index_ptr, next_index_ptr, previous_index_ptr, seed_ptr, ids_ptr, moments_ptr,
    num_steps, positions, channels, position_chunks, chunks, parts, cfg_scale, eta, clip_x0, guidance_rescale,
    position_stride, channel_stride,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, FOURS: tl.constexpr, STREAM: tl.constexpr,
    METHOD: tl.constexpr, TARGET: tl.constexpr, CLIPS: tl.constexpr, DRAWS: tl.constexpr, RESCALES: tl.constexpr,
    WALKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """x_next and x0 in one tile of one sample; all images have one layout.

    Guidance is rescaled by moments from before; without them the tile has to be the sample, or the program WALKS: over
    all of the sample for its moments, then over every parts-th tile, of which the caches still hold what they can.
    """
    programs = parts if WALKS else chunks
    sample, first_chunk = tl.program_id(0) // programs, tl.program_id(0) % programs
    start = sample.to(tl.int64) * channels * positions
    factor = 1.0
    if WALKS:
        moments = _moments(cond_ptr + start, uncond_ptr + start, cfg_scale, 0, channels * positions,
                           POSITIONS * CHANNELS)  # fmt: skip
        factor = _rescaling(moments[2], moments[4], guidance_rescale)
    elif RESCALES and moments_ptr is not None:
        cond_square, square = _merged(moments_ptr + sample * 5 * parts, parts, PARTS)
        factor = _rescaling(cond_square, square, guidance_rescale)

    index, next_index = tl.load(step_index_ptr), tl.load(next_index_ptr)
    clean = next_index < 0
    inside = tl.maximum(next_index, 0)
    alpha_t = look_up(alpha_ptr, index, num_steps, alpha_stride)
    sigma_t = look_up(sigma_ptr, index, num_steps, sigma_stride)
    alpha_s = tl.where(clean, 1.0, look_up(alpha_ptr, inside, num_steps, alpha_stride))
    sigma_s = tl.where(clean, 0.0, look_up(sigma_ptr, inside, num_steps, sigma_stride))
    rate = alpha_t / alpha_s
    beta = tl.maximum(sigma_t * sigma_t - (rate * sigma_s) * (rate * sigma_s), 0.0)
    ratio = sigma_s / sigma_t
    if METHOD == "ddim":
        of_x_t = ratio * tl.sqrt_rn((1.0 - eta * eta) + (eta * rate * ratio) * (eta * rate * ratio))
        of_x0 = alpha_s - of_x_t * alpha_t
        noise_std = eta * ratio * tl.sqrt_rn(beta)
    elif METHOD == "ddpm":
        of_x_t = rate * ratio * ratio
        of_x0 = alpha_s * beta / (sigma_t * sigma_t)
        noise_std = ratio * tl.sqrt_rn(beta)

    # Of programs that do not walk the one tile.
    end = chunks if WALKS else first_chunk + 1
    for chunk in range(first_chunk, end, programs if WALKS else 1):
        first_position, first_channel = chunk % position_chunks * POSITIONS, chunk // position_chunks * CHANNELS
        position, channel, exists = place(first_position, first_channel, positions, channels, POSITIONS, CHANNELS)
        at = start + position * position_stride + channel * channel_stride
        prediction = load(cond_ptr + at, exists)
        if uncond_ptr is not None:
            cond = prediction
            uncond = load(uncond_ptr + at, exists)
            prediction = uncond + cfg_scale * (cond - uncond)
            if RESCALES:
                if not WALKS and moments_ptr is None:
                    count = channels * positions
                    _, cond_square = _centred(cond, exists, count)
                    _, square = _centred(prediction, exists, count)
                    factor = _rescaling(cond_square, square, guidance_rescale)
                prediction *= factor
        x_t = load(x_t_ptr + at, exists)
        if TARGET == "eps":
            x0 = (x_t - sigma_t * prediction) * (1.0 / alpha_t)
        elif TARGET == "v":
            x0 = alpha_t * x_t - sigma_t * prediction
        else:
            x0 = prediction
        if CLIPS:
            # Not tl.clamp: a NaN has to stay one.
            x0 = tl.where(x0 > clip_x0, clip_x0, tl.where(x0 < -clip_x0, -clip_x0, x0))

        if METHOD != "dpmpp_2m":
            x_next = of_x_t * x_t + of_x0 * x0
        else:
            half_t = look_up(logsnr_ptr, index, num_steps, logsnr_stride) / 2
            h = look_up(logsnr_ptr, inside, num_steps, logsnr_stride) / 2 - half_t
            extrapolated = x0
            if previous_x0_ptr is not None:
                h_previous = half_t - look_up(logsnr_ptr, tl.load(previous_index_ptr), num_steps, logsnr_stride) / 2
                weight = tl.where(clean | (h_previous == 0.0), 0.0, h / (2.0 * h_previous))
                extrapolated += weight * (x0 - load(previous_x0_ptr + at, exists))
            decay = tl.where(clean, -1.0, _expm1(-h))
            x_next = ratio * x_t - alpha_s * decay * extrapolated
        if DRAWS:
            drawn = noise(tl.load(seed_ptr), tl.load(ids_ptr + sample), index, first_position, first_channel, positions,
                          POSITIONS, CHANNELS, STREAM, FOURS)  # fmt: skip
            x_next += noise_std * drawn
        tl.store(x_next_ptr + at, x_next.to(x_next_ptr.dtype.element_ty), exists)
        tl.store(x0_ptr + at, x0.to(x0_ptr.dtype.element_ty), exists)


@triton.jit
def _expm1(x):
    """Return e^x - 1 for x <= 0: where x is small by its series, which loses no digits."""
    series = x * (1.0 + x * (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720))))))
    return tl.where(x > -0.3, series, tl.exp(x) - 1.0)


@triton.jit
def _guidance_moments_kernel(
    cond_ptr, uncond_ptr, moments_ptr, cfg_scale, num, part_size, parts, BLOCK: tl.constexpr
):
    """Count, means and sums of squared deviations of cond and of guided outputs, over one part of one sample.

    A part is part_size elements as they lie in memory, taken BLOCK at a time and merged in order by Chan's formula.
    """
    sample, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    start = sample.to(tl.int64) * num
    end = part * part_size + tl.minimum(part_size, num - part * part_size)
    moments = _moments(cond_ptr + start, uncond_ptr + start, cfg_scale, part * part_size, end, BLOCK)
    to = moments_ptr + sample * 5 * parts + part
    tl.store(to, moments[0])
    tl.store(to + parts, moments[1])
    tl.store(to + 2 * parts, moments[2])
    tl.store(to + 3 * parts, moments[3])
    tl.store(to + 4 * parts, moments[4])


@triton.jit
def _moments(cond_ptr, uncond_ptr, cfg_scale, begin, end, BLOCK: tl.constexpr):
    """Return the count, and the mean and sum of squared deviations of cond and of guided outputs, from begin to end.

    Every BLOCK-th element by Welford's recurrence, without a word between threads; then these by Chan's formula.
    """
    lane = tl.arange(0, BLOCK)
    cond_means, cond_squares = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    means, squares = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    rounds = 0.0
    for first in range(begin, end, BLOCK):
        exists = first + lane < end
        cond = load(cond_ptr + first + lane, exists)
        uncond = load(uncond_ptr + first + lane, exists)
        rounds += 1.0
        share = 1.0 / rounds
        cond_means, cond_squares = _with_one_more(cond, exists, share, cond_means, cond_squares)
        guided = uncond + cfg_scale * (cond - uncond)
        means, squares = _with_one_more(guided, exists, share, means, squares)
    # Of a last round that is not full, some have one less.
    counts = (end - begin - lane + (BLOCK - 1)) // BLOCK
    count = (end - begin).to(tl.float32)
    cond_mean, cond_square = _of_all(cond_means, cond_squares, counts, count)
    mean, square = _of_all(means, squares, counts, count)
    return count, cond_mean, cond_square, mean, square


@triton.jit
def _with_one_more(values, exists, share, means, squares):
    """Return means and sums of squared deviations with a further value each, where it exists; share is 1 / count."""
    deviation = tl.where(exists, values - means, 0.0)
    means += deviation * share
    return means, squares + deviation * tl.where(exists, values - means, 0.0)


@triton.jit
def _of_all(means, squares, counts, count):
    """Return the mean and sum of squared deviations of all, from those of several, counts of them each."""
    weights = counts.to(tl.float32)
    mean = tl.sum(means * weights, axis=0) / count
    return mean, tl.sum(squares + weights * (means - mean) * (means - mean), axis=0)


@triton.jit
def _rescaling(cond_square, square, guidance_rescale):
    """Return by what guided outputs are multiplied; a sample that does not vary is left as it is."""
    same = square == 0.0
    ratio = tl.where(same, 1.0, tl.sqrt_rn(cond_square / tl.where(same, 1.0, square)))
    return guidance_rescale * ratio + (1.0 - guidance_rescale)


@triton.jit
def _centred(values, exists, count):
    """Return the mean of the values that exist, count of them, and the sum of their squared deviations from it."""
    mean = tl.sum(tl.where(exists, values, 0.0)) / count
    deviation = tl.where(exists, values - mean, 0.0)
    return mean, tl.sum(deviation * deviation)


@triton.jit
def _merged(moments_ptr, parts, PARTS: tl.constexpr):
    """Return a sample's sums of squared deviations of cond and of guided outputs, from those of its parts."""
    part = tl.arange(0, PARTS)
    exists = part < parts
    count = tl.load(moments_ptr + part, exists, 0.0)
    share = count / tl.sum(count, axis=0)
    return (
        _merged_square(moments_ptr + parts, part, exists, parts, count, share),
        _merged_square(moments_ptr + 3 * parts, part, exists, parts, count, share),
    )


@triton.jit
def _merged_square(mean_ptr, part, exists, parts, count, share):
    """Return a sample's sum of squared deviations, from its parts' means and, behind those, their own sums."""
    means = tl.load(mean_ptr + part, exists, 0.0)
    deviation = means - tl.sum(means * share, axis=0)
    squares = tl.load(mean_ptr + parts + part, exists, 0.0)
    return tl.sum(squares + count * deviation * deviation, axis=0)
