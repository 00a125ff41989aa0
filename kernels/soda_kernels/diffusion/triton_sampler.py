"""The kernel of a sampler step: guidance, x0, clipping, the step and its noise in one pass.

Formulas and their sources stand in reference.py; every program forms the step's few coefficients from the tables again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from soda_kernels.diffusion.triton_device import look_up, noise, place


@triton.jit
def _sampler_step_kernel(
    x_t_ptr, cond_ptr, uncond_ptr, previous_x0_ptr, x_next_ptr, x0_ptr,
    alpha_ptr, sigma_ptr, logsnr_ptr, step_index_ptr, next_index_ptr, previous_index_ptr, seed_ptr, ids_ptr,
    num_steps, positions, channels, position_chunks, chunks, cfg_scale, eta, clip_x0,
    position_stride, channel_stride,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, FOURS: tl.constexpr, STREAM: tl.constexpr,
    METHOD: tl.constexpr, TARGET: tl.constexpr, CLIPS: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """x_next and x0 in one tile of one sample; all images have one layout."""
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    first_position, first_channel = chunk % position_chunks * POSITIONS, chunk // position_chunks * CHANNELS
    position, channel, exists = place(first_position, first_channel, positions, channels, POSITIONS, CHANNELS)
    at = sample.to(tl.int64) * channels * positions + position * position_stride + channel * channel_stride

    index, next_index = tl.load(step_index_ptr), tl.load(next_index_ptr)
    clean = next_index < 0
    inside = tl.maximum(next_index, 0)
    alpha_t, sigma_t = look_up(alpha_ptr, index, num_steps), look_up(sigma_ptr, index, num_steps)
    alpha_s = tl.where(clean, 1.0, look_up(alpha_ptr, inside, num_steps))
    sigma_s = tl.where(clean, 0.0, look_up(sigma_ptr, inside, num_steps))
    rate = alpha_t / alpha_s
    beta = tl.maximum(sigma_t * sigma_t - (rate * sigma_s) * (rate * sigma_s), 0.0)

    x_t = tl.load(x_t_ptr + at, exists, 0.0).to(tl.float32)
    prediction = tl.load(cond_ptr + at, exists, 0.0).to(tl.float32)
    if uncond_ptr is not None:
        uncond = tl.load(uncond_ptr + at, exists, 0.0).to(tl.float32)
        prediction = uncond + cfg_scale * (prediction - uncond)
    if TARGET == "eps":
        x0 = (x_t - sigma_t * prediction) / alpha_t
    elif TARGET == "v":
        x0 = alpha_t * x_t - sigma_t * prediction
    else:
        x0 = prediction
    if CLIPS:
        # Not tl.clamp: a NaN has to stay one.
        x0 = tl.where(x0 > clip_x0, clip_x0, tl.where(x0 < -clip_x0, -clip_x0, x0))

    if METHOD == "ddim":
        ratio = sigma_s / sigma_t
        eps = (x_t - alpha_t * x0) / sigma_t
        kept = tl.sqrt_rn((1.0 - eta * eta) + (eta * rate * ratio) * (eta * rate * ratio))
        x_next = alpha_s * x0 + sigma_s * kept * eps
        noise_std = eta * ratio * tl.sqrt_rn(beta)
    elif METHOD == "ddpm":
        x_next = (alpha_s * beta * x0 + rate * (sigma_s * sigma_s) * x_t) / (sigma_t * sigma_t)
        noise_std = (sigma_s / sigma_t) * tl.sqrt_rn(beta)
    else:
        half_t = look_up(logsnr_ptr, index, num_steps) / 2
        h = look_up(logsnr_ptr, inside, num_steps) / 2 - half_t
        extrapolated = x0
        if previous_x0_ptr is not None:
            h_previous = half_t - look_up(logsnr_ptr, tl.load(previous_index_ptr), num_steps) / 2
            weight = tl.where(clean | (h_previous == 0.0), 0.0, h / (2.0 * h_previous))
            extrapolated += weight * (x0 - tl.load(previous_x0_ptr + at, exists, 0.0).to(tl.float32))
        decay = tl.where(clean, -1.0, _expm1(-h))
        x_next = (sigma_s / sigma_t) * x_t - alpha_s * decay * extrapolated
        noise_std = 0.0
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
