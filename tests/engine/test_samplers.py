"""The sampling loop: which steps it takes, and how well it follows a denoiser that is known to be perfect."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from soda_engine import Soda
from soda_engine.diffusion.guidance import guided
from soda_engine.diffusion.samplers import _advance, _Position, sample, step_indices
from soda_kernels import NoiseSchedule, sampler_step, use_backend
from tests.engine.tiny_soda import tiny_config, tiny_soda
from tests.harness.host_sync import DEVICE, HostSyncError, NoHostSync

# Its first step has almost no noise (sigma 0.002), so that a sampler's last step can follow the flow to its end.
SCHEDULE = NoiseSchedule.cosine(1000)
MEAN, STDDEV = 0.4, 0.25


@pytest.mark.parametrize(("schedule_steps", "num_steps"), [(1000, 100), (1000, 7), (1000, 1000), (10, 9), (2, 2)])
def test_steps_go_down_from_end_to_end(schedule_steps: int, num_steps: int) -> None:
    indices = step_indices(schedule_steps, num_steps)
    assert len(indices) == num_steps and indices[0] == schedule_steps - 1 and indices[-1] == 0
    gaps = [before - after for before, after in zip(indices, indices[1:], strict=False)]
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1 and all(isinstance(index, int) for index in indices)


def test_one_step_starts_at_the_noise() -> None:
    assert step_indices(1000, 1) == [999] and step_indices(1, 1) == [0]


@pytest.mark.parametrize("num_steps", [0, -3, 1001])
def test_wrong_numbers_of_steps(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}; it must be between 1 and the schedule's 1000"):
        step_indices(1000, num_steps)


class Gaussian:
    """The perfect predictor for data from N(MEAN, STDDEV²), with the probability flow that it defines."""

    def __init__(self, target: str = "eps") -> None:
        self.target, self.indices = target, []  # type: ignore[var-annotated]

    def __call__(self, x_t: Tensor, step_index: Tensor) -> tuple[Tensor, None]:
        self.indices.append(int(step_index))
        alpha, sigma = SCHEDULE.alpha[step_index], SCHEDULE.sigma[step_index]
        # E[x0 | x_t] and what follows from x_t = alpha·x0 + sigma·noise
        x0 = MEAN + alpha * STDDEV**2 / (alpha**2 * STDDEV**2 + sigma**2) * (x_t - alpha * MEAN)
        noise = (x_t - alpha * x0) / sigma
        return {"x0": x0, "eps": noise, "v": alpha * noise - sigma * x0}[self.target], None

    @staticmethod
    def clean(x_T: Tensor) -> Tensor:
        """Where the probability flow takes x_T: both are Gaussian, so it keeps their standardised values."""
        alpha, sigma = SCHEDULE.alpha[-1], SCHEDULE.sigma[-1]
        return MEAN + STDDEV * (x_T - alpha * MEAN) / (alpha**2 * STDDEV**2 + sigma**2).sqrt()


def run(
    num_steps: int, method: str = "ddim", *, target: str = "eps", **options: Any
) -> tuple[Tensor, Tensor, Gaussian]:
    denoise = Gaussian(target)
    x_T = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    arguments: dict[str, Any] = {"clip_x0": None, "sample_ids": torch.arange(8), **options}
    return x_T, sample(denoise, x_T, SCHEDULE, num_steps=num_steps, method=method, target=target, **arguments), denoise


def error(num_steps: int, method: str, **options: Any) -> float:
    x_T, images, _ = run(num_steps, method, **options)
    return float((images - Gaussian.clean(x_T)).abs().mean())


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_ddim_follows_the_probability_flow(target: str) -> None:
    errors = [error(num_steps, "ddim", target=target) for num_steps in (10, 20, 200)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02 * STDDEV


def test_second_order_beats_first_order() -> None:
    first, second = ([error(num_steps, method) for num_steps in (100, 200)] for method in ("ddim", "dpmpp_2m"))
    assert second[0] < 0.7 * first[0] and second[1] < 0.35 * first[1]
    assert 1.7 < first[0] / first[1] < 2.5 and 3.5 < second[0] / second[1] < 6  # halved steps: about 2 and 4


def test_second_order_is_better_with_few_steps_of_the_papers_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.engine.test_samplers.SCHEDULE", NoiseSchedule.inverted_cosine(1000))
    for num_steps in (5, 10, 20):
        assert error(num_steps, "dpmpp_2m") < 0.7 * error(num_steps, "ddim")


@pytest.mark.parametrize(
    ("method", "options"), [("ddpm", {}), ("ddim", {"eta": 1.0}), ("ddim", {}), ("dpmpp_2m", {})],
    ids=["ddpm", "ddim-eta1", "ddim", "dpmpp_2m"],
)  # fmt: skip
def test_samples_have_the_distribution_of_the_data(method: str, options: dict[str, Any]) -> None:
    _, images, _ = run(250, method, **options)
    assert images.shape == (8, 1, 32, 32)
    count = images.numel()
    # Four standard errors, and 2% for the steps' own error.
    assert abs(float(images.mean()) - MEAN) < 4 * STDDEV / count**0.5 + 0.02 * STDDEV
    assert abs(float(images.std()) / STDDEV - 1) < 4 / (2 * count) ** 0.5 + 0.02


def test_the_denoiser_is_called_at_each_step_once() -> None:
    _, _, denoise = run(25)
    assert denoise.indices == step_indices(1000, 25)


def test_second_order_gets_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def step(
        x: Tensor, cond: Tensor, uncond: None, schedule: Any, index: Tensor, next_index: Tensor,
        previous_x0: Tensor | None, previous_index: Tensor | None, **options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        calls.append({
            "indices": (int(index), int(next_index)),
            "previous": None if previous_x0 is None else (int(previous_index), float(previous_x0.mean())),
        })  # fmt: skip
        return x, torch.full_like(x, float(index))

    monkeypatch.setattr("soda_engine.diffusion.samplers.sampler_step", step)
    run(3, "dpmpp_2m")
    assert [call["indices"] for call in calls] == [(999, 500), (500, 0), (0, -1)]
    assert [call["previous"] for call in calls] == [(999, 0.0), (999, 999.0), (500, 500.0)]
    calls.clear()
    run(3, "ddim")
    assert all(call["previous"] is None for call in calls)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_step_that_follows_itself_is_first_order(backend: Any) -> None:
    """All steps of a loop are the same work; only the first has nothing to look back at."""
    x, guess, ids = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.arange(2)
    index, next_index = torch.tensor(600), torch.tensor(580)
    with use_backend(backend):
        expected = sampler_step(x, guess, None, SCHEDULE, index, next_index, method="dpmpp_2m", sample_ids=ids)
        got = sampler_step(
            x, guess, None, SCHEDULE, index, next_index, method="dpmpp_2m", sample_ids=ids,
            previous_x0=torch.zeros_like(x), previous_index=index,
        )  # fmt: skip
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_the_start_is_left_as_it_was() -> None:
    x_T, images, _ = run(3)
    assert torch.equal(x_T, torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert images.data_ptr() != x_T.data_ptr()


def test_a_graph_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="graphed is True and x_T is on cpu; CUDA graphs need a GPU"):
        run(3, graphed=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize(
    ("method", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("dpmpp_2m", 0.0)],
    ids=["ddpm", "ddim", "ddim-eta", "dpmpp_2m"],
)  # fmt: skip
def test_no_step_waits_for_a_gpu_and_all_are_the_same_work(
    method: str, eta: float, cfg_scale: float, backend: Any
) -> None:
    model, counts = Soda(tiny_config()).eval().to(DEVICE), []
    z, mask, x_T = (torch.empty(shape, device=DEVICE) for shape in ((3, 13), (1, 3), (3, 3, 8, 8)))
    ids = torch.arange(3, device=DEVICE)
    schedule = model.schedule
    for num_steps in (1, 2, 3, 8):
        with use_backend(backend), NoHostSync() as watch:
            images = sample(
                guided(model.denoiser_for(num_steps), z, mask, mask, cfg_scale), x_T, schedule, num_steps=num_steps,
                method=method, eta=eta, cfg_scale=cfg_scale, sample_ids=ids, seed=2**64 - 1,
            )  # fmt: skip
        assert images.device == DEVICE
        counts.append(watch.ops)
    counts = counts[1:]  # a loop of one step makes its views otherwise
    a_step = counts[1] - counts[0]
    assert a_step["sampler_step"] == 1 and a_step["convolution"] > 10
    assert counts[2] - counts[0] == Counter({name: 6 * count for name, count in a_step.items()})
    assert a_step["_to_copy"] == a_step["arange"] == 0, "nothing comes from the host, nor is a time embedded"


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpmpp_2m"])
def test_a_step_recorded_once_and_replayed_is_the_loop(method: str) -> None:
    """What a CUDA graph does, with a recorder that needs no GPU: whatever Python computed is frozen in the record."""
    model, num_steps, ids = tiny_soda(), 6, torch.tensor([3, 9])
    z, x_T, mask = torch.randn(2, 13), torch.randn(2, 3, 8, 8), torch.ones(1, 3)
    denoise, schedule = guided(model.denoiser_for(num_steps), z, mask, 0 * mask, 2.0), model.schedule
    options = {"method": method, "cfg_scale": 2.0, "clip_x0": 1.0, "seed": torch.tensor(5), "sample_ids": ids}
    with torch.no_grad():
        x, x0 = x_T.clone(), torch.zeros_like(x_T) if method == "dpmpp_2m" else None
        position = _Position(step_indices(1000, num_steps), x.device)
        record = make_fx(partial(_advance, denoise, schedule, position, x, x0, options))()  # takes the first step
        for _ in range(num_steps - 1):
            record()
    options |= {"seed": 5, "num_steps": num_steps}
    assert torch.equal(x, sample(denoise, x_T, schedule, **options))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x, i: x * float(x[0, 0, 0, 0]), lambda x, i: x[x > 0].sum() + x, lambda x, i: x + x.cpu().to(DEVICE),
        lambda x, i: x + torch.tensor([1.0]).to(DEVICE, non_blocking=True), lambda x, i: x * x[i],
        lambda x, i: x + torch.linalg.inv(x), lambda x, i: x + torch.tensor([1.0], device=DEVICE).copy_(torch.ones(1)),
    ],
    ids=["item", "mask", "to the host", "from pageable memory", "index", "inverse", "copy"],
)  # fmt: skip
def test_a_denoiser_that_waits_is_caught(wait: Any) -> None:
    x_T, ids = torch.empty(3, 1, 8, 8, device=DEVICE), torch.arange(3, device=DEVICE)
    with NoHostSync(), pytest.raises((HostSyncError, RuntimeError)):
        sample(lambda x, i: (wait(x, i), None), x_T, SCHEDULE.to(DEVICE), num_steps=2, sample_ids=ids)


@pytest.mark.parametrize(("method", "random"), [("ddpm", True), ("ddim", False), ("dpmpp_2m", False)])
def test_only_random_methods_use_the_seed(method: str, random: bool) -> None:
    images, again, other = (run(10, method, seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(images, again) and torch.equal(images, other) != random


@pytest.mark.parametrize("clip", [0.5, 1.0])
def test_clean_images_are_clipped(clip: float) -> None:
    assert float(run(20, clip_x0=clip)[1].max()) == clip  # some pixels of N(0.4, 0.25²) exceed 1


def test_progress_is_shown_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    run(3)
    assert capsys.readouterr().err == ""
    run(3, progress=True)
    assert "sampling: 100%" in capsys.readouterr().err


def test_gradients_are_not_recorded() -> None:
    x_T = torch.zeros(1, 1, 2, 2, requires_grad=True)
    ids = torch.zeros(1, dtype=torch.int64)
    assert not sample(Gaussian(), x_T, SCHEDULE, num_steps=2, sample_ids=ids).requires_grad
