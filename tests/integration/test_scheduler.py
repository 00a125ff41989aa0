"""SodaScheduler beside diffusers' own: whole loops, to the dtype's rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from soda_kernels import NoiseSchedule, add_noise, philox_normal
from soda_kernels.integrations.diffusers import SodaScheduler
from soda_kernels.integrations.diffusers.noise_key import draw_noise_key
from tests.harness.host_sync import DEVICE, HostSyncError, NoHostSync
from tests.integration.sampling_loops import DIFFUSERS, SHAPE, TABLES, Denoiser, run, run_diffusers, run_exactly
from tests.numerics import assert_accurate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def start(dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)


def compare(
    algorithm: str, config: dict[str, Any], dtype: torch.dtype, num_steps: int = 12, eta: float = 0.0, **options: Any
) -> None:
    """Require a loop's end to be as near to the exact one as diffusers' own is, by the rule of every kernel."""
    ours = SodaScheduler.from_config(DIFFUSERS[algorithm](**config).config)
    theirs, exact = DIFFUSERS[algorithm](**config), DIFFUSERS[algorithm](**config)
    for scheduler in (ours, theirs, exact):
        scheduler.set_timesteps(num_steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    denoiser, x_t = Denoiser(theirs.alphas_cumprod, config["prediction_type"]), start(dtype)
    noises: dict[torch.dtype, dict[int, Tensor]] = {torch.float32: {}, torch.float64: {}}
    if algorithm == "ddpm" or eta:
        generator = torch.Generator().manual_seed(7)
        for timestep in ours.timesteps.tolist():
            seed, ids = draw_noise_key(generator, len(x_t), x_t.device)
            for kind, drawn in noises.items():
                key = {"seed": seed, "sample_ids": ids, "step": timestep, "stream": "sampler"}
                drawn[timestep] = philox_normal(SHAPE, dtype=kind, **key)
        options_of_ours = {"generator": torch.Generator().manual_seed(7)}
    else:
        options_of_ours = {}
    if algorithm == "ddim":
        options["eta"] = eta
    noise = {kind: drawn.__getitem__ if drawn else None for kind, drawn in noises.items()}
    actual = run(ours, denoiser, x_t, **options_of_ours, **options)
    composition = run_diffusers(theirs, denoiser, x_t, noise[torch.float32], **options)
    assert actual.dtype == dtype
    assert_accurate(actual, composition, run_exactly(exact, denoiser, x_t, noise[torch.float64], **options))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("algorithm", DIFFUSERS)
def test_a_loop_is_diffusers_own(algorithm: str, prediction: str, spacing: str, table: str, dtype: torch.dtype) -> None:
    compare(algorithm, {"prediction_type": prediction, "timestep_spacing": spacing, **TABLES[table]}, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("algorithm", "options", "changes"),
    [
        ("ddim", {"eta": 0.7}, {}),
        ("ddim", {"eta": 1.0}, {"clip_sample_range": 0.5}),
        ("ddim", {}, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
        ("ddim", {"use_clipped_model_output": True}, {"clip_sample_range": 0.5}),
        ("ddim", {}, {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 0.5}),
        ("ddpm", {}, {"clip_sample_range": 0.5, "variance_type": "fixed_small_log"}),
        ("ddpm", {}, {"clip_sample": False, "steps_offset": 1, "timestep_spacing": "leading"}),
        ("dpmpp_2m", {}, {"solver_order": 1}),
        ("dpmpp_2m", {"num_steps": 17}, {"final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m", {}, {"final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m", {}, {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("dpmpp_2m", {"num_steps": 17}, {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        ("dpmpp_2m", {}, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    ],
    ids=["eta-0.7", "eta-1-clipped", "to-timestep-0", "direction-of-clipped", "direction-kept", "clipped", "offset",
         "order-1", "sigma-min", "sigma-min-few-steps", "second-order-end", "euler-end", "lambda-clipped"],
)  # fmt: skip
def test_an_option_is_diffusers_own(
    algorithm: str, options: dict[str, Any], changes: dict[str, Any], prediction: str, dtype: torch.dtype
) -> None:
    compare(algorithm, {"prediction_type": prediction, **TABLES["scaled_linear"], **changes}, dtype, **options)


@pytest.mark.parametrize("algorithm", DIFFUSERS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 333, 999])
def test_timesteps_are_diffusers_own(algorithm: str, spacing: str, num_steps: int) -> None:
    theirs = DIFFUSERS[algorithm](timestep_spacing=spacing)
    ours = SodaScheduler.from_config(theirs.config)
    assert torch.equal(ours.timesteps, theirs.timesteps.long())
    theirs.set_timesteps(num_steps)
    ours.set_timesteps(num_steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_tables_are_diffusers_own(beta_schedule: str) -> None:
    theirs, ours = DIFFUSERS["ddpm"](beta_schedule=beta_schedule), SodaScheduler(beta_schedule=beta_schedule)
    assert torch.equal(ours.betas, theirs.betas) and torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


def test_the_inverted_cosine_is_the_engine_s_own() -> None:
    scheduler, schedule = SodaScheduler(beta_schedule="inverted_cosine"), NoiseSchedule.inverted_cosine(1000)
    assert torch.equal(scheduler.alphas_cumprod, schedule.alpha_bar)
    product = (1 - scheduler.betas.double()).cumprod(0)
    torch.testing.assert_close(product, schedule.alpha_bar.double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_noising_is_diffusers_own(method: str, dtype: torch.dtype) -> None:
    ours, theirs = SodaScheduler(**TABLES["scaled_linear"]), DIFFUSERS["ddpm"](**TABLES["scaled_linear"])
    x0, noise, timesteps = start(dtype), torch.randn(SHAPE).to(dtype), torch.tensor([3, 871])
    actual, composition = (getattr(scheduler, method)(x0, noise, timesteps) for scheduler in (ours, theirs))
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    assert actual.dtype == dtype
    assert_accurate(actual, composition, getattr(theirs, method)(x0.double(), noise.double(), timesteps))


def test_the_schedule_noises_with_its_own_noise() -> None:
    scheduler, x0, index = SodaScheduler(), start(torch.float32), torch.tensor([10, 500])
    key = {"seed": 5, "sample_ids": [0, 1]}
    fused = add_noise(x0, index, scheduler.schedule, **key)
    torch.testing.assert_close(fused, scheduler.add_noise(x0, philox_normal(SHAPE, **key), index))


def noisy(generator: Any, batch: int = 3) -> Tensor:
    scheduler = SodaScheduler("ddpm")
    scheduler.set_timesteps(4)
    x_t = torch.linspace(-1, 1, batch * 8).view(batch, 2, 2, 2)
    for timestep in scheduler.timesteps:
        x_t = scheduler.step(x_t, timestep, x_t, generator=generator).prev_sample
    return x_t


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_generator_s_state_decides_the_noise() -> None:
    assert torch.equal(noisy(seeded(3)), noisy(seeded(3))) and torch.equal(noisy(seeded(3)), noisy([seeded(3)]))
    assert not torch.equal(noisy(seeded(3)), noisy(seeded(4)))
    generator = seeded(3)
    assert not torch.equal(noisy(generator), noisy(generator))
    torch.manual_seed(0)
    first, second = noisy(None), noisy(None)
    torch.manual_seed(0)
    assert torch.equal(noisy(None), first) and not torch.equal(first, second)


def test_of_a_list_of_generators_each_decides_one_sample() -> None:
    both = noisy([seeded(1), seeded(2), seeded(3)])
    other = noisy([seeded(5), seeded(2), seeded(6)])
    assert torch.equal(both[1], other[1]) and not torch.equal(both[0], other[0])
    with pytest.raises(ValueError, match="generator is a list of 2 for 3 samples; give one or 3"):
        noisy([seeded(1), seeded(2)])


@pytest.mark.parametrize("algorithm", DIFFUSERS)
def test_a_timestep_may_be_an_int_or_another_tensor(algorithm: str) -> None:
    def loop(form: Any) -> Tensor:
        scheduler = SodaScheduler(algorithm)
        scheduler.set_timesteps(6)
        denoiser, x_t = Denoiser(scheduler.alphas_cumprod, "epsilon"), start(torch.float32)
        for timestep in scheduler.timesteps[2:]:
            x_t = scheduler.step(denoiser(x_t, int(timestep)), form(timestep), x_t, generator=seeded(0)).prev_sample
        assert scheduler.step_index == 6
        return x_t

    assert torch.equal(loop(lambda t: t), loop(int)) and torch.equal(loop(lambda t: t), loop(torch.clone))


@pytest.mark.parametrize("algorithm", DIFFUSERS)
def test_no_step_waits_for_the_device(algorithm: str) -> None:
    scheduler = SodaScheduler(algorithm, clip_sample=algorithm == "ddim")
    scheduler.set_timesteps(5, device=DEVICE)
    scheduler.schedule = scheduler.schedule.to(DEVICE)
    x_t = torch.empty(SHAPE, device=DEVICE)
    with NoHostSync() as mode:
        for timestep in scheduler.timesteps:
            x_t = scheduler.step(x_t, timestep, x_t).prev_sample
    assert mode.ops["sampler_step"] == 5 and scheduler.step_index == 5
    launches = mode.ops.total() - mode.ops["select"] - mode.ops["unbind"]
    # With noise two more: the seed and the sample ids. DDIM clips in PyTorch.
    assert launches == {"ddpm": 15, "dpmpp_2m": 5}.get(algorithm, launches), mode.ops
    with pytest.raises(HostSyncError), NoHostSync():
        int(scheduler.timesteps[0])


def test_the_step_that_was_begun_with_is_counted_from() -> None:
    scheduler = SodaScheduler("dpmpp_2m")
    scheduler.set_timesteps(5)
    assert scheduler.step_index is None and scheduler.begin_index is None
    scheduler.set_begin_index(2)
    assert scheduler.begin_index == 2
    x_t = start(torch.float32)
    scheduler.step(x_t, scheduler.timesteps[2], x_t)
    assert scheduler.step_index == 3
    scheduler.set_timesteps(5)
    assert scheduler.step_index is None and scheduler.begin_index is None


def test_two_dtypes_give_the_one_of_pytorch_s_arithmetic() -> None:
    scheduler = SodaScheduler("dpmpp_2m")
    scheduler.set_timesteps(3)
    output = scheduler.step(start(torch.bfloat16), scheduler.timesteps[0], start(torch.float32))
    assert output.prev_sample.dtype == output.pred_original_sample.dtype == torch.float32
