"""Whole sampling loops with the perfect predictor for images of one Gaussian, where everything has a closed form.

For x0 ~ N(MEAN, STD^2) every sampler step is affine in x_t, so that the mean and variance of a chain of steps follow by
recursion, and the probability flow's map from one noise level to another is affine too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from soda_kernels import NoiseSchedule, philox_normal, sampler_step, use_backend
from soda_kernels.diffusion.config import TileConfig
from tests.harness.interpreter import is_interpreting

MEAN, STD = 0.3, 0.5
TARGETS = ("eps", "v", "x0")
targets = pytest.mark.parametrize("target", TARGETS)

Step = Callable[..., tuple[Tensor, Tensor]]


def by_reference(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    with use_backend("reference"):
        return sampler_step(*arguments, **keywords)


def by_triton(
    x_t: Tensor, cond: Tensor, uncond: None, schedule: NoiseSchedule, step_index: int, next_index: int, *,
    method: str, target: str, previous_x0: Tensor | None = None, previous_index: int | None = None, seed: int,
    sample_ids: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from soda_kernels.diffusion.triton_impl import plan_sampler_step

    x_next, x0 = plan_sampler_step(
        x_t, cond, uncond, schedule.alpha, schedule.sigma, schedule.logsnr, torch.tensor(step_index),
        torch.tensor(next_index), method, target, 1.0, 0.0, None, 0.0, previous_x0,
        None if previous_index is None else torch.tensor(previous_index), torch.tensor(seed),
        torch.as_tensor(list(sample_ids)), config=TileConfig(positions=4096, channels=1, num_warps=8),
    ).run()  # fmt: skip
    return x_next, x0


interpreted = pytest.mark.skipif(not is_interpreting(), reason="Triton compiles here: set TRITON_INTERPRET=1")
BACKENDS = [pytest.param(by_reference, id="reference"), pytest.param(sampler_step, id="auto")]
backends = pytest.mark.parametrize("step", BACKENDS)
all_backends = pytest.mark.parametrize("step", [*BACKENDS, pytest.param(by_triton, id="triton", marks=interpreted)])


def levels(schedule: NoiseSchedule, index: int) -> tuple[float, float]:
    """Return alpha and sigma in fp64; -1 is the clean end."""
    if index < 0:
        return 1.0, 0.0
    alpha_bar = float(schedule.alpha_bar[index])
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def predictor(schedule: NoiseSchedule, index: int, target: str) -> tuple[float, float]:
    """Return factor and offset of E[target | x_t], affine in x_t: Bayes' rule for two Gaussians."""
    alpha, sigma = levels(schedule, index)
    variance = alpha**2 * STD**2 + sigma**2
    noise = sigma / variance, -sigma * alpha * MEAN / variance
    clean = alpha * STD**2 / variance, MEAN - alpha**2 * STD**2 * MEAN / variance
    v = alpha * noise[0] - sigma * clean[0], alpha * noise[1] - sigma * clean[1]
    return {"eps": noise, "x0": clean, "v": v}[target]


def run(
    step: Step, schedule: NoiseSchedule, x: Tensor, indices: list[int], *, method: str, target: str = "eps",
    order: int = 1,
) -> Tensor:  # fmt: skip
    """Step through the indices; the last is where it ends."""
    previous: dict[str, Any] = {}
    for index, next_index in pairwise(indices):
        factor, offset = predictor(schedule, index, target)
        x, x0 = step(
            x, x * factor + offset, None, schedule, index, next_index, method=method, target=target, seed=1,
            sample_ids=range(len(x)), **previous,
        )  # fmt: skip
        previous = {"previous_x0": x0, "previous_index": index} if order == 2 else {}
    return x


def flow(schedule: NoiseSchedule, x: Tensor, start: int, end: int) -> Tensor:
    """Return the probability flow's exact map of x, in fp64: it keeps the standardized value."""
    (a, s), (alpha, sigma) = levels(schedule, start), levels(schedule, end)
    standardized = (x.double() - a * MEAN) / math.sqrt(a**2 * STD**2 + s**2)
    return alpha * MEAN + math.sqrt(alpha**2 * STD**2 + sigma**2) * standardized


def chain(schedule: NoiseSchedule, indices: list[int], *, method: str) -> tuple[float, float, float]:
    """Return factor, offset and variance: of a start x the loop makes factor * x + offset + a normal of that variance.

    Ho et al. 2020, equations 6 and 7, and Song et al. 2021, equation 12 without noise, in Python's floats.
    """
    factor, offset, variance = 1.0, 0.0, 0.0
    for index, next_index in pairwise(indices):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(schedule, index), levels(schedule, next_index)
        of_x, constant = predictor(schedule, index, "x0")
        if method == "ddim":
            of_x0, of_x_t, noise = alpha_s - sigma_s / sigma_t * alpha_t, sigma_s / sigma_t, 0.0
        else:
            rate = alpha_t / alpha_s
            beta = 1 - rate**2
            of_x0, of_x_t = alpha_s * beta / sigma_t**2, rate * sigma_s**2 / sigma_t**2
            noise = sigma_s**2 / sigma_t**2 * beta
        of_x, constant = of_x * of_x0 + of_x_t, constant * of_x0
        factor, offset, variance = of_x * factor, of_x * offset + constant, of_x**2 * variance + noise
    return factor, offset, variance


def strided(num_steps: int, stride: int) -> list[int]:
    """Every so many steps from the last one down, then the clean end."""
    return [*range(num_steps - 1, -1, -stride), -1]


def root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


# DDIM


def starts(dtype: torch.dtype = torch.float32) -> Tensor:
    return philox_normal((1, 1000), seed=0, sample_ids=[0], dtype=dtype)


@targets
@backends
def test_ddim_of_a_thousand_steps_lands_on_the_analytic_flow(step: Step, target: str) -> None:
    """Its error is proportional to how far from the mean a start is: 1e-3 holds in root mean square over normals."""
    schedule, x = NoiseSchedule.cosine(1000), starts()
    actual = run(step, schedule, x, strided(1000, 1), method="ddim", target=target)
    assert root_mean_square(actual - flow(schedule, x, 999, -1)) < 1e-3


@pytest.mark.parametrize("name", ["cosine", "linear", "inverted_cosine"])
@all_backends
def test_ddim_is_the_exact_chain(step: Step, name: str) -> None:
    """What is left of the distance to the flow is the method's, not rounding."""
    schedule, x = getattr(NoiseSchedule, name)(1000), starts()
    indices = strided(1000, 37)
    factor, offset, _ = chain(schedule, indices, method="ddim")
    for target in TARGETS:
        actual = run(step, schedule, x, indices, method="ddim", target=target)
        # Where alpha is 3e-3, x0 has the roundings of noise 300 times over.
        assert root_mean_square(actual - (factor * x.double() + offset)) < 1e-5


@pytest.mark.parametrize(
    ("name", "least", "most"), [("cosine", 1.9, 2.1), ("linear", 1.9, 2.1), ("inverted_cosine", 1.3, 1.5)]
)
def test_the_chain_of_ddim_approaches_the_flow(name: str, least: float, most: float) -> None:
    """Twice the steps have half the error; with the inverted cosine, vertical at both ends, it falls by a root of 2."""
    errors = []
    for num_steps in (500, 1000, 2000):
        betas = (0.1 / num_steps, 20 / num_steps) if name == "linear" else ()
        schedule, x = getattr(NoiseSchedule, name)(num_steps, *betas, dtype=torch.float64), starts(torch.float64)
        factor, offset, _ = chain(schedule, strided(num_steps, 1), method="ddim")
        errors.append(root_mean_square(factor * x + offset - flow(schedule, x, num_steps - 1, -1)))
    assert all(least < coarse / fine < most for coarse, fine in pairwise(errors)), errors


# DDPM


@pytest.mark.parametrize(("step", "stride"), [
    pytest.param(by_reference, 2, id="reference"), pytest.param(sampler_step, 2, id="auto"),
    pytest.param(by_triton, 50, id="triton", marks=interpreted),
])  # fmt: skip
@targets
def test_ddpm_has_the_chains_mean_and_variance(step: Step, stride: int, target: str) -> None:
    schedule, num = NoiseSchedule.cosine(500), 16384
    indices = strided(500, stride)
    x = philox_normal((4, num // 4), seed=0, sample_ids=range(4))
    samples = run(step, schedule, x, indices, method="ddpm", target=target).double()
    factor, offset, variance = chain(schedule, indices, method="ddpm")
    variance += factor**2  # of the start
    assert abs(float(samples.mean()) - offset) < 3 * math.sqrt(variance / num)
    assert abs(float(samples.var()) - variance) < 3 * variance * math.sqrt(2 / num)


@backends
def test_ddpm_samples_the_distribution(step: Step) -> None:
    num = 4096
    schedule, x = NoiseSchedule.cosine(1000), philox_normal((4, num // 4), seed=0, sample_ids=range(4))
    samples = run(step, schedule, x, strided(1000, 1), method="ddpm").double()
    assert abs(float(samples.mean()) - MEAN) < 3 * STD / math.sqrt(num)
    assert abs(float(samples.var()) - STD**2) < 3 * STD**2 * math.sqrt(2 / num)


def test_the_chain_of_ddpm_approaches_the_distribution() -> None:
    """A posterior variance that knows of one x0 is too small: by half as much with twice the steps."""
    missing = []
    for num_steps in (250, 500, 1000, 2000):
        schedule = NoiseSchedule.cosine(num_steps, dtype=torch.float64)
        factor, offset, variance = chain(schedule, strided(num_steps, 1), method="ddpm")
        assert abs(offset - MEAN) < 1e-6
        missing.append(STD**2 - (variance + factor**2))
    assert all(1.9 < coarse / fine < 2.1 for coarse, fine in pairwise(missing)), missing
    assert 0 < missing[-1] < 0.005 * STD**2


# DPM-Solver++ 2M


def errors_of(step: Step, order: int, target: str, strides: tuple[int, ...], dtype: torch.dtype) -> list[float]:
    """Return the distances from the flow, by steps of equal logsnr."""
    schedule = NoiseSchedule.from_alpha_bar(torch.linspace(8, -8, 321).double().sigmoid(), dtype=dtype)
    x = starts(dtype)
    return [
        root_mean_square(
            run(step, schedule, x, list(range(320, -1, -stride)), method="dpmpp_2m", target=target, order=order)
            - flow(schedule, x, 320, 0)
        )
        for stride in strides
    ]


def assert_orders(errors: dict[int, list[float]]) -> None:
    """Twice the steps divide the error by 4 at second order, by 2 at first."""
    assert all(3.6 < coarse / fine < 4.4 for coarse, fine in pairwise(errors[2])), errors
    assert all(1.8 < coarse / fine < 2.2 for coarse, fine in pairwise(errors[1])), errors
    assert all(second < first / 5 for first, second in zip(errors[1], errors[2], strict=True)), errors


@targets
@all_backends
def test_dpmpp_2m_converges_with_second_order(step: Step, target: str) -> None:
    """In fp32, while the error is well above its rounding; with few steps in the interpreter."""
    strides = (16, 8) if step is by_triton else (16, 8, 4)
    assert_orders({order: errors_of(step, order, target, strides, torch.float32) for order in (1, 2)})


@targets
def test_dpmpp_2m_in_fp64_keeps_its_order_as_far_as_tables_go(target: str) -> None:
    assert_orders({order: errors_of(sampler_step, order, target, (8, 4, 2, 1), torch.float64) for order in (1, 2)})
