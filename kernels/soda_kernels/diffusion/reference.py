"""Noising, the denoising loss and sampler steps in plain PyTorch: the definition of the ops.

Noise is regenerated from its counter wherever it is needed and never returned. Arithmetic is in fp32, or in fp64 where
the images are fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soda_kernels import _philox
from soda_kernels._checks import image_memory_format

TARGETS = ("eps", "v", "x0")
METHODS = ("ddpm", "ddim", "dpmpp_2m")


def philox_normal(seed: Tensor, sample_ids: Tensor, step: Tensor, num: int, stream: int, dtype: torch.dtype) -> Tensor:
    """Return (N, num) normals."""
    return _philox.normal(num, seed, sample_ids, step, stream, dtype).contiguous()


def philox_uniform(seed: Tensor, sample_ids: Tensor, step: Tensor, num: int, stream: int, dtype: torch.dtype) -> Tensor:
    """Return (N, num) uniforms."""
    return _philox.uniform(num, seed, sample_ids, step, stream, dtype).contiguous()


def add_noise(
    x0: Tensor, step_index: Tensor, alpha: Tensor, sigma: Tensor, seed: Tensor, sample_ids: Tensor, step: Tensor
) -> Tensor:
    """Return alpha * x0 + sigma * noise."""
    alpha_n, sigma_n = (_per_sample(_look_up(table, step_index), x0) for table in (alpha, sigma))
    noise = _noise(x0, seed, sample_ids, step, "noise")
    return _finish(_widen(x0) * alpha_n + noise * sigma_n, x0)


def add_noise_backward(dx_t: Tensor, step_index: Tensor, alpha: Tensor) -> Tensor:
    """Return dx0 = alpha * dx_t."""
    return _finish(_widen(dx_t) * _per_sample(_look_up(alpha, step_index), dx_t), dx_t)


def denoising_loss(
    prediction: Tensor, x0: Tensor, step_index: Tensor, alpha: Tensor, sigma: Tensor, weights: Tensor | None,
    seed: Tensor, sample_ids: Tensor, step: Tensor, target: str,
) -> Tensor:  # fmt: skip
    """Return weight * mean((prediction - target)^2) for each sample."""
    error = _error(prediction, x0, step_index, alpha, sigma, seed, sample_ids, step, target)
    loss = error.square_().flatten(1).mean(1)
    return loss if weights is None else loss * _look_up(weights, step_index).to(loss.dtype)


def denoising_loss_backward(
    dloss: Tensor, prediction: Tensor, x0: Tensor, step_index: Tensor, alpha: Tensor, sigma: Tensor,
    weights: Tensor | None, seed: Tensor, sample_ids: Tensor, step: Tensor, target: str,
) -> Tensor:  # fmt: skip
    """Return dprediction = dloss * weight * 2 / M * (prediction - target), with M elements a sample."""
    error = _error(prediction, x0, step_index, alpha, sigma, seed, sample_ids, step, target)
    factor = dloss.to(error.dtype) * (2 / max(1, prediction[:1].numel()))
    if weights is not None:
        factor = factor * _look_up(weights, step_index).to(error.dtype)
    return _finish(error.mul_(_per_sample(factor, error)), prediction)


def sampler_step(
    x_t: Tensor, cond: Tensor, uncond: Tensor | None, alpha: Tensor, sigma: Tensor, logsnr: Tensor,
    step_index: Tensor, next_index: Tensor, method: str, target: str, cfg_scale: float, eta: float,
    clip_x0: float | None, previous_x0: Tensor | None, previous_index: Tensor | None, seed: Tensor | None,
    sample_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (x_next, x0)."""
    wide = _widen(x_t)
    compute = wide.dtype
    alpha_t, sigma_t = (_look_up(table, step_index).to(compute) for table in (alpha, sigma))
    clean = next_index < 0
    inside = next_index.clamp(min=0)
    alpha_s = torch.where(clean, 1.0, torch.take(alpha, inside).to(compute))
    sigma_s = torch.where(clean, 0.0, torch.take(sigma, inside).to(compute))

    prediction = _widen(cond)
    if uncond is not None:
        unconditional = _widen(uncond)
        prediction = unconditional + cfg_scale * (prediction - unconditional)
    if target == "eps":
        x0 = (wide - sigma_t * prediction) / alpha_t
    elif target == "v":
        x0 = alpha_t * wide - sigma_t * prediction
    else:
        x0 = prediction
    if clip_x0 is not None:
        x0 = x0.clamp(-clip_x0, clip_x0)

    # alpha_t / alpha_s is the step's own signal rate. Its beta, 1 - rate^2, is formed from the sigmas: taken from 1 in
    # fp32 it was 0.3% off at the clean end of the cosine schedule, where sigma^2 is 1e-5.
    rate = alpha_t / alpha_s
    beta = (sigma_t.square() - (rate * sigma_s).square()).clamp(min=0)
    if method == "ddim":
        # Song et al. 2021, equations 12 and 16, with sigma_s^2 - noise_std^2 written as a sum, so that nothing cancels.
        ratio = sigma_s / sigma_t
        noise_std = eta * ratio * beta.sqrt()
        eps = (wide - alpha_t * x0) / sigma_t
        x_next = alpha_s * x0 + sigma_s * ((1 - eta**2) + (eta * rate * ratio).square()).sqrt() * eps
        if eta > 0.0:
            x_next = x_next + noise_std * _sampler_noise(x_t, seed, sample_ids, step_index)
    elif method == "ddpm":
        # Ho et al. 2020, equations 6 and 7, between any two steps.
        mean = (alpha_s * beta * x0 + rate * sigma_s.square() * wide) / sigma_t.square()
        x_next = mean + (sigma_s / sigma_t) * beta.sqrt() * _sampler_noise(x_t, seed, sample_ids, step_index)
    else:
        x_next = _dpmpp_2m(wide, x0, alpha_s, sigma_t, sigma_s, logsnr, step_index, inside, clean, previous_x0,
                           previous_index)  # fmt: skip
    return _finish(x_next, x_t), _finish(x0, x_t)


def _dpmpp_2m(
    x_t: Tensor, x0: Tensor, alpha_s: Tensor, sigma_t: Tensor, sigma_s: Tensor, logsnr: Tensor, step_index: Tensor,
    next_index: Tensor, clean: Tensor, previous_x0: Tensor | None, previous_index: Tensor | None,
) -> Tensor:  # fmt: skip
    """Lu et al. 2022 (DPM-Solver++), algorithm 2, in lambda = logsnr / 2; the step to the clean end is first-order."""
    half_logsnr = logsnr.to(x_t.dtype) / 2
    h = torch.take(half_logsnr, next_index) - torch.take(half_logsnr, step_index)
    extrapolated = x0
    if previous_x0 is not None:
        assert previous_index is not None
        h_previous = torch.take(half_logsnr, step_index) - torch.take(half_logsnr, previous_index)
        # A clamped table can hold one noise level twice; a step between equals says nothing of the slope.
        weight = torch.where(clean | (h_previous == 0), 0.0, h / (2 * h_previous))
        extrapolated = x0 + weight * (x0 - _widen(previous_x0))
    decay = torch.where(clean, -1.0, torch.expm1(-h))
    return (sigma_s / sigma_t) * x_t - alpha_s * decay * extrapolated


def _error(
    prediction: Tensor, x0: Tensor, step_index: Tensor, alpha: Tensor, sigma: Tensor, seed: Tensor, sample_ids: Tensor,
    step: Tensor, target: str,
) -> Tensor:  # fmt: skip
    """Return prediction - target as a new tensor."""
    wide = prediction.to(torch.promote_types(_compute_dtype(prediction), _compute_dtype(x0)))
    if target == "x0":
        return wide - x0
    noise = _noise(x0, seed, sample_ids, step, "noise").to(wide.dtype)
    if target == "eps":
        return wide - noise
    alpha_n, sigma_n = (_per_sample(_look_up(table, step_index), x0).to(wide.dtype) for table in (alpha, sigma))
    return wide - (alpha_n * noise - sigma_n * x0)


def _noise(x: Tensor, seed: Tensor, sample_ids: Tensor, step: Tensor, stream: str) -> Tensor:
    """Normals of x's shape in the dtype it is computed in, element order logical whatever x's layout."""
    return _philox.normal(
        x[:1].numel(), seed, sample_ids, step, _philox.STREAMS[stream], _compute_dtype(x)
    ).view(x.shape)  # fmt: skip


def _sampler_noise(x: Tensor, seed: Tensor | None, sample_ids: Tensor | None, step_index: Tensor) -> Tensor:
    assert seed is not None and sample_ids is not None
    return _noise(x, seed, sample_ids, step_index, "sampler")


def _look_up(table: Tensor, step_index: Tensor) -> Tensor:
    """Gather table[step_index]; on a CPU, where reading values costs nothing, out-of-range indices raise."""
    if step_index.device.type == "cpu" and step_index.numel():
        low, high = int(step_index.min()), int(step_index.max())
        if low < 0 or high >= len(table):
            raise ValueError(f"step_index holds values from {low} to {high}; it must be in [0, {len(table) - 1}]")
    # Not table[step_index], which reads a 0-d index back from the device.
    return torch.take(table, step_index)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _widen(x: Tensor) -> Tensor:
    return x.to(_compute_dtype(x))


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Shape (N,) to broadcast over x, in the dtype x is computed in."""
    return values.to(_compute_dtype(x)).view(-1, *(1,) * (x.ndim - 1))


def _finish(result: Tensor, like: Tensor) -> Tensor:
    """Round to `like`'s dtype, in its layout, as a tensor of its own."""
    return torch.empty_like(like, memory_format=image_memory_format(like)).copy_(result)
