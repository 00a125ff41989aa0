"""Random views: what each operation does to pixels, and what the draws depend on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from soda_engine.config import PipelineConfig
from soda_engine.data.randaugment import OPS, randaugment
from soda_engine.data.views import _draw_crop, _resample, make_view, plain_view, views_preset
from tests.engine.host_sync import NoHostSync

EVERYTHING = dataclasses.replace(views_preset("classification").source, randaugment_probability=1.0, randaugment_ops=3)


def pictures(count: int, channels: int = 3, side: int = 16, seed: int = 0) -> Tensor:
    """Smooth random images, uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    return F.interpolate(coarse, size=(side, side), mode="bilinear").mul(255).to(torch.uint8)


def view(images: Tensor, pipeline: PipelineConfig, size: int = 16, **changes: Any) -> Tensor:
    """A view with sample ids from 100 on, epoch 0, seed 0, of the source."""
    arguments: dict[str, Any] = {
        "seed": 0,
        "sample_ids": torch.arange(len(images)) + 100,
        "epochs": torch.zeros(len(images), dtype=torch.int64),
        "role": "source",
    }
    return make_view(images, pipeline, size, **{**arguments, **changes})


# what the draws depend on


@pytest.mark.parametrize(
    ("channels", "side", "size"),
    [(3, 32, 32), (1, 8, 8), (1, 33, 29), (3, 31, 45), (3, 97, 64), (3, 210, 200)],
    ids=lambda value: str(value),
)
def test_a_view_is_the_same_in_any_batch(channels: int, side: int, size: int) -> None:
    images, ids, epochs = pictures(24, channels, side), torch.arange(24) + 7, torch.arange(24) % 3
    whole = view(images, EVERYTHING, size, sample_ids=ids, epochs=epochs)
    for part in [[0], [11], [23], [9, 2, 5, 3, 7, 1, 0], list(range(23, -1, -1))]:
        alone = view(images[part], EVERYTHING, size, sample_ids=ids[part], epochs=epochs[part])
        assert torch.equal(alone, whole[part])


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"role": "target"}, {"epochs": torch.ones(4, dtype=torch.int64)}, {"sample_ids": torch.arange(4)}],
    ids=lambda changes: next(iter(changes)),
)
def test_seed_role_epoch_and_sample_each_change_the_view(changes: dict[str, Any]) -> None:
    images = pictures(1).expand(4, -1, -1, -1)
    first, second = view(images, EVERYTHING), view(images, EVERYTHING, **changes)
    assert torch.equal(first, view(images, EVERYTHING))
    assert all((a - b).abs().max() > 0.05 for a, b in zip(first, second, strict=True))
    assert all((first[i] - first[0]).abs().max() > 0.05 for i in (1, 2, 3))


def test_the_noise_does_not_follow_the_crop() -> None:
    images = torch.full((512, 1, 16, 16), 128, dtype=torch.uint8)
    noisy = PipelineConfig(noise_std=0.1)
    # A constant image shows the noise alone, whatever was cropped.
    cropped = view(images, dataclasses.replace(noisy, crop_probability=1.0, flip_probability=0.5))
    torch.testing.assert_close(cropped, view(images, noisy))
    noise = (cropped - plain_view(images, 16)) / 0.1
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    # Were both drawn with one key, value 3 of the noise would hold the sine of the number that places the crop.
    ramp = torch.arange(16, dtype=torch.uint8)[:, None].expand(512, 1, 16, 16) * 16
    quarter = PipelineConfig(crop_probability=1.0, crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0))
    place = view(ramp, quarter).mean((1, 2, 3))
    assert torch.corrcoef(torch.cat((place[None], noise.flatten(1)[:, :8].T)))[0, 1:].abs().max() < 0.15


def test_noise_can_be_left_out() -> None:
    images = pictures(4)
    quiet = dataclasses.replace(EVERYTHING, noise_std=0.0)
    assert torch.equal(view(images, EVERYTHING, noise=False), view(images, quiet))
    assert not torch.equal(view(images, EVERYTHING), view(images, quiet))


def test_drawing_needs_no_global_state() -> None:
    before = torch.get_rng_state()
    view(pictures(2), EVERYTHING)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_changes_nothing() -> None:
    images = pictures(4)
    expected = view(images, EVERYTHING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(view(images, EVERYTHING), expected)


# plain resizing


@pytest.mark.parametrize("size", [16, 8, 24], ids=["same", "smaller", "larger"])
def test_the_identity_pipeline_is_the_plain_view(size: int) -> None:
    images = pictures(3)
    assert torch.equal(view(images, PipelineConfig(), size), plain_view(images, size))


def test_plain_view_of_levels_and_floats_agrees() -> None:
    images = pictures(2)
    floats = images.float() / 127.5 - 1
    torch.testing.assert_close(plain_view(images, 16), floats)
    torch.testing.assert_close(plain_view(images, 6), plain_view(floats, 6))
    assert plain_view(images, 16).min() >= -1 and plain_view(images, 16).max() <= 1
    assert plain_view(floats.double(), 8).dtype == torch.float64


def test_plain_view_keeps_the_centre_and_antialiases() -> None:
    wide = F.pad(torch.full((1, 3, 8, 8), 200, dtype=torch.uint8), (4, 4))
    torch.testing.assert_close(plain_view(wide, 8), torch.full((1, 3, 8, 8), 200 / 127.5 - 1))
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(32).expand(1, 1, 64, 64)
    assert plain_view(stripes, 16).abs().max() < 0.2


# crops and flips


@pytest.mark.parametrize("size", [64, 32, 17, 96], ids=lambda size: f"to-{size}")
def test_an_undrawn_crop_resizes_like_interpolate(size: int) -> None:
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    undrawn = PipelineConfig(crop_probability=1e-9)
    # Half a grey level is what an 8-bit file rounds away.
    torch.testing.assert_close(view(images, undrawn, size), plain_view(images, size), atol=0.5 / 127.5, rtol=0)


@pytest.mark.parametrize("size", [32, 12], ids=lambda size: f"to-{size}")
def test_a_crop_resizes_its_box_like_interpolate(size: int) -> None:
    # With one scale and ratio the crop is a square of 16 of 64 pixels; a ramp tells where it was.
    ramp = torch.arange(64, dtype=torch.float32)
    images = torch.stack((ramp.expand(64, 64), ramp[:, None].expand(64, 64))).mul(4)[None].repeat(64, 1, 1, 1)
    images = torch.cat((images, torch.zeros(64, 1, 64, 64)), 1).to(torch.uint8)
    crop = PipelineConfig(crop_probability=1.0, crop_scale=(1 / 16, 1 / 16), crop_ratio=(1.0, 1.0))
    levels = (view(images, crop, size) + 1) * 127.5 / 4
    middle = size // 2
    slope = levels[:, 0, middle, middle + 1] - levels[:, 0, middle, middle]
    torch.testing.assert_close(slope, torch.full((64,), 16 / size), atol=0.2, rtol=0)
    rows = levels[:, 1, middle + 1, middle] - levels[:, 1, middle, middle]
    torch.testing.assert_close(rows, torch.full((64,), 16 / size), atol=0.2, rtol=0)
    left = levels[:, 0].mean((-2, -1)) + 0.5 - 8
    assert left.min() > -0.5 and left.max() < 48.5 and left.std() > 10


def test_a_crop_sees_nothing_beyond_its_edges() -> None:
    images = torch.full((1, 1, 12, 12), 255, dtype=torch.uint8)
    images[..., 2:10, 2:10] = 0
    box = [torch.tensor([value], dtype=torch.float64) for value in (2 / 12, 2 / 12, 8 / 12, 8 / 12)]
    for size in (4, 8, 30):
        assert _resample(images, *box, torch.tensor([False]), size).max() == 0


@pytest.mark.parametrize("size", [8, 24, 48], ids=lambda size: f"to-{size}")
def test_resampling_is_exact_arithmetic(size: int) -> None:
    # Weights in steps of 2^-10 on rows in steps of 1/8: no sum is ever rounded, so no order of summing matters.
    images = torch.randint(0, 256, (8, 3, 24, 24), dtype=torch.uint8)
    crops = _draw_crop(torch.rand(8, 8), PipelineConfig(crop_probability=1.0))
    levels = _resample(images, *crops, torch.zeros(8, dtype=torch.bool), size) * 2**13
    assert torch.equal(levels, levels.round())


def test_a_ratio_that_cannot_fit_bends_and_the_area_stays() -> None:
    pipeline = PipelineConfig(crop_probability=1.0, crop_scale=(0.4, 1.0), crop_ratio=(2.0, 3.0))
    draws = torch.rand(1000, 8)
    _, _, height, width = _draw_crop(draws, pipeline)
    torch.testing.assert_close(height * width, 0.4 + 0.6 * draws[:, 1].double())
    assert (height * width)[width < 1 - 1e-9].max() <= 0.5 + 1e-9


def test_crop_areas_and_ratios_fill_their_ranges() -> None:
    pipeline = PipelineConfig(crop_probability=1.0)
    top, left, height, width = _draw_crop(torch.rand(20_000, 8), pipeline)
    area, ratio = height * width, width / height
    assert 0.08 <= area.min() < 0.09 and 0.99 < area.max() <= 1
    # Uniform: its deciles are where they should be.
    deciles = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    torch.testing.assert_close(area.quantile(deciles), 0.08 + 0.92 * deciles, atol=0.02, rtol=0)
    small = ratio[area < 0.5]
    assert 0.7499 < small.min() < 0.76 and 1.32 < small.max() < 1.3334
    assert abs(small.log().mean()) < 0.01
    for start, length in ((top, height), (left, width)):
        assert start.min() >= 0 and (start + length).max() <= 1 + 1e-9
        free = (length < 0.9) & (length > 0.1)
        assert abs((start[free] / (1 - length[free])).mean() - 0.5) < 0.02


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.95, 1.0], ids=lambda p: f"p-{p}")
def test_crops_come_as_often_as_asked(probability: float) -> None:
    images = pictures(1).expand(1000, -1, -1, -1)
    undrawn = plain_view(images[:1], 16)
    pipeline = PipelineConfig(crop_probability=probability, crop_scale=(0.1, 0.5))
    drawn = (view(images, pipeline) - undrawn).abs().amax((1, 2, 3)) > 0.01
    assert abs(drawn.float().mean() - probability) < 0.05


def test_flips_mirror_half_of_the_images() -> None:
    images = pictures(1).expand(1000, -1, -1, -1)
    plain = plain_view(images[:1], 16)
    flipped = view(images, PipelineConfig(flip_probability=0.5))
    is_flipped = (flipped == plain.flip(-1)).flatten(1).all(1)
    assert torch.equal(is_flipped, ~(flipped == plain).flatten(1).all(1))
    assert abs(is_flipped.float().mean() - 0.5) < 0.06


# RandAugment


def apply(op: str, images: Tensor, strength: float, negative: bool = False) -> Tensor:
    """One operation on every image."""
    ops = torch.full((len(images), 1), OPS.index(op))
    return randaugment(images.clone(), ops, torch.full_like(ops, negative, dtype=torch.bool), strength)


def solid(image: Tensor) -> Image.Image:
    """A [3, S, S] image in [0, 1] as Pillow's."""
    return Image.fromarray(image.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy())


PILLOW = {
    "identity": lambda image, level: image,
    "autocontrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
    "solarize": lambda image, level: ImageOps.solarize(image, math.ceil(255 * (1 - abs(level)))),
    "posterize": lambda image, level: ImageOps.posterize(image, 8 - round(4 * abs(level))),
    "color": lambda image, level: ImageEnhance.Color(image).enhance(1 + 0.9 * level),
    "contrast": lambda image, level: ImageEnhance.Contrast(image).enhance(1 + 0.9 * level),
    "brightness": lambda image, level: ImageEnhance.Brightness(image).enhance(1 + 0.9 * level),
    "sharpness": lambda image, level: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * level),
    "rotate": lambda image, level: image.rotate(30 * level, Image.Resampling.BILINEAR, fillcolor=(128,) * 3),
}


@pytest.mark.parametrize("level", [0.3, -0.3, 1.0, -1.0], ids=lambda level: f"level-{level}")
@pytest.mark.parametrize("op", PILLOW)
def test_operations_are_pillows(op: str, level: float) -> None:
    images = pictures(3, side=24, seed=1).float() / 255
    ours = apply(op, images, abs(level), level < 0)
    theirs = [torch.from_numpy(np.array(PILLOW[op](solid(image), level))).permute(2, 0, 1) / 255 for image in images]
    difference = (ours - torch.stack(theirs)).abs()
    # Pillow rounds to 8 bits at each step; at the rim of a rotation the two fill differently.
    inner = difference[..., 6:-6, 6:-6] if op == "rotate" else difference
    assert inner.max() < (0.04 if op == "rotate" else 0.02)


def test_shears_and_translations_move_pixels_the_way_they_say() -> None:
    dot = torch.full((1, 1, 31, 31), 0.5)  # on the grey that comes in at the edges
    dot[0, 0, 25, 15] = 1  # ten below the centre

    def where(op: str, strength: float, negative: bool) -> list[float]:
        moved = apply(op, dot, strength, negative)[0, 0] - 0.5
        y, x = torch.meshgrid(torch.arange(31.0), torch.arange(31.0), indexing="ij")
        return [round(float((moved * c).sum() / moved.sum()) - 15, 3) for c in (x, y)]

    assert where("identity", 1.0, False) == [0, 10]
    assert where("shear_x", 1.0, False) == [3, 10] and where("shear_x", 1.0, True) == [-3, 10]
    assert where("shear_y", 1.0, False) == [0, 10]
    ten = 10 / 31 / (150 / 331)
    assert where("translate_x", ten, False) == [10, 10] and where("translate_x", ten, True) == [-10, 10]
    assert where("translate_y", ten, True) == [0, 0]


@pytest.mark.parametrize("op", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_warps_uncover_mid_grey(op: str) -> None:
    white = torch.ones(1, 3, 16, 16)
    warped = apply(op, white, 1.0)
    assert ((warped - 0.5).abs() < 1e-6).any() and warped.min() >= 0.5 - 1e-6


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_stays_in_range(op: str, channels: int) -> None:
    images = pictures(4, channels).float() / 255
    for negative in (False, True):
        result = apply(op, images, 1.0, negative)
        assert result.shape == images.shape and result.min() >= 0 and result.max() <= 1
        same = op == "identity" or (op == "color" and channels == 1)
        assert torch.equal(result, images) == same


def test_a_constant_image_survives_autocontrast() -> None:
    images = torch.full((1, 3, 8, 8), 0.25)
    assert torch.equal(apply("autocontrast", images, 1.0), images)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let torch split its work, as it does only above a size."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 33), (3, 250)], ids=["1x8x8", "3x33x33", "3x250x250"])
@pytest.mark.parametrize("op", OPS)
def test_an_operation_is_the_same_in_any_batch(op: str, channels: int, side: int, two_threads: None) -> None:
    images = pictures(5, channels, side).float() / 255
    whole = apply(op, images, 0.5)
    for part in ([0], [1], [2], [3], [4], [4, 2, 0]):
        assert torch.equal(apply(op, images[part], 0.5), whole[part])


def test_each_sample_gets_the_operations_it_drew_in_order() -> None:
    images = pictures(6).float() / 255
    names = [("equalize", "solarize"), ("solarize", "equalize"), ("identity", "rotate")] * 2
    ops = torch.tensor([[OPS.index(a), OPS.index(b)] for a, b in names])
    negative = torch.tensor([[False, False]] * 3 + [[True, True]] * 3)
    result = randaugment(images.clone(), ops, negative, 0.5)
    for i, (first, second) in enumerate(names):
        expected = apply(second, apply(first, images[i : i + 1], 0.5, i >= 3), 0.5, i >= 3)
        assert torch.equal(result[i : i + 1], expected)
    assert not torch.equal(result[0], result[1]) and not torch.equal(result[2], result[5])


@pytest.mark.parametrize("probability", [0.0, 0.65, 1.0], ids=lambda p: f"p-{p}")
def test_randaugment_comes_as_often_as_asked(probability: float) -> None:
    images = pictures(1).expand(1000, -1, -1, -1)
    pipeline = PipelineConfig(randaugment_probability=probability, randaugment_ops=2)
    changed = (view(images, pipeline) - plain_view(images[:1], 16)).abs().amax((1, 2, 3)) > 1e-5
    # Two identities in a row, once in 196, change nothing.
    assert abs(changed.float().mean() - probability * (1 - 1 / 196)) < 0.06


def test_one_read_of_the_device_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    for name in ("tolist", "item", "nonzero", "__bool__"):
        original = getattr(torch.Tensor, name)

        def counted(self: Tensor, *args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
            reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    images = pictures(32).float() / 255
    randaugment(images, torch.arange(64).reshape(32, 2) % len(OPS), torch.zeros(32, 2, dtype=torch.bool), 0.3)
    assert reads == ["tolist"]


@pytest.mark.parametrize("name", ["classification", "light"])
def test_views_drawn_on_the_host_would_not_wait_for_a_gpu(name: str) -> None:
    images = pictures(64).expand(64, 3, -1, -1).to("meta")
    ids = torch.arange(64)
    with NoHostSync() as watch:
        view = make_view(images, views_preset(name).source, 16, seed=1, sample_ids=ids, epochs=ids, role="source")
    assert view.is_meta and watch.ops["matmul"] + watch.ops["bmm"] >= 2
    assert (watch.ops["grid_sampler_2d"] > 0) == (name == "classification")


# presets and arguments


@pytest.mark.parametrize("name", ["classification", "reconstruction", "light"])
@pytest.mark.parametrize("channels", [1, 3])
def test_presets(name: str, channels: int) -> None:
    preset = views_preset(name)
    images = pictures(16, channels)
    source, target = (view(images, getattr(preset, role), 12, role=role) for role in ("source", "target"))
    assert source.shape == target.shape == (16, channels, 12, 12)
    assert source.dtype == target.dtype == torch.float32
    assert target.min() >= -1 and target.max() <= 1 and preset.target.noise_std == 0
    assert torch.equal(target, plain_view(images, 12)) == (name in ("reconstruction", "light"))


def test_the_classification_preset_is_the_papers() -> None:
    source = views_preset("classification").source
    assert (source.crop_probability, source.crop_scale) == (0.95, (0.08, 1.0))
    assert (source.randaugment_probability, source.noise_std) == (0.65, 0.1)
    assert dataclasses.replace(source, noise_std=0.0) == views_preset("classification").target
    assert views_preset("reconstruction").source == source
    with pytest.raises(ValueError, match="views preset is 'strong'; it must be one of"):
        views_preset("strong")


def test_an_empty_batch_has_an_empty_view() -> None:
    assert view(pictures(2)[:0], EVERYTHING, 12).shape == (0, 3, 12, 12)


@pytest.mark.parametrize(
    ("pipeline", "changes", "error", "match"),
    [
        ({}, {"role": "other"}, ValueError, "role is 'other'"),
        ({}, {"size": 0}, ValueError, "size is 0"),
        ({}, {"sample_ids": torch.arange(3)}, ValueError, r"sample_ids is torch.int64 of shape \(3,\); .* int64 \[2\]"),
        ({}, {"epochs": torch.zeros(2)}, ValueError, "epochs is torch.float32"),
        ({}, {"images": torch.zeros(2, 3, 8, 8)}, TypeError, "images is torch.float32; it must be uint8"),
        ({}, {"images": torch.zeros(2, 3, 8, 9, dtype=torch.uint8)}, ValueError, r"\(2, 3, 8, 9\)"),
        ({}, {"images": torch.zeros(2, 2, 8, 8, dtype=torch.uint8)}, ValueError, "1 or 3 channels"),
        ({"crop_probability": 1.5}, {}, ValueError, "crop_probability is 1.5"),
        ({"flip_probability": -0.1}, {}, ValueError, "flip_probability is -0.1"),
        ({"randaugment_probability": 2.0}, {}, ValueError, "randaugment_probability is 2.0"),
        ({"crop_scale": (0.0, 1.0)}, {}, ValueError, "crop_scale is"),
        ({"crop_scale": (0.5, 0.2)}, {}, ValueError, "crop_scale is"),
        ({"crop_ratio": (2.0, 1.0)}, {}, ValueError, "crop_ratio is"),
        ({"randaugment_magnitude": 31}, {}, ValueError, "randaugment_magnitude is 31"),
        ({"randaugment_ops": -1}, {}, ValueError, "randaugment_ops is -1"),
        ({"noise_std": -0.1}, {}, ValueError, "noise_std is -0.1"),
    ],
    ids=lambda value: "-".join(value) or None if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_refused(
    pipeline: dict[str, Any], changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    changes = dict(changes)
    images, size = changes.pop("images", pictures(2)), changes.pop("size", 16)
    with pytest.raises(error, match=match) as caught:
        view(images, PipelineConfig(**pipeline), size, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "error"), [(torch.zeros(3, 8, 8), ValueError), (torch.zeros(1, 3, 8, 8, dtype=torch.int32), TypeError)]
)
def test_plain_view_refuses(images: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="images"):
        plain_view(images, 8)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_views() -> None:
    images = pictures(16, side=40)
    expected = view(images, EVERYTHING, 24)
    ids, epochs = torch.arange(16).cuda() + 100, torch.zeros(16, dtype=torch.int64).cuda()
    drawn = view(images.cuda(), EVERYTHING, 24, sample_ids=ids, epochs=epochs).cpu()
    # Posterize and equalize step by a level where a value lies on an edge; few pixels do.
    assert ((drawn - expected).abs() > 0.01).float().mean() < 0.01
