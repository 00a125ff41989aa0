"""The Triton kernels of noise-schedule sampling against the reference, and what they do with memory.

Where there is a GPU they run on it, compiled; without one in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from soda_kernels import NoiseSchedule, _philox
from soda_kernels.diffusion import reference
from soda_kernels.diffusion.config import TileConfig
from soda_kernels.diffusion.reference import TARGETS
from tests.harness.interpreter import require_interpreter
from tests.harness.memory import check_memory
from tests.harness.traffic import meter
from tests.numerics import ulp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    require_interpreter()
in_the_interpreter = pytest.mark.skipif(DEVICE == "cuda", reason="only Triton's interpreter shows accesses to memory")

SCHEDULE = NoiseSchedule.cosine(100).to(DEVICE)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# In whole blocks of four positions and not, in one tile and in several.
SHAPES = [(2, 3, 8, 8), (3, 5, 7, 9)]
TILES = {
    "one": None, "several": TileConfig(positions=32, channels=4, num_warps=1),
    "large": TileConfig(positions=4096, channels=4, num_warps=8),
    "one walker": TileConfig(positions=32, channels=4, num_warps=1, walkers=1),
    "walkers": TileConfig(positions=16, channels=4, num_warps=1, walkers=3),
}  # fmt: skip
layouts = pytest.mark.parametrize("layout", LAYOUTS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
# How step indices are drawn where they are given.
GIVEN = ("uniform", 0, 1)
tiles = pytest.mark.parametrize("tile", ["one", "several"])


def image(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=LAYOUTS[layout])


def key(batch: int, *, steps: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """A seed and sample ids of more than 32 bits, and one step or one for each sample."""
    step = torch.arange(batch) * 5 if steps else torch.tensor(7)
    return tuple(x.to(DEVICE) for x in (torch.tensor(123456789012345), torch.arange(batch) * 7919 + 2**33, step))  # type: ignore[return-value]


def steps_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 100, (shape[0],), device=DEVICE)


def assert_close(result: Tensor, expected: Tensor) -> None:
    """To a few roundings of the largest value: the same fp32 arithmetic, fused otherwise."""
    assert (result.shape, result.dtype, result.stride()) == (expected.shape, expected.dtype, expected.stride())
    scale = float(expected.double().abs().max()) if expected.numel() else 0.0
    assert ((result.double() - expected.double()).abs() <= 4 * scale * torch.finfo(result.dtype).eps).all()


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("num", [1, 5, 30_011])
def test_normals_are_the_references_within_four_ulps(num: int, steps: bool) -> None:
    from soda_kernels.diffusion.triton_impl import plan_philox

    stream = _philox.STREAMS["sampler"]
    (drawn,) = plan_philox(*key(3, steps=steps), num, stream, torch.float32, normal=True).run()
    exact = reference.philox_normal(*key(3, steps=steps), num, stream, torch.float32)
    assert ((drawn.double() - exact.double()).abs() <= 4 * ulp(exact.double(), torch.float32)).all()
    (half,) = plan_philox(*key(3, steps=steps), num, stream, torch.float16, normal=True).run()
    assert torch.equal(half, drawn.half())


@pytest.mark.parametrize("num", [1, 5, 1027])
def test_uniforms_are_the_references_bit_for_bit(num: int) -> None:
    from soda_kernels.diffusion.triton_impl import plan_philox

    (drawn,) = plan_philox(*key(3), num, 0, torch.float32, normal=False).run()
    assert torch.equal(drawn, reference.philox_uniform(*key(3), num, 0, torch.float32))


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("sampling", reference.SAMPLINGS)
def test_step_indices(sampling: str, steps: bool) -> None:
    """Bit for bit; a logit-normal's, whose normal is another by some ulps, within a step where it lies at a border."""
    from soda_kernels.diffusion.triton_impl import plan_draw_step_index

    own_key = key(300, steps=steps and sampling != "stratified")
    for num_steps, strata in ((1000, (2, 2**20)), (1, (0, 300)), (77, (7, 317))):
        (drawn,) = plan_draw_step_index(*own_key, num_steps, sampling, *strata).run()
        expected = reference.draw_step_index(*own_key, num_steps, sampling, *strata)
        if sampling == "logit_normal":
            z = _philox.normal(1, *own_key, _philox.STREAMS["timestep"], torch.float64)[:, 0]
            share = z.sigmoid() * num_steps
            at_a_border = (share - share.round()).abs() < 1e-5 * num_steps
            assert ((drawn == expected) | at_a_border & ((drawn - expected).abs() == 1)).all()
            assert at_a_border.float().mean() < 0.1
        else:
            assert torch.equal(drawn, expected)


@tiles
@shapes
@layouts
@pytest.mark.parametrize("sampling", reference.SAMPLINGS)
def test_add_noise_draws_its_step_indices(sampling: str, layout: str, shape: tuple[int, ...], tile: str) -> None:
    from soda_kernels.diffusion.triton_impl import plan_add_noise

    own_key, strata = key(shape[0]), (3, 11)
    tables = SCHEDULE.alpha, SCHEDULE.sigma
    x0 = image(shape, layout)
    x_t, drawn = plan_add_noise(x0, None, *tables, *own_key, sampling, *strata, torch.float16, config=TILES[tile]).run()
    assert torch.equal(drawn, reference.draw_step_index(*own_key, 100, sampling, *strata))
    assert_close(x_t, reference.add_noise(x0, drawn, *tables, *own_key, *GIVEN, torch.float16)[0])


@shapes
@layouts
def test_bytes_are_read_as_images(layout: str, shape: tuple[int, ...]) -> None:
    """Every value there is, by noising and by the loss."""
    from soda_kernels.diffusion import triton_impl

    octets = torch.arange(torch.Size(shape).numel(), device=DEVICE).byte().view(shape)
    octets = octets.contiguous(memory_format=LAYOUTS[layout])
    tables, own_key = (SCHEDULE.alpha, SCHEDULE.sigma), key(shape[0])
    index = steps_of(shape)
    noising = (octets, index, *tables, *own_key, *GIVEN, torch.float32)
    assert_close(triton_impl.plan_add_noise(*noising).run()[0], reference.add_noise(*noising)[0])
    for target in reference.TARGETS:
        loss = (image(shape, layout), octets, index, *tables, None, *own_key, target, True)
        for result, expected in zip(
            triton_impl.plan_denoising_loss(*loss).run(), reference.denoising_loss(*loss), strict=True
        ):
            assert_close(result, expected)


@tiles
@shapes
@layouts
def test_samples_are_scaled(layout: str, shape: tuple[int, ...], tile: str) -> None:
    from soda_kernels.diffusion import triton_impl

    gradient = image(shape, layout, torch.float16)
    dloss = torch.randn(2 * shape[0], device=DEVICE)[::2]
    for factors in (dloss, dloss[:1].expand(shape[0])):
        (scaled,) = triton_impl.plan_scale_samples(gradient, factors, config=TILES[tile]).run()
        assert_close(scaled, reference.scale_samples(gradient, factors))
    arguments = (gradient, steps_of(shape), SCHEDULE.alpha)
    (dx0,) = triton_impl.plan_add_noise_backward(*arguments, config=TILES[tile]).run()
    assert_close(dx0, reference.add_noise_backward(*arguments))


@tiles
@dtypes
@shapes
@layouts
def test_add_noise(layout: str, shape: tuple[int, ...], dtype: torch.dtype, tile: str) -> None:
    from soda_kernels.diffusion.triton_impl import plan_add_noise

    arguments = (
        image(shape, layout, dtype), steps_of(shape), SCHEDULE.alpha, SCHEDULE.sigma, *key(shape[0]), *GIVEN, dtype
    )  # fmt: skip
    assert_close(plan_add_noise(*arguments, config=TILES[tile]).run()[0], reference.add_noise(*arguments)[0])


@pytest.mark.parametrize("target", reference.TARGETS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("x0_layout", LAYOUTS)
@shapes
@layouts
def test_denoising_loss(
    layout: str, shape: tuple[int, ...], x0_layout: str, weighted: bool, target: str
) -> None:
    """Its gradient too; the two images need not have one layout or dtype."""
    from soda_kernels.diffusion.triton_impl import plan_denoising_loss, plan_denoising_loss_backward

    tile = TILES["several" if weighted else "one"]
    weights = torch.rand(200, device=DEVICE)[::2] if weighted else None
    arguments = (
        image(shape, layout, torch.float16), image(shape, x0_layout), steps_of(shape), SCHEDULE.alpha, SCHEDULE.sigma,
        weights, *key(shape[0], steps=weighted), target,
    )  # fmt: skip
    for result, expected in zip(
        plan_denoising_loss(*arguments, weighted, config=tile).run(),
        reference.denoising_loss(*arguments, weighted),
        strict=True,
    ):  # where weighted with the gradient, else without
        assert_close(result, expected)
    dloss = torch.randn(2 * shape[0], device=DEVICE)[::2]
    gradient = plan_denoising_loss_backward(dloss, *arguments, config=tile).run()[0]
    assert_close(gradient, reference.denoising_loss_backward(dloss, *arguments))


@pytest.mark.parametrize("indices", [(50, 40), (3, -1)], ids=str)
@pytest.mark.parametrize("target", reference.TARGETS)
@pytest.mark.parametrize("method", reference.METHODS)
@layouts
def test_sampler_step(layout: str, method: str, target: str, indices: tuple[int, int]) -> None:
    from soda_kernels.diffusion.triton_impl import plan_sampler_step

    shape = SHAPES[0] if layout == "nchw" else SHAPES[1]
    schedule = NoiseSchedule.cosine(100, dtype=torch.float64 if layout == "nchw" else torch.float32).to(DEVICE)
    guided = target != "x0"
    second = method == "dpmpp_2m" and guided
    arguments = (
        image(shape, layout), image(shape, "nchw"), image(shape, layout) if guided else None, schedule.alpha,
        schedule.sigma, schedule.logsnr, *(torch.tensor(index, device=DEVICE) for index in indices), method, target,
        1.5 if guided else 1.0, 0.5 if method == "ddim" else 0.0, 1.0 if target == "v" else None, 0.0,
        image(shape, layout) if second else None, torch.tensor(60, device=DEVICE) if second else None,
        *key(shape[0])[:2],
    )  # fmt: skip
    for result, expected in zip(
        plan_sampler_step(*arguments, config=TILES["several"]).run(), reference.sampler_step(*arguments), strict=True
    ):
        assert_close(result, expected)


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", reference.METHODS)
def test_the_step_of_an_infinite_x_t(method: str, target: str, value: float) -> None:
    """It goes to its limit, which is infinite, and not through inf - inf."""
    from soda_kernels.diffusion.triton_impl import plan_sampler_step

    x_t, cond = image((2, 3, 4, 4), "nchw"), image((2, 3, 4, 4), "nchw")
    x_t[1, 2, 3, 0] = value
    arguments = (
        x_t, cond, None, SCHEDULE.alpha, SCHEDULE.sigma, SCHEDULE.logsnr,
        *(torch.tensor(index, device=DEVICE) for index in (50, 40)), method, target, 1.0, 0.0, None, 0.0, None, None,
        *key(2)[:2],
    )  # fmt: skip
    for x_next, _ in (plan_sampler_step(*arguments).run(), reference.sampler_step(*arguments)):
        assert float(x_next[1, 2, 3, 0]) == value
        assert int(x_next.isfinite().sum()) == x_next.numel() - 1


@pytest.mark.parametrize("tile", ["one", "one walker", "walkers", "several"])
@pytest.mark.parametrize("draws", [False, True])
@shapes
@layouts
def test_guidance_rescale(layout: str, shape: tuple[int, ...], draws: bool, tile: str) -> None:
    """In one launch where a program holds a whole sample or walks over it, else in two."""
    from soda_kernels.diffusion.triton_impl import plan_sampler_step

    x_t, cond, uncond = image(shape, layout), image(shape, layout) + 3.0, image(shape, "nchw")
    cond[0] = uncond[0] = 0.25  # does not vary
    arguments = (
        x_t, cond, uncond, SCHEDULE.alpha, SCHEDULE.sigma, SCHEDULE.logsnr,
        *(torch.tensor(index, device=DEVICE) for index in (50, 40)), "ddim", "v", 5.0, 0.5 * draws, None, 0.7, None,
        None, *key(shape[0])[:2],
    )  # fmt: skip
    plan = plan_sampler_step(*arguments, config=TILES[tile])
    assert len(plan.launches) == (2 if tile == "several" else 1)
    for result, expected in zip(plan.run(), reference.sampler_step(*arguments), strict=True):
        assert result.isfinite().all()
        assert_close(result, expected)


@layouts
def test_guidance_is_rescaled_over_many_parts(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several blocks each, the last one not whole; and twice the same bits."""
    from soda_kernels.diffusion import triton_impl

    monkeypatch.setattr(triton_impl, "_MOMENTS_BLOCK", 64)
    monkeypatch.setattr(triton_impl, "_MOST_PARTS", 4)
    shape = (2, 3, 19, 11)
    arguments = (
        image(shape, layout), image(shape, layout) + 10.0, image(shape, layout), SCHEDULE.alpha, SCHEDULE.sigma,
        SCHEDULE.logsnr, *(torch.tensor(index, device=DEVICE) for index in (50, 40)), "ddim", "x0", 3.0, 0.0, None, 1.0,
        None, None, None, None,
    )  # fmt: skip
    first, second = (triton_impl.plan_sampler_step(*arguments, config=TILES["several"]) for _ in range(2))
    assert first.launches[0].num_programs == 2 * 4
    for result, again, expected in zip(first.run(), second.run(), reference.sampler_step(*arguments), strict=True):
        assert_close(result, expected)
        assert torch.equal(result, again)


def test_an_index_beyond_the_table_gives_nan_and_reads_nothing() -> None:
    from soda_kernels.diffusion.triton_impl import plan_add_noise

    x0 = image((2, 3, 4, 4), "nchw")
    index = torch.tensor([100, 5], device=DEVICE)
    x_t, _ = plan_add_noise(x0, index, SCHEDULE.alpha, SCHEDULE.sigma, *key(2), *GIVEN, torch.float32).run()
    assert x_t[0].isnan().all() and x_t[1].isfinite().all()


def plans(shape: tuple[int, ...], layout: str, tile: str) -> list[tuple[Any, list[Any], int, float]]:
    """Every op of some fp32 images, with all it can have: its plan, its inputs, launches, and how many images it moves.

    Images are those that it must read and write, bytes counting for a quarter.
    """
    from soda_kernels.diffusion import triton_impl

    x0, prediction, uncond, previous = (image(shape, layout) for _ in range(4))
    octets = (x0 * 50 + 128).byte()
    index, own_key, tables = steps_of(shape), key(shape[0]), (SCHEDULE.alpha, SCHEDULE.sigma)
    config = TILES[tile]
    num_sums = 1 if (layout, tile) == ("nhwc", "large") else 2  # a tile that is its sample needs no total
    step = [torch.tensor(number, device=DEVICE) for number in (50, 40, 60)]
    dloss = torch.randn(shape[0], device=DEVICE)
    noising = [x0, index, *tables, *own_key, *GIVEN, torch.float32]
    drawing = [octets, None, *tables, *own_key, "stratified", 0, shape[0], torch.float32]
    loss = [prediction, x0, index, *tables, SCHEDULE.sigma, *own_key, "v"]
    of_bytes = [prediction, octets, *loss[2:]]
    sampling = [x0, prediction, uncond, *tables, SCHEDULE.logsnr, *step[:2], "dpmpp_2m", "v", 2.0, 0.0, 1.0, 0.0,
                previous, step[2], None, None]  # fmt: skip
    rescaling = [*sampling[:13], 0.7, *sampling[14:]]
    whole = triton_impl.plan_sampler_step(*rescaling)
    split = triton_impl.plan_sampler_step(*rescaling, config=config or TILES["several"])
    size = (config or TILES["several"]).positions
    walked, shared = (
        triton_impl.plan_sampler_step(*rescaling, config=dataclasses.replace(TILES[walk], positions=size))
        for walk in ("one walker", "walkers")
    )
    return [
        (triton_impl.plan_draw_step_index(*own_key, 100, "logit_normal", 0, 1), list(own_key), 1, 0),
        (triton_impl.plan_add_noise(*noising, config=config), noising, 1, 2),
        (triton_impl.plan_add_noise(*drawing, config=config), drawing, 1, 1.25),
        (triton_impl.plan_add_noise_backward(x0, index, tables[0], config=config), [x0, index, tables[0]], 1, 2),
        (triton_impl.plan_denoising_loss(*loss, False, config=config), loss, num_sums, 2),
        (triton_impl.plan_denoising_loss(*of_bytes, True, config=config), of_bytes, num_sums, 2.25),
        (triton_impl.plan_denoising_loss_backward(dloss, *loss, config=config), [dloss, *loss], 1, 3),
        (triton_impl.plan_denoising_loss_backward(dloss, *of_bytes, config=config), [dloss, *of_bytes], 1, 2.25),
        (triton_impl.plan_scale_samples(x0, dloss, config=config), [x0, dloss], 1, 2),
        (triton_impl.plan_sampler_step(*sampling, config=config), sampling, 1, 6),
        (whole, rescaling, 1, 6),
        (split, rescaling, 2, 8),
        (walked, rescaling, 1, 6),
        (shared, rescaling, 1, 4 + 3 * 2),
    ]  # fmt: skip


@in_the_interpreter
@tiles
@shapes
@layouts
def test_memory(layout: str, shape: tuple[int, ...], tile: str) -> None:
    """No access outside a tensor, no output unwritten, no address with two writers."""
    for plan, inputs, _, _ in plans(shape, layout, tile):
        assert check_memory(plan, inputs) == []


@in_the_interpreter
@layouts
def test_traffic_and_launches(layout: str) -> None:
    """Images are read and written once, noise never; beside them there are a few sectors a program.

    In tiles as there are where images fill the chip: smaller ones are taken where they do not. To rescale guidance in
    two launches cond and uncond are read twice, and by each program where several walk over one sample.
    """
    shape = (2, 4, 64, 64)
    for plan, _, launches, images in plans(shape, layout, "large"):
        name = plan.launches[-1].kernel.fn.__name__
        assert len(plan.launches) == launches, name
        if images:
            assert meter(plan).bytes_dram <= 1.02 * images * 4 * 2 * 4 * 64 * 64, name


@in_the_interpreter
@layouts
@pytest.mark.parametrize("batch", [4, 3])
@pytest.mark.parametrize("target", TARGETS)
def test_a_program_of_two_samples_has_the_losses_of_one(target: str, batch: int, layout: str) -> None:
    """Where two divide the batch; else each has one."""
    from soda_kernels.diffusion.triton_impl import plan_denoising_loss

    shape = (batch, 3, 6, 6)
    arguments = (
        image(shape, layout), image(shape, layout), steps_of(shape), SCHEDULE.alpha, SCHEDULE.sigma, torch.rand(100),
        *key(batch, steps=True), target,
    )  # fmt: skip
    one, two = (
        plan_denoising_loss(
            *arguments, True, config=TileConfig(positions=128, channels=4, num_warps=1, samples=samples)
        )
        for samples in (1, 2)
    )
    assert (one.launches[0].num_programs, two.launches[0].num_programs) == (batch, 2 if batch == 4 else batch)
    assert check_memory(two, list(arguments[:-1])) == []
    for result, expected in zip(two.run(), one.run(), strict=True):
        assert torch.equal(result, expected)


def test_different_work_has_different_keys() -> None:
    problems = [plan.problem for plan, *_ in plans((2, 4, 8, 8), "nhwc", "one") if plan.problem is not None]
    assert {each.kernel for each in problems} == {
        "add_noise", "scale_samples", "denoising_loss-v", "denoising_loss-v-saving", "denoising_loss_backward-v",
        "sampler_step-dpmpp_2m-guided", "sampler_step-dpmpp_2m-guided-rescaled",
    }  # fmt: skip
