"""Step indices: their formulas, what they depend on, how they are distributed, and that `add_noise` draws the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from soda_kernels import NoiseSchedule, add_noise, draw_step_index, philox_normal, philox_uniform, use_backend
from soda_kernels._philox import SHARED_ID
from soda_kernels.diffusion.reference import SAMPLINGS

KEY: dict[str, Any] = {"seed": 2**63 + 5, "step": 11}
SIGNIFICANT = 1e-3
each_sampling = pytest.mark.parametrize("sampling", SAMPLINGS)


def schedule(num_steps: int) -> NoiseSchedule:
    return NoiseSchedule.cosine(num_steps)


def ids(num: int) -> Tensor:
    return torch.arange(num) * 7919 + 2**33


def word(sample_id: int) -> int:
    """The first word of a sample's stream "timestep"."""
    drawn = philox_uniform((1,), **KEY, sample_ids=[sample_id], stream="timestep", dtype=torch.float64)
    return int(drawn * 2**32)


@pytest.mark.parametrize("num_steps", [1, 7, 1000])
def test_uniform_is_the_formula(num_steps: int) -> None:
    index = draw_step_index(schedule(num_steps), sample_ids=ids(500), **KEY)
    u = philox_uniform((500,), sample_ids=ids(500), stream="timestep", **KEY)
    assert index.dtype == torch.int64
    assert torch.equal(index, (u * num_steps).long().clamp(max=num_steps - 1))


@pytest.mark.parametrize(
    ("strata", "num"), [(None, 9), ((0, 9), 9), ((3, 20), 9), ((11, 20), 9), ((0, 2**28), 5)], ids=str
)
@pytest.mark.parametrize("num_steps", [1, 7, 1000])
def test_stratified_is_the_formula(num_steps: int, strata: tuple[int, int] | None, num: int) -> None:
    """In Python's integers."""
    first, total = strata or (0, num)
    rotation = word(SHARED_ID) * total >> 32
    expected = []
    for n, sample_id in enumerate(ids(num).tolist()):
        u = word(sample_id) >> 8
        expected.append(((first + n + rotation) % total * 2**24 + u) * num_steps // (total * 2**24))
    index = draw_step_index(schedule(num_steps), sample_ids=ids(num), sampling="stratified", strata=strata, **KEY)
    assert index.tolist() == expected


def test_strata_are_integers_of_numpys_too() -> None:
    keywords: dict[str, Any] = {"sample_ids": ids(5), "sampling": "stratified", **KEY}
    expected = draw_step_index(schedule(7), strata=(3, 20), **keywords)
    strata: Any = np.array([3, 20])
    assert torch.equal(draw_step_index(schedule(7), strata=tuple(strata), **keywords), expected)
    assert torch.equal(add_noise(torch.randn(5, 2, 3), None, schedule(7), strata=list(strata), **keywords)[1], expected)


def test_logit_normal_is_the_formula() -> None:
    z = philox_normal((500,), sample_ids=ids(500), stream="timestep", **KEY)
    index = draw_step_index(schedule(1000), sample_ids=ids(500), sampling="logit_normal", **KEY)
    assert torch.equal(index, (torch.sigmoid(z) * 1000).long())


@each_sampling
def test_add_noise_draws_the_same_indices(sampling: str) -> None:
    x0 = torch.randn(6, 3, 4, 5)
    strata = (2, 9) if sampling == "stratified" else None
    keywords = {"sample_ids": ids(6), **KEY}
    x_t, index = add_noise(x0, None, schedule(50), sampling=sampling, strata=strata, **keywords)
    expected = draw_step_index(schedule(50), sampling=sampling, strata=strata, **keywords)
    assert torch.equal(index, expected)
    assert torch.equal(x_t, add_noise(x0, expected, schedule(50), **keywords))


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_a_draw_depends_on_its_own_key_alone(sampling: str) -> None:
    steps = torch.arange(40)
    whole = draw_step_index(schedule(1000), seed=1, sample_ids=ids(40), step=steps, sampling=sampling)
    order = torch.tensor([31, 4, 7])
    part = draw_step_index(schedule(1000), seed=1, sample_ids=ids(40)[order], step=steps[order], sampling=sampling)
    assert torch.equal(part, whole[order])
    assert not torch.equal(draw_step_index(schedule(1000), seed=1, sample_ids=ids(40), sampling=sampling), whole)


def test_a_stratified_batch_may_be_drawn_in_parts() -> None:
    """As processes do that hold a slice each: the strata go on where the slice before ended."""

    def draw(part: slice, strata: tuple[int, int] | None) -> Tensor:
        return draw_step_index(schedule(1000), sample_ids=ids(12)[part], sampling="stratified", strata=strata, **KEY)

    whole = draw(slice(0, 12), None)
    parts = [draw(slice(start, start + 4), (start, 12)) for start in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("num", [1, 8, 37])
def test_strata_are_taken_once_each(num: int) -> None:
    index = draw_step_index(schedule(num), sample_ids=ids(num), sampling="stratified", **KEY)
    assert sorted(index.tolist()) == list(range(num))


@pytest.mark.parametrize("num_steps", [1, 7, 1000])
def test_uniform_draws_are_uniform(num_steps: int) -> None:
    index = draw_step_index(schedule(num_steps), sample_ids=torch.arange(20_000), **KEY)
    assert int(index.min()) == 0 and int(index.max()) == num_steps - 1
    assert num_steps == 1 or stats.chisquare(torch.bincount(index, minlength=num_steps)).pvalue > SIGNIFICANT
    steps = draw_step_index(schedule(8), seed=1, sample_ids=torch.full((4000,), 3), step=torch.arange(4000))
    assert stats.chisquare(torch.bincount(steps, minlength=8)).pvalue > SIGNIFICANT


def test_each_place_of_a_stratified_batch_is_uniform_over_the_steps() -> None:
    """Thanks to the rotation: without it the first sample would always be in the first stratum."""
    keyed = {"seed": 3, "sampling": "stratified"}
    first = [draw_step_index(schedule(8), sample_ids=[5, 6, 7, 8], step=step, **keyed)[0] for step in range(2000)]
    assert stats.chisquare(torch.bincount(torch.stack(first), minlength=8)).pvalue > SIGNIFICANT


def test_logit_normal_draws_have_its_distribution() -> None:
    num_steps, num = 20, 20_000
    index = draw_step_index(schedule(num_steps), sample_ids=torch.arange(num), sampling="logit_normal", **KEY)
    borders = [-math.inf, *(math.log(k / (num_steps - k)) for k in range(1, num_steps)), math.inf]
    expected = num * torch.from_numpy(stats.norm.cdf(borders)).diff()
    assert expected.min() > 5  # the test's approximation needs some of each
    assert stats.chisquare(torch.bincount(index, minlength=num_steps), expected).pvalue > SIGNIFICANT


@each_sampling
@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_the_ends_are_in_range(monkeypatch: pytest.MonkeyPatch, largest: bool, sampling: str) -> None:
    with use_backend("reference"):  # the words can be chosen there alone
        words = torch.full((1, 1, 4), 0xFFFFFFFF if largest else 0)
        monkeypatch.setattr("soda_kernels._philox.random_blocks", lambda *_: words)
        strata = (4, 5) if sampling == "stratified" else None
        for num_steps in (3, 1000, 2**20):
            (index,) = draw_step_index(
                schedule(num_steps), sample_ids=[0], sampling=sampling, strata=strata, seed=0
            ).tolist()
            assert 0 <= index < num_steps
            if sampling == "uniform":
                assert index == (num_steps - 1 if largest else 0)


@each_sampling
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3, 2, 0, 4)], ids=str)
def test_nothing_to_noise(shape: tuple[int, ...], sampling: str) -> None:
    x_t, index = add_noise(torch.randn(shape), None, schedule(10), sampling=sampling, sample_ids=ids(shape[0]), **KEY)
    assert x_t.shape == shape
    assert torch.equal(index, draw_step_index(schedule(10), sample_ids=ids(shape[0]), sampling=sampling, **KEY))
