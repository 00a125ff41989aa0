"""Who computes noising, the loss and sampler steps: this project, and PyTorch as its users write it.

Each takes a problem and returns (x_t, loss) or (x_next, x0). PyTorch's users draw noise with `torch.randn_like`, so
that what they compute is compared on noise that is handed to them, and timed with the noise that they draw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.accuracy import relative_error
from benchmarks.diffusion.problems import CFG_SCALE, INDEX, NEXT_INDEX, PREVIOUS_INDEX, DiffusionProblem
from benchmarks.providers import BASELINE, OURS, Provider, compiled
from benchmarks.steps import Forward, make_step, result_names
from soda_kernels import add_noise, denoising_loss, sampler_step


def own_diffusion(problem: DiffusionProblem) -> tuple[Tensor, Tensor]:
    """Compute it with this project's ops."""
    call, schedule = problem.asked, problem.schedule
    if call.op == "sampler_step":
        return sampler_step(
            problem.x, problem.prediction, problem.uncond, schedule, INDEX, NEXT_INDEX, method=call.method,
            target=call.target, cfg_scale=CFG_SCALE if call.guided else 1.0, clip_x0=call.clip_x0, eta=call.eta,
            previous_x0=problem.previous_x0, previous_index=PREVIOUS_INDEX if call.second_order else None,
            seed=problem.seed, sample_ids=problem.sample_ids,
        )  # fmt: skip
    arguments = (problem.x, problem.step_index, schedule)
    key = {"seed": problem.seed, "sample_ids": problem.sample_ids, "step": problem.step}
    x_t = add_noise(*arguments, **key)
    loss = denoising_loss(problem.prediction, *arguments, target=call.target, weights=problem.weights, **key)
    return x_t, loss


def noising_and_loss(
    prediction: Tensor, x0: Tensor, step_index: Tensor, alpha: Tensor, sigma: Tensor, weights: Tensor, target: str,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Noise images and score a prediction, as training scripts do: the loss in fp32 whatever the images' dtype."""
    noise = torch.randn_like(x0) if noise is None else noise
    alpha_t = alpha[step_index].to(x0.dtype).view(-1, 1, 1, 1)
    sigma_t = sigma[step_index].to(x0.dtype).view(-1, 1, 1, 1)
    x_t = alpha_t * x0 + sigma_t * noise
    goal = noise if target == "eps" else alpha_t * noise - sigma_t * x0
    wide = torch.promote_types(x0.dtype, torch.float32)
    loss = functional.mse_loss(prediction.to(wide), goal.to(wide), reduction="none").mean(dim=(1, 2, 3))
    return x_t, loss * weights[step_index]


def guided_step(
    x_t: Tensor, cond: Tensor, uncond: Tensor, previous_x0: Tensor | None, alpha: Tensor, sigma: Tensor, method: str,
    clip_x0: float, noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Step from INDEX to NEXT_INDEX by a guided prediction of the noise, as sampling scripts do."""
    alpha_t, sigma_t, alpha_s, sigma_s = alpha[INDEX], sigma[INDEX], alpha[NEXT_INDEX], sigma[NEXT_INDEX]
    eps = uncond + CFG_SCALE * (cond - uncond)
    x0 = ((x_t - sigma_t * eps) / alpha_t).clamp(-clip_x0, clip_x0)
    if method == "ddim":
        eps = (x_t - alpha_t * x0) / sigma_t
        return alpha_s * x0 + sigma_s * eps, x0
    if method == "ddpm":
        noise = torch.randn_like(x_t) if noise is None else noise
        rate = alpha_t / alpha_s
        beta = 1 - rate**2
        mean = alpha_s * beta / sigma_t**2 * x0 + rate * sigma_s**2 / sigma_t**2 * x_t
        return mean + sigma_s / sigma_t * beta.sqrt() * noise, x0
    assert previous_x0 is not None
    lambda_t, lambda_s = torch.log(alpha_t / sigma_t), torch.log(alpha_s / sigma_s)
    h, h_previous = lambda_s - lambda_t, lambda_t - torch.log(alpha[PREVIOUS_INDEX] / sigma[PREVIOUS_INDEX])
    extrapolated = x0 + h / (2 * h_previous) * (x0 - previous_x0)
    return sigma_s / sigma_t * x_t - alpha_s * torch.expm1(-h) * extrapolated, x0


def _by(noise_and_score: Callable[..., tuple[Tensor, Tensor]], step: Callable[..., tuple[Tensor, Tensor]]) -> Forward:
    """Return what hands a problem's tensors to one of two functions."""

    def forward(problem: DiffusionProblem) -> tuple[Tensor, Tensor]:
        call, (alpha, sigma) = problem.asked, (problem.schedule.alpha, problem.schedule.sigma)
        if call.op == "sampler_step":
            return step(
                problem.x, problem.prediction, problem.uncond, problem.previous_x0, alpha, sigma, call.method,
                call.clip_x0, problem.noise,
            )  # fmt: skip
        return noise_and_score(
            problem.prediction, problem.x, problem.step_index, alpha, sigma, problem.weights, call.target, problem.noise
        )

    return forward


eager_diffusion = _by(noising_and_loss, guided_step)


def complaints(problem: DiffusionProblem, mode: str, results: Sequence[Tensor]) -> list[str]:
    """Say what is wrong with results that depend on noise which only who computed them knows.

    The first result is affine in the noise, so that it tells the noise: that must have a normal's mean and variance
    within five standard errors, and the other results must be those of this noise, as far as rounding the first one
    leaves it known.
    """
    if not problem.asked.draws or "fwd" not in mode:
        return []
    wide = problem.double()
    of_zero, of_one = (
        eager_diffusion(dataclasses.replace(wide, noise=torch.full_like(wide.x, value)))[0] for value in (0.0, 1.0)
    )
    noise = (results[0].double() - of_zero) / (of_one - of_zero)
    count = noise.numel()
    found = []
    for name, value, error in (
        ("mean", float(noise.mean()), count**-0.5), ("variance", float(noise.var()) - 1, (2 / count) ** 0.5)
    ):  # fmt: skip
        if not abs(value) < 5 * error + torch.finfo(results[0].dtype).eps:
            found.append(f"its noise is off in {name} by {value:.3g}")
    exact = dict(zip(
        result_names(problem, mode), make_step(eager_diffusion, dataclasses.replace(wide, noise=noise), mode)(),
        strict=True,
    ))  # fmt: skip
    for name, result in list(zip(exact, results, strict=True))[1:]:
        error = relative_error(result, exact[name])
        # x_t's rounding over the smallest sigma that draws have.
        if not error < 100 * torch.finfo(results[0].dtype).eps:
            found.append(f"{name} is not of the noise in {problem.outputs[0]}: an error of {error:.3g}")
    return found

DIFFUSION_PROVIDERS = (
    Provider(name=OURS, build=lambda: own_diffusion),
    Provider(name=BASELINE, build=lambda: eager_diffusion, draws=True),
    Provider(
        name="compile", build=lambda: _by(compiled(noising_and_loss), compiled(guided_step)), compiled=True, draws=True
    ),
)
