"""SodaScheduler's configs, to and from diffusers' own, and the pipelines that take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    UNet2DModel,
)

from soda_kernels.integrations.diffusers import SodaScheduler
from tests.integration.sampling_loops import DIFFUSERS

SIZE = 8


def tiny_unet(channels: int = 3) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=SIZE, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8, 8),
        norm_num_groups=2, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip


@pytest.mark.parametrize("algorithm", DIFFUSERS)
def test_a_config_goes_there_and_back(algorithm: str, tmp_path: Path) -> None:
    changes = {"num_train_timesteps": 400, "beta_schedule": "scaled_linear", "steps_offset": 1}
    theirs = DIFFUSERS[algorithm](timestep_spacing="trailing", prediction_type="v_prediction", **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = SodaScheduler.from_config(theirs.config)
    ours.save_pretrained(tmp_path / "ours")
    for each in (ours, SodaScheduler.from_pretrained(tmp_path / "theirs"),
                 SodaScheduler.from_pretrained(tmp_path / "ours"), SodaScheduler.from_config(ours.config)):  # fmt: skip
        assert each.config.algorithm == algorithm and len(each) == 400
        assert each.config.timestep_spacing == "trailing" and each.config.prediction_type == "v_prediction"
        assert torch.equal(each.alphas_cumprod, theirs.alphas_cumprod)
        back = type(theirs).from_config(each.config)
        assert {name: back.config[name] for name in theirs.config if name != "_use_default_values"} == {
            name: value for name, value in theirs.config.items() if name != "_use_default_values"
        }


def test_trained_betas_are_saved(tmp_path: Path) -> None:
    SodaScheduler("dpmpp_2m", num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.5]).save_config(tmp_path)
    assert SodaScheduler.from_pretrained(tmp_path).betas.tolist() == pytest.approx([0.1, 0.2, 0.5])


@pytest.mark.parametrize("algorithm", DIFFUSERS)
@pytest.mark.parametrize("source", DIFFUSERS)
def test_another_scheduler_s_config_becomes_what_diffusers_makes_of_it(source: str, algorithm: str) -> None:
    config = DIFFUSERS[source](beta_schedule="scaled_linear").config
    ours, theirs = SodaScheduler.from_config(config, algorithm=algorithm), DIFFUSERS[algorithm].from_config(config)
    for name in ("timestep_spacing", "steps_offset", "beta_schedule", "prediction_type"):
        assert ours.config[name] == theirs.config[name]
    assert ours.config.clip_sample == theirs.config.get("clip_sample", False)


def refused(message: str, make: Any) -> None:
    with pytest.raises(ValueError) as raised:
        make()
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("algorithm", "option", "message"),
    [
        ("ddim", {"thresholding": True}, "the config's thresholding is True; it must be one of [False]"),
        ("ddim", {"rescale_betas_zero_snr": True}, "the config's rescale_betas_zero_snr is True"),
        ("ddpm", {"variance_type": "learned_range"}, "the config's variance_type is 'learned_range'"),
        ("ddpm", {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; it must be one of ['linear'"),
        ("dpmpp_2m", {"use_karras_sigmas": True}, "the config's use_karras_sigmas is True"),
        ("dpmpp_2m", {"use_lu_lambdas": True}, "the config's use_lu_lambdas is True"),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}, "the config's algorithm_type is 'sde-dpmsolver++'"),
        ("dpmpp_2m", {"solver_type": "heun"}, "the config's solver_type is 'heun'; it must be one of ['midpoint']"),
        ("dpmpp_2m", {"solver_order": 3}, "solver_order is 3; it must be one of [1, 2]"),
        ("dpmpp_2m", {"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
    ],
)
def test_what_has_no_kernel_is_refused(algorithm: str, option: dict[str, Any], message: str) -> None:
    refused(message, lambda: SodaScheduler.from_config(DIFFUSERS[algorithm](**option).config))


def test_an_option_that_another_algorithm_has_not_got_is_passed_over() -> None:
    config = DIFFUSERS["dpmpp_2m"](use_karras_sigmas=True).config
    assert SodaScheduler.from_config(config, algorithm="ddim").config.algorithm == "ddim"


def test_other_schedulers_need_an_algorithm(tmp_path: Path) -> None:
    theirs = EulerDiscreteScheduler()
    refused("of an unknown scheduler; name the algorithm", lambda: SodaScheduler.from_config(theirs.config))
    theirs.save_config(tmp_path)
    refused("of EulerDiscreteScheduler; name the algorithm", lambda: SodaScheduler.from_pretrained(tmp_path))
    assert SodaScheduler.from_pretrained(tmp_path, algorithm="ddim").config.algorithm == "ddim"
    refused("algorithm is 'euler'; it must be", lambda: SodaScheduler.from_pretrained(tmp_path, algorithm="euler"))


def test_wrong_calls_say_what_to_do() -> None:
    scheduler, x_t = SodaScheduler(steps_offset=1), torch.zeros(1, 3, 4, 4)
    refused("there are no timesteps yet; call set_timesteps before step", lambda: scheduler.step(x_t, 3, x_t))
    for wrong in ({}, {"num_inference_steps": 3, "timesteps": [2, 1]}):
        refused("takes num_inference_steps or timesteps, one of the two", lambda w=wrong: scheduler.set_timesteps(**w))
    for wrong in (0, 1001):
        refused(f"num_inference_steps is {wrong}; it must be in [1, ", lambda w=wrong: scheduler.set_timesteps(w))
    refused("the timesteps go from 1000 to 1 with steps_offset 1", lambda: scheduler.set_timesteps(1000))
    refused("timesteps is [5, 9]; it must be a descending list", lambda: scheduler.set_timesteps(timesteps=[5, 9]))
    refused("the timesteps go from 2000 to 3", lambda: scheduler.set_timesteps(timesteps=[2000, 3]))
    scheduler.set_timesteps(timesteps=[900, 400, 3])
    assert scheduler.timesteps.tolist() == [900, 400, 3]
    refused("timestep is 7, which is not among the 3 of set_timesteps", lambda: scheduler.step(x_t, 7, x_t))
    noise = {"variance_noise": x_t}
    refused("variance_noise is given; noise is drawn inside", lambda: scheduler.step(x_t, 900, x_t, **noise))
    refused("it must be (num_train_timesteps,), which is (1000,)", lambda: SodaScheduler(trained_betas=[0.1, 0.2]))


@pytest.mark.parametrize("algorithm", ["ddim", "dpmpp_2m"])
def test_a_pipeline_takes_it(algorithm: str) -> None:
    pipeline = DDPMPipeline(tiny_unet(), DIFFUSERS[algorithm]())
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for scheduler in (pipeline.scheduler, SodaScheduler.from_config(pipeline.scheduler.config)):
        pipeline.scheduler = scheduler
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(2, generator=generator, num_inference_steps=8, output_type="pt").images)
    assert images[0].std() > 0.1
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_a_ddim_pipeline_takes_it(eta: float) -> None:
    pipeline = DDIMPipeline(tiny_unet(), DIFFUSERS["ddim"]())
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline.scheduler
    pipeline.scheduler = SodaScheduler.from_config(theirs.config)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(2, generator=generator, eta=eta, num_inference_steps=8, output_type="pt").images

    images = draw()
    assert torch.equal(draw(), images)
    pipeline.scheduler = theirs
    if eta == 0.0:
        torch.testing.assert_close(images, draw(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["ddim", "dpmpp_2m"])
def test_a_guided_latent_pipeline_takes_it(algorithm: str) -> None:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.eval().proj_out_2.weight, std=0.2)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4)
    pipeline = DiTPipeline(transformer, vae, DIFFUSERS[algorithm](clip_sample=False) if algorithm == "ddim" else
                           DIFFUSERS[algorithm]())  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for scheduler in (pipeline.scheduler, SodaScheduler.from_config(pipeline.scheduler.config)):
        pipeline.scheduler = scheduler
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline([1, 2], generator=generator, num_inference_steps=8, output_type="np").images)
    assert images[0].std() > 0.01
    torch.testing.assert_close(*map(torch.from_numpy, images), rtol=0, atol=1e-5)


def test_a_saved_pipeline_brings_it_back(tmp_path: Path) -> None:
    pipeline = DDPMPipeline(tiny_unet(), DIFFUSERS["ddpm"]())
    pipeline.scheduler = SodaScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is SodaScheduler and loaded.scheduler.config.prediction_type == "v_prediction"
    loaded.set_progress_bar_config(disable=True)
    assert loaded(1, num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_shapes_places_and_timesteps_that_do_not_fit_are_refused() -> None:
    """By whatever config: none broadcasts."""
    sample = torch.randn(2, 3, 4, 4)
    for clip in (True, False):
        scheduler = SodaScheduler(clip_sample=clip)
        scheduler.set_timesteps(5)
        first = scheduler.timesteps[0]
        for wrong in (sample[:1], sample[:, :1]):
            with pytest.raises(ValueError, match="model_output has shape .*; it must be that of sample"):
                scheduler.step(wrong, first, sample)
        for timestep in (None, 900.5, scheduler.timesteps[:2]):
            with pytest.raises(ValueError, match="it must be one of scheduler.timesteps"):
                scheduler.step(sample, timestep, sample)
        for begin in (-3, "a", True):
            with pytest.raises(ValueError, match="begin_index is .*; it must be an int of 0 or more"):
                scheduler.set_begin_index(begin)
