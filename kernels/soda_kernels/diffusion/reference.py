"""Noising, the denoising loss and sampler steps in plain PyTorch: the definition of the ops.

Noise is regenerated from its counter wherever it is needed and never returned. Arithmetic is in fp32, or in fp64 where
the images are fp64. Clean images may be bytes, which stand for x / 127.5 - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soda_kernels import _philox
from soda_kernels._checks import image_memory_format

TARGETS = ("eps", "v", "x0")
METHODS = ("ddpm", "ddim", "dpmpp_2m")
SAMPLINGS = ("uniform", "stratified", "logit_normal")


def philox_normal(seed: Tensor, sample_ids: Tensor, step: Tensor, num: int, stream: int, dtype: torch.dtype) -> Tensor:
    """Return (N, num) normals."""
    return _philox.normal(num, seed, sample_ids, step, stream, dtype).contiguous()


def philox_uniform(seed: Tensor, sample_ids: Tensor, step: Tensor, num: int, stream: int, dtype: torch.dtype) -> Tensor:
    """Return (N, num) uniforms."""
    return _philox.uniform(num, seed, sample_ids, step, stream, dtype).contiguous()


def draw_step_index(
    seed: Tensor, sample_ids: Tensor, step: Tensor, num_steps: int, sampling: str, first_stratum: int, num_strata: int
) -> Tensor:
    """Return (N,) step indices in [0, num_steps), from the first block of each sample's stream "timestep"."""
    stream = _philox.STREAMS["timestep"]
    if sampling == "stratified":
        # In integers, so that it is exact: the strata are equal parts of [0, 1), the samples take one each, and one
        # rotation for all of them says which.
        words = _philox.random_blocks(1, seed, sample_ids, step, stream)[:, 0, 0]
        shared = _philox.random_blocks(1, seed, torch.full_like(seed.view(1), _philox.SHARED_ID), step, stream)[0, 0, 0]
        place = torch.arange(len(sample_ids), device=sample_ids.device) + first_stratum
        stratum = (place + (shared * num_strata >> 32)) % num_strata
        return ((stratum << 24) + (words >> 8)) * num_steps // (num_strata << 24)
    if sampling == "logit_normal":
        # Esser et al. 2024 (SD3), section 3.1, with location 0 and scale 1.
        share = _philox.normal(1, seed, sample_ids, step, stream, torch.float32)[:, 0].sigmoid()
    else:
        share = _philox.uniform(1, seed, sample_ids, step, stream, torch.float32)[:, 0]
    # Beyond 2^24 steps the product can round up to num_steps.
    return (share * num_steps).long().clamp_(max=num_steps - 1)


def add_noise(
    x0: Tensor, step_index: Tensor | None, alpha: Tensor, sigma: Tensor, seed: Tensor, sample_ids: Tensor, step: Tensor,
    sampling: str, first_stratum: int, num_strata: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return alpha * x0 + sigma * noise in `dtype`, and the step indices that were drawn, empty where they came."""
    drawn = sample_ids.new_empty(0)
    if step_index is None:
        drawn = draw_step_index(seed, sample_ids, step, len(alpha), sampling, first_stratum, num_strata)
        step_index = drawn
    alpha_n, sigma_n = (_per_sample(_look_up(table, step_index), x0) for table in (alpha, sigma))
    noise = _noise(x0, seed, sample_ids, step, "noise")
    return _finish(_widen(x0) * alpha_n + noise * sigma_n, x0, dtype), drawn


def add_noise_backward(dx_t: Tensor, step_index: Tensor, alpha: Tensor) -> Tensor:
    """Return dx0 = alpha * dx_t."""
    return _finish(_widen(dx_t) * _per_sample(_look_up(alpha, step_index), dx_t), dx_t)


def denoising_loss(
    prediction: Tensor, x0: Tensor, step_index: Tensor, alpha: Tensor, sigma: Tensor, weights: Tensor | None,
    seed: Tensor, sample_ids: Tensor, step: Tensor, target: str, save_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return weight * mean((prediction - target)^2) of each sample, and its gradient, empty where it is not asked for.

    The gradient is weight * 2 / M * (prediction - target), with M elements a sample.
    """
    error = _error(prediction, x0, step_index, alpha, sigma, seed, sample_ids, step, target)
    loss = error.square().flatten(1).mean(1)
    loss = loss if weights is None else loss * _look_up(weights, step_index).to(loss.dtype)
    if not save_gradient:
        return loss, prediction.new_empty(0)
    return loss, _loss_gradient(torch.ones_like(loss), error, prediction, weights, step_index)


def denoising_loss_backward(
    dloss: Tensor, prediction: Tensor, x0: Tensor, step_index: Tensor, alpha: Tensor, sigma: Tensor,
    weights: Tensor | None, seed: Tensor, sample_ids: Tensor, step: Tensor, target: str,
) -> Tensor:  # fmt: skip
    """Return dprediction = dloss * weight * 2 / M * (prediction - target), with M elements a sample."""
    error = _error(prediction, x0, step_index, alpha, sigma, seed, sample_ids, step, target)
    return _loss_gradient(dloss, error, prediction, weights, step_index)


def scale_samples(gradient: Tensor, dloss: Tensor) -> Tensor:
    """Return dloss * gradient: the backward where the forward saved the gradient."""
    return _finish(_widen(gradient) * _per_sample(dloss, gradient), gradient)


def sampler_step(
    x_t: Tensor, cond: Tensor, uncond: Tensor | None, alpha: Tensor, sigma: Tensor, logsnr: Tensor,
    step_index: Tensor, next_index: Tensor, method: str, target: str, cfg_scale: float, eta: float,
    clip_x0: float | None, guidance_rescale: float, previous_x0: Tensor | None, previous_index: Tensor | None,
    seed: Tensor | None, sample_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (x_next, x0)."""
    wide = _widen(x_t)
    compute = wide.dtype
    alpha_t, sigma_t = (_look_up(table, step_index).to(compute) for table in (alpha, sigma))
    _check_index(next_index, alpha, "next_index", -1)
    clean = next_index < 0
    inside = next_index.clamp(min=0)
    alpha_s = torch.where(clean, 1.0, torch.take(alpha, inside).to(compute))
    sigma_s = torch.where(clean, 0.0, torch.take(sigma, inside).to(compute))

    prediction = _widen(cond)
    if uncond is not None:
        unconditional = _widen(uncond)
        guided = unconditional + cfg_scale * (prediction - unconditional)
        prediction = _rescale(guided, prediction, guidance_rescale) if guidance_rescale else guided
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
        # Of x_t and x0, not of the noise between them: of an infinite x_t that would be inf - inf.
        of_x_t = ratio * ((1 - eta**2) + (eta * rate * ratio).square()).sqrt()
        x_next = of_x_t * wide + (alpha_s - of_x_t * alpha_t) * x0
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


def _rescale(guided: Tensor, cond: Tensor, guidance_rescale: float) -> Tensor:
    """Lin et al. 2024, section 3.4, of each sample; one that does not vary is left as it is."""
    # Not std, which warns of empty samples.
    cond_square, square = ((x - x.mean(1, keepdim=True)).square().sum(1) for x in (cond.flatten(1), guided.flatten(1)))
    ratio = torch.where(square == 0, 1.0, (cond_square / square).sqrt())
    return guided * _per_sample(guidance_rescale * ratio + (1 - guidance_rescale), guided)


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
        _check_index(previous_index, half_logsnr, "previous_index")
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
    _check_index(step_index, alpha)
    wide = prediction.to(torch.promote_types(_compute_dtype(prediction), _compute_dtype(x0)))
    if target == "x0":
        return wide - _widen(x0)
    noise = _noise(x0, seed, sample_ids, step, "noise").to(wide.dtype)
    if target == "eps":
        return wide - noise
    alpha_n, sigma_n = (_per_sample(_look_up(table, step_index), x0).to(wide.dtype) for table in (alpha, sigma))
    return wide - (alpha_n * noise - sigma_n * _widen(x0))


def _loss_gradient(
    dloss: Tensor, error: Tensor, prediction: Tensor, weights: Tensor | None, step_index: Tensor
) -> Tensor:
    """Return dloss * weight * 2 / M * error, like the prediction; the error is overwritten."""
    factor = dloss.to(error.dtype) * (2 / max(1, prediction[:1].numel()))
    if weights is not None:
        factor = factor * _look_up(weights, step_index).to(error.dtype)
    return _finish(error.mul_(_per_sample(factor, error)), prediction)


def _noise(x: Tensor, seed: Tensor, sample_ids: Tensor, step: Tensor, stream: str) -> Tensor:
    """Normals of x's shape in the dtype it is computed in, element order logical whatever x's layout."""
    return _philox.normal(
        x[:1].numel(), seed, sample_ids, step, _philox.STREAMS[stream], _compute_dtype(x)
    ).view(x.shape)  # fmt: skip


def _sampler_noise(x: Tensor, seed: Tensor | None, sample_ids: Tensor | None, step_index: Tensor) -> Tensor:
    assert seed is not None and sample_ids is not None
    return _noise(x, seed, sample_ids, step_index, "sampler")


def _look_up(table: Tensor, step_index: Tensor) -> Tensor:
    """Gather table[step_index]."""
    _check_index(step_index, table)
    # Not table[step_index], which reads a 0-d index back from the device.
    return torch.take(table, step_index)


def _check_index(index: Tensor, table: Tensor, name: str = "step_index", least: int = 0) -> None:
    """On a CPU, where reading values costs nothing, let indices raise that are out of the table's range."""
    if index.device.type == "cpu" and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < least or high >= len(table):
            raise ValueError(f"{name} holds values from {low} to {high}; it must be in [{least}, {len(table) - 1}]")


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _widen(x: Tensor) -> Tensor:
    """The values of x in the dtype it is computed in."""
    wide = x.to(_compute_dtype(x))
    return wide / 127.5 - 1 if x.dtype == torch.uint8 else wide


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Shape (N,) to broadcast over x, in the dtype x is computed in."""
    return values.to(_compute_dtype(x)).view(-1, *(1,) * (x.ndim - 1))


def _finish(result: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Round to `like`'s dtype, or the one given, in its layout, as a tensor of its own."""
    return torch.empty_like(like, dtype=dtype, memory_format=image_memory_format(like)).copy_(result)
