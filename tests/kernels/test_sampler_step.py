"""Sampler steps: the published formulas in fp64; test_sampler_convergence.py has whole loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from soda_kernels import NoiseSchedule, philox_normal, sampler_step
from tests.numerics import assert_exact

SCHEDULE = NoiseSchedule.linear(100, dtype=torch.float64)
SHAPE = (3, 2, 4, 5)
KEY: dict[str, Any] = {"seed": 8, "sample_ids": [4, 2**40, 1]}
STEPS = [(99, 98), (99, 60), (50, 49), (50, 0), (1, 0), (0, -1), (70, -1)]
METHODS = [("ddim", 0.0), ("ddim", 0.3), ("ddim", 1.0), ("ddpm", 0.0), ("dpmpp_2m", 0.0)]
BY_METHOD = pytest.mark.parametrize(("method", "eta"), METHODS, ids=[f"{method}-eta{eta}" for method, eta in METHODS])


def images(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x_t, cond, uncond and previous_x0."""
    return [torch.randn(SHAPE).to(dtype) for _ in range(4)]


def alpha_bar(index: int) -> float:
    """From the betas, as published, not from the schedule under test."""
    product = 1.0
    for i in range(index + 1):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 99)
    return product


def predicted_x0(x_t: Tensor, prediction: Tensor, index: int, target: str) -> Tensor:
    a = alpha_bar(index)
    if target == "eps":
        return (x_t - math.sqrt(1 - a) * prediction) / math.sqrt(a)
    return math.sqrt(a) * x_t - math.sqrt(1 - a) * prediction if target == "v" else prediction


def ddpm_step(x_t: Tensor, x0: Tensor, index: int, next_index: int, noise: Tensor) -> Tensor:
    """Ho et al. 2020, equations 6 and 7; the beta of a longer step is 1 minus its product of 1 - beta."""
    a_t, a_s = alpha_bar(index), alpha_bar(next_index)
    rate = 1.0
    for i in range(next_index + 1, index + 1):
        rate *= 1 - (1e-4 + (0.02 - 1e-4) * i / 99)
    beta = 1 - rate
    mean = math.sqrt(a_s) * beta / (1 - a_t) * x0 + math.sqrt(rate) * (1 - a_s) / (1 - a_t) * x_t
    return mean + math.sqrt((1 - a_s) / (1 - a_t) * beta) * noise


def ddim_step(x_t: Tensor, x0: Tensor, index: int, next_index: int, eta: float, noise: Tensor) -> Tensor:
    """Song et al. 2021, equations 12 and 16."""
    a_t, a_s = alpha_bar(index), alpha_bar(next_index)
    std = eta * math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s)
    direction = (x_t - math.sqrt(a_t) * x0) / math.sqrt(1 - a_t)
    return math.sqrt(a_s) * x0 + math.sqrt(max(0.0, 1 - a_s - std**2)) * direction + std * noise


def dpmpp_2m_step(
    x_t: Tensor, x0: Tensor, index: int, next_index: int, previous: tuple[Tensor, int] | None = None
) -> Tensor:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2; to the clean end, its limit is x0."""
    if next_index < 0:
        return x0
    half_logsnr = {i: math.log(math.sqrt(alpha_bar(i) / (1 - alpha_bar(i)))) for i in range(100)}
    h = half_logsnr[next_index] - half_logsnr[index]
    d = x0
    if previous is not None:
        previous_x0, previous_index = previous
        r = (half_logsnr[index] - half_logsnr[previous_index]) / h
        d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous_x0
    a_t, a_s = alpha_bar(index), alpha_bar(next_index)
    return math.sqrt((1 - a_s) / (1 - a_t)) * x_t - math.sqrt(a_s) * math.expm1(-h) * d


def published_step(method: str, eta: float, x_t: Tensor, x0: Tensor, index: int, next_index: int) -> Tensor:
    noise = philox_normal(SHAPE, **KEY, step=index, stream="sampler", dtype=torch.float64)
    if method == "ddpm":
        return ddpm_step(x_t, x0, index, next_index, noise)
    if method == "ddim":
        return ddim_step(x_t, x0, index, next_index, eta, noise)
    return dpmpp_2m_step(x_t, x0, index, next_index)


# One step


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
@pytest.mark.parametrize(("index", "next_index"), STEPS)
@BY_METHOD
def test_a_step_equals_the_published_formula(method: str, eta: float, index: int, next_index: int, target: str) -> None:
    x_t, cond, *_ = images()
    x0 = predicted_x0(x_t, cond, index, target)
    expected = published_step(method, eta, x_t, x0, index, next_index)
    actual, actual_x0 = sampler_step(
        x_t, cond, None, SCHEDULE, index, next_index, method=method, target=target, eta=eta, **KEY
    )
    assert_exact(actual_x0, x0, "x0")
    assert_exact(actual, expected, "x_next")
    if next_index < 0:
        assert_exact(actual, x0, "the clean end")


@pytest.mark.parametrize(("index", "next_index", "previous_index"), [(50, 49, 51), (50, 20, 99), (1, 0, 5), (0, -1, 1)])
def test_second_order_step_equals_the_published_formula(index: int, next_index: int, previous_index: int) -> None:
    x_t, cond, _, previous_x0 = images()
    x0 = predicted_x0(x_t, cond, index, "eps")
    actual, _ = sampler_step(
        x_t, cond, None, SCHEDULE, index, next_index, method="dpmpp_2m", previous_x0=previous_x0,
        previous_index=previous_index,
    )  # fmt: skip
    # A difference of nearly equal logsnr divides the extrapolation: some digits are lost on both sides.
    expected = dpmpp_2m_step(x_t, x0, index, next_index, (previous_x0, previous_index))
    assert_exact(actual, expected, tolerance=1e-11)


def test_first_order_dpmpp_is_ddim() -> None:
    x_t, cond, *_ = images()
    dpmpp, _ = sampler_step(x_t, cond, None, SCHEDULE, 60, 40, method="dpmpp_2m")
    ddim, _ = sampler_step(x_t, cond, None, SCHEDULE, 60, 40)
    assert_exact(dpmpp, ddim)


def test_ddim_with_eta_one_between_neighbours_is_ddpm() -> None:
    x_t, cond, *_ = images()
    ddim, _ = sampler_step(x_t, cond, None, SCHEDULE, 60, 59, eta=1.0, **KEY)
    ddpm, _ = sampler_step(x_t, cond, None, SCHEDULE, 60, 59, method="ddpm", **KEY)
    assert_exact(ddim, ddpm)


@BY_METHOD
@pytest.mark.parametrize("schedule", ["cosine", "inverted_cosine", "linear"])
def test_fp32_keeps_its_digits_at_both_ends(schedule: str, method: str, eta: float) -> None:
    """The clean end of the cosine schedule has sigma^2 = 1e-5: 1 - alpha_bar there is all cancellation."""
    single, double = (getattr(NoiseSchedule, schedule)(1000, dtype=d) for d in (torch.float32, torch.float64))
    x_t, cond, *_ = images(torch.float32)
    for index, next_index in [(i, i - 1) for i in (999, 998, 500, 5, 4, 3, 2, 1, 0)] + [(999, 500), (20, 3)]:
        keywords = {"method": method, "eta": eta, "target": "x0", **KEY}
        actual, _ = sampler_step(x_t, cond, None, single, index, next_index, **keywords)
        exact, _ = sampler_step(x_t.double(), cond.double(), None, double, index, next_index, **keywords)
        assert float((actual - exact).abs().max()) < 4e-6 * float(exact.abs().max()), (index, next_index)


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
@BY_METHOD
def test_clipping_x0_recomputes_the_noise_direction(method: str, eta: float, target: str) -> None:
    x_t, cond, *_ = images()
    x0 = predicted_x0(x_t, cond, 50, target).clamp(-0.4, 0.4)
    actual, actual_x0 = sampler_step(
        x_t, cond, None, SCHEDULE, 50, 40, method=method, target=target, eta=eta, clip_x0=0.4, **KEY
    )
    assert_exact(actual_x0, x0, "x0")
    assert_exact(actual, published_step(method, eta, x_t, x0, 50, 40), "x_next")


@BY_METHOD
def test_guidance(method: str, eta: float) -> None:
    x_t, cond, uncond, _ = images()

    def step(prediction: Tensor, other: Tensor | None, cfg_scale: float) -> Tensor:
        return sampler_step(
            x_t, prediction, other, SCHEDULE, 50, 40, method=method, eta=eta, cfg_scale=cfg_scale, clip_x0=1.0, **KEY
        )[0]

    assert_exact(step(cond, uncond, 1.0), step(cond, None, 1.0), "scale 1")
    assert_exact(step(cond, uncond, 0.0), step(uncond, None, 1.0), "scale 0")
    assert_exact(step(cond, uncond, 2.5), step(uncond + 2.5 * (cond - uncond), None, 1.0), "scale 2.5")


@BY_METHOD
@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_guidance_rescale(method: str, eta: float, rescale: float) -> None:
    """Lin et al. 2024, section 3.4, written for one sample at a time."""
    x_t, cond, uncond, _ = images()

    def step(prediction: Tensor, other: Tensor | None, **keywords: float) -> tuple[Tensor, Tensor]:
        return sampler_step(x_t, prediction, other, SCHEDULE, 50, 40, method=method, eta=eta, **KEY, **keywords)

    guided = uncond + 5.0 * (cond - uncond)
    rescaled = torch.stack([
        rescale * (sample * (of_cond.std() / sample.std())) + (1 - rescale) * sample
        for sample, of_cond in zip(guided, cond, strict=True)
    ])  # fmt: skip
    actual = step(cond, uncond, cfg_scale=5.0, guidance_rescale=rescale)
    for name, result, expected in zip(("x_next", "x0"), actual, step(rescaled, None), strict=True):
        assert_exact(result, expected, name)
    assert torch.equal(step(cond, uncond, cfg_scale=5.0, guidance_rescale=0.0)[0], step(cond, uncond, cfg_scale=5.0)[0])


def test_rescaling_guidance_that_does_not_vary_leaves_it() -> None:
    x_t, *_ = images()
    flat = torch.full(SHAPE, 0.25, dtype=torch.float64)
    actual, _ = sampler_step(x_t, flat, flat, SCHEDULE, 50, 40, cfg_scale=2.0, guidance_rescale=0.7)
    assert torch.equal(actual, sampler_step(x_t, flat, None, SCHEDULE, 50, 40)[0])
    one = torch.randn(3, 1).double()  # one element a sample
    actual, _ = sampler_step(one, one, -one, SCHEDULE, 50, 40, cfg_scale=2.0, guidance_rescale=0.7)
    assert torch.equal(actual, sampler_step(one, one, -one, SCHEDULE, 50, 40, cfg_scale=2.0)[0])


@BY_METHOD
@pytest.mark.parametrize(("index", "next_index"), [(50, 40), (50, -1)])
def test_ints_and_tensors_give_the_same_bits(index: int, next_index: int, method: str, eta: float) -> None:
    x_t, cond, uncond, previous_x0 = images(torch.float32)
    schedule = NoiseSchedule.linear(100)
    results = []
    for kind in (int, torch.tensor, lambda i: torch.tensor(i, dtype=torch.int32)):
        keywords = {"previous_x0": previous_x0, "previous_index": kind(60)} if method == "dpmpp_2m" else {}
        results.append(
            sampler_step(
                x_t, cond, uncond, schedule, kind(index), kind(next_index), method=method, eta=eta, cfg_scale=2.0,
                seed=kind(8), sample_ids=KEY["sample_ids"], **keywords,
            )
        )  # fmt: skip
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


@BY_METHOD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_dtype_and_layout_are_those_of_x_t(dtype: torch.dtype, method: str, eta: float) -> None:
    x_t, cond, *_ = images(dtype)
    schedule = NoiseSchedule.linear(100)
    expected, expected_x0 = sampler_step(x_t, cond, None, schedule, 50, 40, method=method, eta=eta, **KEY)
    assert expected.dtype == expected_x0.dtype == dtype
    last = x_t.contiguous(memory_format=torch.channels_last)
    x_next, x0 = sampler_step(last, cond, None, schedule, 50, 40, method=method, eta=eta, **KEY)
    assert x_next.is_contiguous(memory_format=torch.channels_last)
    assert x0.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x_next, expected)
    assert torch.equal(x0, expected_x0)
    sliced = torch.stack((x_t, x_t), dim=-1)[..., 0]
    assert torch.equal(sampler_step(sliced, cond, None, schedule, 50, 40, method=method, eta=eta, **KEY)[0], expected)
    wide, _ = sampler_step(x_t.float(), cond.float(), None, schedule, 50, 40, method=method, eta=eta, **KEY)
    assert torch.equal(wide.to(dtype), expected)


@BY_METHOD
def test_a_sample_does_not_depend_on_its_batch(method: str, eta: float) -> None:
    x_t, cond, *_ = images()
    whole, _ = sampler_step(x_t, cond, None, SCHEDULE, 50, 40, method=method, eta=eta, **KEY)
    part, _ = sampler_step(
        x_t[1:2], cond[1:2], None, SCHEDULE, 50, 40, method=method, eta=eta, seed=8, sample_ids=[2**40]
    )
    assert torch.equal(part, whole[1:2])


@BY_METHOD
def test_an_empty_batch(method: str, eta: float) -> None:
    empty = torch.empty(0, 2, 3, 3)
    x_next, x0 = sampler_step(empty, empty, None, SCHEDULE, 5, 4, method=method, eta=eta, seed=0, sample_ids=[])
    assert x_next.shape == x0.shape == (0, 2, 3, 3)


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (3, 2, 0, 4)], ids=str)
@pytest.mark.filterwarnings("error")
def test_nothing_to_rescale(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    x_next, x0 = sampler_step(x, x, x, SCHEDULE, 5, 4, cfg_scale=2.0, guidance_rescale=0.7)
    assert x_next.shape == x0.shape == shape


def test_a_noise_level_that_a_clamped_table_holds_twice() -> None:
    """The cosine schedule's last entries are both 1e-5: the second-order step after them falls back to first order."""
    schedule = NoiseSchedule.cosine(1000, dtype=torch.float64)
    assert schedule.logsnr[999] == schedule.logsnr[998]
    x_t, cond, _, previous_x0 = images()
    keywords = {"method": "dpmpp_2m", "previous_x0": previous_x0, "previous_index": 999}
    actual, _ = sampler_step(x_t, cond, None, schedule, 998, 997, **keywords)
    assert torch.equal(actual, sampler_step(x_t, cond, None, schedule, 998, 997, method="dpmpp_2m")[0])
    same, _ = sampler_step(x_t, cond, None, schedule, 999, 998, method="dpmpp_2m")
    assert_exact(same, x_t)


def test_step_indices_are_integers_of_numpys_too() -> None:
    x_t, cond, _, previous_x0 = images()
    index, next_index, previous_index = np.array([70, 60, 80])
    keywords: dict[str, Any] = {"method": "dpmpp_2m", "previous_x0": previous_x0}
    step = sampler_step(x_t, cond, None, SCHEDULE, index, next_index, previous_index=previous_index, **keywords)
    expected = sampler_step(x_t, cond, None, SCHEDULE, 70, 60, previous_index=80, **keywords)
    assert all(torch.equal(*pair) for pair in zip(step, expected, strict=True))


def test_a_step_index_tensor_out_of_range_raises_on_a_cpu() -> None:
    x_t, cond, *_ = images()
    for index in (-1, 100):
        with pytest.raises(ValueError, match="step_index"):
            sampler_step(x_t, cond, None, SCHEDULE, torch.tensor(index), torch.tensor(0))
