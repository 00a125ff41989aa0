"""Settings: what is saved can be read again, what is wrong is named, and the presets fit together."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from soda_engine import PRESETS, Soda
from soda_engine.config import DenoiserConfig, SodaConfig, TrainConfig, from_dict, to_dict


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    text = json.dumps(to_dict(PRESETS[name]))
    assert from_dict(TrainConfig, json.loads(text)) == PRESETS[name]


def test_every_field_is_saved() -> None:
    changed = dataclasses.replace(
        PRESETS["digits"], max_minutes=1.5, tensorboard=False,
        dataset=dataclasses.replace(PRESETS["digits"].dataset, image_column="photo"),
    )  # fmt: skip
    values = to_dict(changed)
    assert values["max_minutes"] == 1.5 and values["tensorboard"] is False
    assert values["dataset"]["image_column"] == "photo"
    assert values["model"]["denoiser"]["multipliers"] == [1, 2]
    assert from_dict(TrainConfig, values) == changed != PRESETS["digits"]


def test_missing_keys_take_the_defaults() -> None:
    config = from_dict(SodaConfig, {"denoiser": {"channels": 64}})
    assert config == SodaConfig(denoiser=DenoiserConfig(channels=64))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown-key": ({"denoiser": {"chanels": 8}}, "DenoiserConfig has no field 'chanels'"),
    "unknown-part": ({"unet": {}}, "SodaConfig has no field 'unet'"),
    "text-for-int": ({"denoiser": {"channels": "8"}}, "DenoiserConfig.channels is '8'; it must be of type int"),
    "float-for-int": ({"latent": {"dim": 8.5}}, "LatentConfig.dim is 8.5"),
    "bool-for-int": ({"latent": {"dim": True}}, "LatentConfig.dim is True"),
    "bool-for-float": ({"latent": {"drop_all": False}}, "LatentConfig.drop_all is False"),
    "int-for-bool": ({"denoiser": {"cross_attention": 1}}, "DenoiserConfig.cross_attention is 1"),
    "none-for-int": ({"latent": {"dim": None}}, "LatentConfig.dim is None"),
    "choice": ({"diffusion": {"target": "noise"}}, "DiffusionConfig.target is 'noise'"),
    "int-for-list": ({"denoiser": {"multipliers": 2}}, "DenoiserConfig.multipliers is 2"),
    "wrong-item": ({"denoiser": {"multipliers": [1, "2"]}}, "DenoiserConfig.multipliers is '2'"),
    "text-for-part": ({"denoiser": "unet"}, "SodaConfig.denoiser is 'unet'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_named_in_one_line(case: str) -> None:
    values, message = WRONG[case]
    with pytest.raises(ValueError) as caught:
        from_dict(SodaConfig, values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("betas", [[0.9], [0.9, 0.95, 0.99]], ids=["1", "3"])
def test_pairs_hold_two_values(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="OptimConfig.betas"):
        from_dict(TrainConfig, {"optim": {"betas": betas}})


@pytest.mark.parametrize("values", [[], "config", None], ids=["list", "text", "null"])
def test_something_else_than_an_object(values: Any) -> None:
    with pytest.raises(ValueError, match="SodaConfig is .*; it must be an object"):
        from_dict(SodaConfig, values)


def test_whole_numbers_are_floats_where_floats_are_wanted() -> None:
    clip = from_dict(TrainConfig, {"optim": {"grad_clip": 2}}).optim.grad_clip
    assert clip == 2.0 and isinstance(clip, float)


def test_configs_are_frozen_and_hashable() -> None:
    config = SodaConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.latent.dim = 3  # type: ignore[misc]
    assert hash(config) == hash(SodaConfig())
    with pytest.raises(TypeError):
        DenoiserConfig(3)  # type: ignore[misc]  # every field is given by name


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_fit_together(name: str) -> None:
    preset = PRESETS[name]
    config = preset.model
    with torch.device("meta"):
        model = Soda(config)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    source = torch.empty(2, config.encoder.in_channels, *(config.encoder.image_size,) * 2, device="meta")
    z = model.encoder(source)
    assert z.shape == (2, config.latent.dim)
    x_t = torch.empty(2, config.denoiser.in_channels, *(config.denoiser.image_size,) * 2, device="meta")
    seed = torch.empty(2, dtype=torch.int64, device="meta")
    assert model.denoiser(x_t, torch.empty(2, device="meta"), z, seed=seed).shape == x_t.shape
    assert config.encoder.in_channels == config.denoiser.in_channels == preset.dataset.channels
    assert max(config.encoder.image_size, config.denoiser.image_size) <= preset.dataset.image_size
    sides = {config.denoiser.image_size >> level for level in range(len(config.denoiser.multipliers))}
    assert set(config.denoiser.attention_resolutions) <= sides
    assert preset.out == f"runs/{name}" and preset.optim.warmup_images < preset.total_images


def test_encoder_and_denoiser_resolutions_are_independent() -> None:
    config = PRESETS["imagenet128"].model
    assert (config.encoder.image_size, config.denoiser.image_size) == (224, 128)
