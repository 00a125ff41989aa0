"""Noise schedules against their published formulas in Python's floats."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from soda_kernels import NoiseSchedule

LENGTHS = [1, 2, 10, 1000]
CLAMP = 1e-5


def clamped(alpha_bar: float) -> float:
    return min(max(alpha_bar, CLAMP), 1 - CLAMP)


def published(name: str, num_steps: int) -> list[float]:
    times = [(i + 1) / num_steps for i in range(num_steps)]
    if name == "inverted_cosine":
        return [clamped(2 / math.pi * math.acos(math.sqrt(t))) for t in times]
    if name == "cosine":
        return [clamped(math.cos(math.pi * t / 2) ** 2) for t in times]
    alpha_bar, product = [], 1.0
    for i in range(num_steps):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / max(1, num_steps - 1))
        alpha_bar.append(product)
    return alpha_bar


@pytest.mark.parametrize("num_steps", LENGTHS)
@pytest.mark.parametrize("name", ["inverted_cosine", "cosine", "linear"])
def test_tables_equal_the_published_formulas(name: str, num_steps: int) -> None:
    schedule = getattr(NoiseSchedule, name)(num_steps, dtype=torch.float64)
    alpha_bar = published(name, num_steps)
    assert schedule.name == name
    assert schedule.num_steps == num_steps
    assert schedule.alpha_bar.tolist() == pytest.approx(alpha_bar, rel=1e-12)
    assert schedule.alpha.tolist() == pytest.approx([math.sqrt(a) for a in alpha_bar], rel=1e-12)
    assert schedule.sigma.tolist() == pytest.approx([math.sqrt(1 - a) for a in alpha_bar], rel=1e-11)
    assert schedule.logsnr.tolist() == pytest.approx([math.log(a / (1 - a)) for a in alpha_bar], rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("name", ["inverted_cosine", "cosine", "linear"])
def test_fp32_tables_are_those_of_fp64_rounded_once(name: str) -> None:
    """Formed from fp32 values, sigma at the clean end would keep four digits."""
    exact, rounded = (getattr(NoiseSchedule, name)(1000, dtype=dtype) for dtype in (torch.float64, torch.float32))
    for field in ("alpha_bar", "alpha", "sigma", "logsnr"):
        assert torch.equal(getattr(rounded, field), getattr(exact, field).float()), field


def test_inverted_cosine_is_the_inverse_function_of_cosine() -> None:
    inverted = NoiseSchedule.inverted_cosine(1000, dtype=torch.float64).alpha_bar[:-1]
    assert torch.cos(inverted * (math.pi / 2)).square().tolist() == pytest.approx(
        [(i + 1) / 1000 for i in range(999)], rel=1e-12
    )


def test_inverted_cosine_favours_medium_noise() -> None:
    share = {}
    for name in ("inverted_cosine", "cosine", "linear"):
        alpha_bar = getattr(NoiseSchedule, name)(1000).alpha_bar
        share[name] = round(100 * float(((alpha_bar > 0.2) & (alpha_bar < 0.8)).float().mean()))
    assert share == {"inverted_cosine": 81, "cosine": 41, "linear": 25}


@pytest.mark.parametrize("num_steps", LENGTHS)
@pytest.mark.parametrize("name", ["inverted_cosine", "cosine", "linear"])
def test_noise_grows_with_the_step_and_every_table_is_finite(name: str, num_steps: int) -> None:
    schedule = getattr(NoiseSchedule, name)(num_steps)
    assert (schedule.alpha_bar.diff() <= 0).all()
    for table in (schedule.alpha_bar, schedule.alpha, schedule.sigma, schedule.logsnr):
        assert table.isfinite().all()
        assert table.shape == (num_steps,)


def test_betas_of_the_linear_schedule_can_be_chosen() -> None:
    schedule = NoiseSchedule.linear(3, 0.1, 0.3, dtype=torch.float64)
    assert schedule.alpha_bar.tolist() == pytest.approx([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], rel=1e-14)


def test_a_schedule_from_a_table() -> None:
    schedule = NoiseSchedule.from_alpha_bar(torch.tensor([0.9, 0.5]), name="two")
    assert schedule.name == "two"
    assert schedule.logsnr.tolist() == pytest.approx([math.log(9), 0.0], rel=1e-6, abs=1e-7)


def test_a_schedule_is_frozen_and_moves_between_devices() -> None:
    schedule = NoiseSchedule.cosine(10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.alpha = schedule.sigma  # type: ignore[misc]
    assert schedule.to("cpu") is schedule
    moved = schedule.to("meta")
    assert moved.device.type == moved.logsnr.device.type == "meta"
    assert moved.name == "cosine"
