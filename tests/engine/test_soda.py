"""The model as users meet it: encode, sample, guidance by section, and files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import soda_engine
from soda_engine import Soda
from soda_engine.models.soda import WEIGHTS_NAME
from soda_kernels import philox_normal, sampler_step
from tests.engine.tiny import tiny_model
from tests.engine.tiny_soda import tiny_config, tiny_soda
from tests.harness.host_sync import DEVICE, NoHostSync

STEPS = 4
# z of two batch sizes, or a sample of two: the same sums in another order, in fp32, through a few layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# The first step of a sampler divides such a difference by the schedule's smallest alpha, 0.003.
SAMPLED = {"rtol": 0, "atol": 1e-5 / 0.003}


@pytest.fixture(scope="module")
def model() -> Soda:
    return tiny_soda()


@pytest.fixture(scope="module")
def z(model: Soda) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(5, model.config.latent.dim, generator=generator)


# encode


@pytest.mark.parametrize("size", [(8, 8), (33, 47), (5, 3), (1, 1)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_encode_takes_any_size(model: Soda, size: tuple[int, int]) -> None:
    z = model.encode(torch.rand(2, 3, *size) * 2 - 1)
    assert z.shape == (2, 13) and z.dtype == torch.float32 and not z.requires_grad and z.isfinite().all()


@pytest.mark.parametrize("side", [8, 19], ids=["8px", "19px"])
def test_encode_takes_bytes_and_floats_alike(model: Soda, side: int) -> None:
    images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    torch.testing.assert_close(model.encode(images), model.encode(images.float() / 127.5 - 1), **CLOSE)
    assert not torch.allclose(model.encode(images), model.encode(255 - images), **CLOSE)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7])
def test_batch_size_does_not_change_z(model: Soda, batch_size: int) -> None:
    images = torch.rand(5, 3, 9, 9) * 2 - 1
    torch.testing.assert_close(model.encode(images, batch_size=batch_size), model.encode(images), **CLOSE)


@pytest.mark.parametrize("method", ["encode", "sample"])
def test_use_leaves_training_as_it_was(z: Tensor, method: str) -> None:
    model = tiny_soda(tiny_config(dropout=0.5))
    images = torch.rand(5, 3, 8, 8) * 2 - 1
    arguments: dict[str, Any] = {} if method == "encode" else {"num_steps": 2}
    inputs = images if method == "encode" else z
    expected = getattr(model, method)(inputs, **arguments)
    model.train()
    model.encoder.layer1.eval()  # a part that somebody froze
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(getattr(model, method)(inputs, **arguments), expected)
    assert model.training and model.denoiser.training and not model.encoder.layer1.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError):
        getattr(model, method)(inputs[:, :2], **arguments)
    assert model.training and model.encoder.training


def test_encode_of_nothing(model: Soda) -> None:
    assert model.encode(torch.empty(0, 3, 8, 8)).shape == (0, 13)


WRONG_IMAGES = {"1-channel": (2, 1, 8, 8), "4-channels": (2, 4, 8, 8), "no-batch": (3, 8, 8)}


@pytest.mark.parametrize("case", WRONG_IMAGES)
def test_encode_names_what_it_takes(model: Soda, case: str) -> None:
    with pytest.raises(ValueError, match=r"images has shape .*; this model takes \(N, 3, H, W\)"):
        model.encode(torch.rand(WRONG_IMAGES[case]))


# sample


@pytest.mark.parametrize("method", ["ddim", "ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_samples_are_images(z: Tensor, method: str, target: str) -> None:
    model = tiny_soda(tiny_config(target=target))
    images = model.sample(z, num_steps=STEPS, method=method)
    assert images.shape == (5, 3, 8, 8) and images.dtype == torch.float32 and not images.requires_grad
    assert images.isfinite().all() and images.abs().max() <= 1
    assert images.std() > 0.01 and not torch.allclose(images[0], images[1], atol=1e-3)


def test_sample_of_nothing(model: Soda, z: Tensor) -> None:
    assert model.sample(z[:0], num_steps=2).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"method": "ddpm"}], ids=["ddim", "ddim-eta1", "ddpm"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_an_image_depends_on_its_id_alone(model: Soda, z: Tensor, batch_size: int, options: dict[str, Any]) -> None:
    ids, order = torch.tensor([7, 3, 3, 0, 2**40]), torch.tensor([4, 0, 2, 1, 3])
    expected = model.sample(z, num_steps=STEPS, sample_ids=ids, **options)
    again = model.sample(z[order], num_steps=STEPS, sample_ids=ids[order], batch_size=batch_size, **options)
    torch.testing.assert_close(again, expected[order], **SAMPLED)


def test_ids_count_from_zero(model: Soda, z: Tensor) -> None:
    images = model.sample(z, num_steps=STEPS, sample_ids=[0, 1, 2, 3, 4])
    assert torch.equal(model.sample(z, num_steps=STEPS), images)


@pytest.mark.parametrize("options", [{"seed": 1}, {"sample_ids": [9, 8, 7, 6, 5]}], ids=["seed", "ids"])
def test_seed_and_ids_change_the_image(model: Soda, z: Tensor, options: dict[str, Any]) -> None:
    images = model.sample(z, num_steps=STEPS)
    changed = model.sample(z, num_steps=STEPS, **options)
    assert ((images - changed).abs().amax(dim=(1, 2, 3)) > 0.05).all()


def test_noise_is_the_seeds_unless_given(model: Soda, z: Tensor) -> None:
    shape, last = (5, 3, 8, 8), model.config.diffusion.num_steps
    noise = philox_normal(shape, seed=3, sample_ids=torch.arange(5), step=last, stream="sampler")
    images = model.sample(z, num_steps=STEPS, seed=3)
    assert torch.equal(model.sample(z, num_steps=STEPS, x_T=noise), images)
    other = model.sample(z, num_steps=STEPS, x_T=-noise)
    assert not torch.allclose(other, images, atol=1e-2)


def test_clipping_can_be_widened_and_left_out(model: Soda, z: Tensor) -> None:
    widest = {
        clip: float(model.sample(z, num_steps=1, clip_x0=clip).abs().max()) for clip in (0.5, 1.0, None)
    }  # fmt: skip
    assert widest[0.5] == 0.5 and widest[1.0] == 1.0 and widest[None] > 1.5


def test_dpmpp_differs_from_ddim(model: Soda, z: Tensor) -> None:
    ddim, second_order = (model.sample(z, num_steps=STEPS, method=method) for method in ("ddim", "dpmpp_2m"))
    assert not torch.allclose(ddim, second_order, atol=1e-3)


def test_progress_is_shown_when_asked(model: Soda, z: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    model.sample(z, num_steps=2)
    assert capsys.readouterr().err == ""
    model.sample(z, num_steps=2, progress=True)
    assert "sampling" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 2.0, "sections": ["middle"]}, {"method": "ddpm"}], ids=str)
def test_sampling_would_not_wait_for_a_gpu(options: dict[str, Any]) -> None:
    model, z = tiny_soda(random=False).to(DEVICE), torch.empty(5, 13, device=DEVICE)
    model.schedule  # noqa: B018  moved to the device once, which waits
    with NoHostSync() as watch:
        images = model.sample(z, num_steps=3, batch_size=3, **options)
    assert images.device == DEVICE and watch.ops["sampler_step"] == 2 * 3


# guidance and sections


@pytest.mark.parametrize(("cfg_scale", "rows"), [(1.0, 5), (2.0, 10), (0.0, 10)], ids=["off", "2", "0"])
def test_both_halves_go_in_one_call(
    z: Tensor, cfg_scale: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = tiny_soda(), []
    model.denoiser.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    model.sample(z, num_steps=3, cfg_scale=cfg_scale)
    assert batches == [rows] * 3


@pytest.mark.parametrize("masks", [1, 5, None])
@pytest.mark.parametrize("cross_attention", [False, True])
def test_what_stays_in_a_loop_is_projected_once(z: Tensor, cross_attention: bool, masks: int | None) -> None:
    config = tiny_config()
    model = tiny_soda(replace(config, denoiser=replace(config.denoiser, cross_attention=cross_attention)))
    mask = None if masks is None else (torch.rand(masks, model.num_sections) < 0.5).float()
    calls: Counter[str] = Counter()
    for name, module in model.denoiser.named_modules():
        if name.endswith(("time_proj", "z_proj", "time", "tokens")):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    x_t = torch.randn(5, 3, 8, 8)
    denoise = model.denoiser_for(4)(z, section_mask=mask)
    with torch.no_grad():
        found = [denoise(x_t, torch.tensor(index)) for index in (999, 666, 333, 0)]
        assert calls and set(calls.values()) == {1}
        for index, prediction in zip((999, 666, 333, 0), found, strict=True):
            expected = model.denoise(x_t, torch.full((5,), index), z, section_mask=mask)
            torch.testing.assert_close(prediction, expected, **CLOSE)
    with pytest.raises(IndexError):
        denoise(x_t, torch.tensor(500))  # no step of the loop
    for earlier, later in pairwise(found):
        assert not torch.allclose(earlier, later, atol=1e-3), "the time matters"


def test_a_loops_denoiser_needs_a_model_without_dropout(z: Tensor) -> None:
    model = tiny_soda(tiny_config(dropout=0.1)).train()
    with pytest.raises(ValueError, match="training mode with dropout"):
        model.denoiser_for(3)
    denoise = model.eval().denoiser_for(3)(z.clone().requires_grad_())
    assert not denoise(torch.randn(5, 3, 8, 8), torch.tensor(999)).requires_grad, "sampling has no gradients"


def by_hand(model: Soda, z: Tensor, cond: Sequence[int], uncond: Sequence[int], cfg_scale: float) -> Tensor:
    """Sample 4 DDIM steps with two denoise calls a step, on z whose other sections are set to zero by hand."""

    def kept(sections: Sequence[int]) -> Tensor:
        part = torch.zeros_like(z)
        for index in sections:
            cut = model.section_slices[index]
            part[:, cut] = z[:, cut]
        return part

    ids, last = torch.arange(len(z)), model.config.diffusion.num_steps
    x = philox_normal((len(z), 3, 8, 8), seed=0, sample_ids=ids, step=last, stream="sampler")
    indices = [999, 666, 333, 0]
    with torch.no_grad():
        for index, following in zip(indices, [*indices[1:], -1], strict=True):
            step_index = torch.full((len(z),), index)
            eps_c, eps_u = (model.denoise(x, step_index, kept(sections)) for sections in (cond, uncond))
            eps = eps_u + cfg_scale * (eps_c - eps_u)
            x, _ = sampler_step(x, eps, None, model.schedule, index, following, clip_x0=1.0)
    return x


GUIDED: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "all": ({}, (0, 1, 2), ()),
    "kept-by-name": ({"sections": ["level0", "middle"]}, (0, 2), ()),
    "kept-by-index": ({"sections": [1]}, (1,), ()),
    "dropped-by-name": ({"unconditional_sections": ["middle"]}, (0, 1, 2), (0, 1)),
    "dropped-by-index": ({"unconditional_sections": (0, 1)}, (0, 1, 2), (2,)),
    "both": ({"sections": [0, "level1"], "unconditional_sections": ["level0"]}, (0, 1), (1,)),
    "none-dropped": ({"unconditional_sections": []}, (0, 1, 2), (0, 1, 2)),
}


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5, -1.0])
@pytest.mark.parametrize("case", GUIDED)
def test_guidance_is_the_formula(model: Soda, z: Tensor, case: str, cfg_scale: float) -> None:
    options, cond, uncond = GUIDED[case]
    images = model.sample(z, num_steps=4, cfg_scale=cfg_scale, **options)
    torch.testing.assert_close(images, by_hand(model, z, cond, uncond, cfg_scale), **SAMPLED)


def test_scale_one_is_no_guidance(model: Soda, z: Tensor) -> None:
    plain = model.sample(z, num_steps=STEPS)
    assert torch.equal(model.sample(z, num_steps=STEPS, cfg_scale=1.0, unconditional_sections=["middle"]), plain)
    assert not torch.allclose(model.sample(z, num_steps=STEPS, cfg_scale=2.0), plain, atol=1e-3)


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_no_sections_ignore_z(model: Soda, z: Tensor, cfg_scale: float) -> None:
    options: dict[str, Any] = {"num_steps": STEPS, "sections": [], "cfg_scale": cfg_scale}
    unguided = model.sample(z, **options)
    torch.testing.assert_close(model.sample(100 * z.flip(0), **options), unguided, **SAMPLED)
    torch.testing.assert_close(model.sample(torch.zeros_like(z), num_steps=STEPS), unguided, **SAMPLED)


@pytest.mark.parametrize("name", ["level0", "level1", "middle"])
def test_a_section_alone_reads_its_part_of_z(model: Soda, z: Tensor, name: str) -> None:
    cut = model.section_slices[model.section_names.index(name)]
    other = torch.randn_like(z)
    same_part, same_rest = other.clone(), z.clone()
    same_part[:, cut], same_rest[:, cut] = z[:, cut], other[:, cut]
    images, as_part, as_rest = (
        model.sample(latents, num_steps=STEPS, sections=[name]) for latents in (z, same_part, same_rest)
    )
    assert torch.equal(as_part, images) and not torch.allclose(as_rest, images, atol=1e-4)


def test_sections_cover_z(model: Soda) -> None:
    assert model.section_names == ("level0", "level1", "middle") and model.num_sections == 3
    assert [(cut.start, cut.stop) for cut in model.section_slices] == [(0, 4), (4, 8), (8, 13)]


WRONG_SAMPLING: dict[str, tuple[dict[str, Any], str]] = {
    "section-name": ({"sections": ["level7"]}, "section 'level7' does not exist; it must be one of"),
    "section-index": ({"sections": [3]}, "section 3 does not exist"),
    "section-negative": ({"sections": [-1]}, "section -1 does not exist"),
    "unconditional-section": ({"unconditional_sections": ["x"]}, "section 'x' does not exist"),
    "method": ({"method": "euler"}, "method"),
    "no-steps": ({"num_steps": 0}, "num_steps is 0; it must be between 1 and the schedule's 1000"),
    "too-many-steps": ({"num_steps": 1001}, "num_steps is 1001"),
    "eta": ({"eta": -1.0}, "eta"),
    "few-ids": ({"sample_ids": [1, 2]}, "sample_ids"),
    "few-ids-with-x_T": ({"sample_ids": [1, 2], "x_T": torch.zeros(5, 3, 8, 8)}, "sample_ids"),
    "x_T": ({"x_T": torch.zeros(5, 3, 4, 4)}, r"x_T has shape \(5, 3, 4, 4\); it must be \(5, 3, 8, 8\)"),
    "no-batch": ({"batch_size": 0}, "batch_size is 0; it must be positive"),
    "negative-batch": ({"batch_size": -2}, "batch_size is -2"),
}


@pytest.mark.parametrize("case", WRONG_SAMPLING)
def test_wrong_sampling_is_named(model: Soda, z: Tensor, case: str) -> None:
    options, message = WRONG_SAMPLING[case]
    with pytest.raises(ValueError, match=message):
        model.sample(z, **{"num_steps": 2, **options})


@pytest.mark.parametrize("shape", [(5, 12), (13,), (5, 13, 1)], ids=lambda s: "x".join(map(str, s)))
def test_wrong_z_is_named(model: Soda, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"z has shape .*; it must be \(N, 13\)"):
        model.sample(torch.zeros(shape), num_steps=2)


def test_wrong_batch_size_of_encode(model: Soda) -> None:
    with pytest.raises(ValueError, match="batch_size is 0; it must be positive"):
        model.encode(torch.zeros(2, 3, 8, 8), batch_size=0)


# files


def assert_same(actual: Soda, expected: Soda) -> None:
    assert actual.config == expected.config and not actual.training
    states = actual.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("read", [Soda.from_pretrained, soda_engine.load], ids=["from_pretrained", "load"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_saved_model_is_the_same_model(
    model: Soda, z: Tensor, tmp_path: Path, read: Any, kind: type
) -> None:
    images = torch.rand(2, 3, 8, 8)
    model.save_pretrained(tmp_path / "saved")
    loaded = read(kind(tmp_path / "saved"))
    assert_same(loaded, model)
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert torch.equal(loaded.sample(z, num_steps=2), model.sample(z, num_steps=2))


def test_saved_files_hold_the_config_and_no_pickles(model: Soda, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {WEIGHTS_NAME, "config.json", "README.md"}
    with safe_open(tmp_path / WEIGHTS_NAME, framework="pt") as file:
        in_weights = json.loads(file.metadata()["soda_config"])
    assert in_weights == json.loads((tmp_path / "config.json").read_text())
    assert in_weights["denoiser"]["num_groups"] == 4
    (tmp_path / "config.json").unlink()  # a copy for readers: the weights carry their own
    assert_same(Soda.from_pretrained(tmp_path), model)


def test_a_channels_last_model_in_training_can_be_saved(tmp_path: Path) -> None:
    model = tiny_soda().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    model.save_pretrained(tmp_path)
    assert model.training
    assert_same(soda_engine.load(tmp_path), model.eval())


def test_the_untrained_twin(model: Soda) -> None:
    torch.manual_seed(1)
    twin = type(model)(model.config)
    assert twin.state_dict().keys() == model.state_dict().keys() and twin.config == model.config
    assert not torch.equal(twin.encoder.conv1.weight, model.encoder.conv1.weight)


DAMAGES: dict[str, Any] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "text": lambda data: b"not a model at all, not even close",
    "no-config": lambda data: data.replace(b"soda_config", b"soda-config"),
    "other-config": lambda data: data.replace(b'\\"dim\\": 13', b'\\"dim\\": 14'),
    "broken-config": lambda data: data.replace(b'\\"dim\\": 13', b'\\"dim\\": @@'),
    "unknown-field": lambda data: data.replace(b'\\"dim\\"', b'\\"din\\"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named_in_one_line(model: Soda, tmp_path: Path, damage: str) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS_NAME
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    assert path.read_bytes() != whole
    with pytest.raises(ValueError) as caught:
        soda_engine.load(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["nowhere", "empty", "runs/nowhere", "nobody/nothing", "file"])
def test_a_model_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").touch()
    with pytest.raises(FileNotFoundError, match=f"no model at {place}") as caught:
        soda_engine.load(place)
    assert "\n" not in str(caught.value)


def test_from_pretrained_of_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights at"):
        Soda.from_pretrained(tmp_path)


def test_the_schedule_follows_the_model_and_is_not_saved(model: Soda) -> None:
    with torch.device("meta"):
        on_meta = Soda(tiny_config(loss_weight="min_snr"))
    assert all(parameter.device.type == "meta" for parameter in on_meta.parameters())
    assert on_meta.schedule.alpha_bar.device.type == "meta"
    assert model.schedule.alpha_bar.device == model.device == torch.device("cpu")
    assert model.schedule.num_steps == 1000 and not any("weights" in name for name in on_meta.state_dict())


def test_a_single_section_name_must_be_in_a_list() -> None:
    model = Soda(tiny_model())
    with pytest.raises(ValueError, match=r"sections is 'middle'; it must be a list"):
        model.sample(torch.zeros(1, 12), num_steps=1, sections="middle")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_encode_takes_every_float_dtype(dtype: torch.dtype) -> None:
    model, images = Soda(tiny_model()), torch.linspace(-1, 1, 2 * 9 * 9).view(2, 1, 9, 9)
    torch.testing.assert_close(model.encode(images.to(dtype)), model.encode(images), rtol=0.02, atol=0.02)
