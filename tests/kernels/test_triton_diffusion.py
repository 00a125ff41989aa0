"""The Triton kernels of noise-schedule sampling against the reference, and what they do with memory.

Where there is a GPU they run on it, compiled; without one in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from soda_kernels import NoiseSchedule, _philox
from soda_kernels.diffusion import reference
from soda_kernels.diffusion.config import TileConfig, choose
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
    "one": None, "several": TileConfig(positions=16, channels=4, num_warps=1),
    "large": TileConfig(positions=4096, channels=4, num_warps=8),
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
    """To a few roundings: the same fp32 arithmetic, fused otherwise."""
    assert (result.shape, result.dtype, result.stride()) == (expected.shape, expected.dtype, expected.stride())
    scale = max(1.0, float(expected.double().abs().max()))
    assert ((result.double() - expected.double()).abs() <= 4 * scale * torch.finfo(result.dtype).eps).all()


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("num", [1, 5, 1027])
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
    weights = torch.rand(100, device=DEVICE) if weighted else None
    arguments = (
        image(shape, layout, torch.float16), image(shape, x0_layout), steps_of(shape), SCHEDULE.alpha, SCHEDULE.sigma,
        weights, *key(shape[0], steps=weighted), target,
    )  # fmt: skip
    loss = plan_denoising_loss(*arguments, False, config=tile).run()[0]
    assert_close(loss, reference.denoising_loss(*arguments, False)[0])
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
    guided = target != "x0"
    second = method == "dpmpp_2m" and guided
    arguments = (
        image(shape, layout), image(shape, "nchw"), image(shape, layout) if guided else None, SCHEDULE.alpha,
        SCHEDULE.sigma, SCHEDULE.logsnr, *(torch.tensor(index, device=DEVICE) for index in indices), method, target,
        1.5 if guided else 1.0, 0.5 if method == "ddim" else 0.0, 1.0 if target == "v" else None, 0.0,
        image(shape, layout) if second else None, torch.tensor(60, device=DEVICE) if second else None,
        *key(shape[0])[:2],
    )  # fmt: skip
    for result, expected in zip(
        plan_sampler_step(*arguments, config=TILES["several"]).run(), reference.sampler_step(*arguments), strict=True
    ):
        assert_close(result, expected)


def test_an_index_beyond_the_table_gives_nan_and_reads_nothing() -> None:
    from soda_kernels.diffusion.triton_impl import plan_add_noise

    x0 = image((2, 3, 4, 4), "nchw")
    index = torch.tensor([100, 5], device=DEVICE)
    x_t, _ = plan_add_noise(x0, index, SCHEDULE.alpha, SCHEDULE.sigma, *key(2), *GIVEN, torch.float32).run()
    assert x_t[0].isnan().all() and x_t[1].isfinite().all()


def plans(shape: tuple[int, ...], layout: str, tile: str) -> list[tuple[Any, list[Any], int]]:
    """Every op of some images: its plan, its inputs, and the bytes of what it must read and write."""
    from soda_kernels.diffusion import triton_impl

    x0, prediction, uncond, previous = (image(shape, layout) for _ in range(4))
    index, own_key, tables = steps_of(shape), key(shape[0]), (SCHEDULE.alpha, SCHEDULE.sigma)
    config = TILES[tile]
    step = [torch.tensor(number, device=DEVICE) for number in (50, 40, 60)]
    dloss = torch.randn(shape[0], device=DEVICE)
    noising = [x0, index, *tables, *own_key, *GIVEN, torch.float32]
    loss = [prediction, x0, index, *tables, SCHEDULE.sigma, *own_key, "v"]
    sampling = [x0, prediction, uncond, *tables, SCHEDULE.logsnr, *step[:2], "dpmpp_2m", "v", 2.0, 0.0, 1.0, 0.0,
                previous, step[2], None, None]  # fmt: skip
    return [
        (triton_impl.plan_add_noise(*noising, config=config), noising, 2),
        (triton_impl.plan_denoising_loss(*loss, False, config=config), loss, 2),
        (triton_impl.plan_denoising_loss_backward(dloss, *loss, config=config), [dloss, *loss], 3),
        (triton_impl.plan_sampler_step(*sampling, config=config), sampling, 6),
    ]  # fmt: skip


@in_the_interpreter
@tiles
@shapes
@layouts
def test_memory(layout: str, shape: tuple[int, ...], tile: str) -> None:
    """No access outside a tensor, no output unwritten, no address with two writers."""
    for plan, inputs, _ in plans(shape, layout, tile):
        assert check_memory(plan, inputs) == []


@in_the_interpreter
@layouts
def test_traffic_and_launches(layout: str) -> None:
    """Images are read and written once, noise never; beside them there are a few sectors a program.

    In tiles as there are where images fill the chip: smaller ones are taken where they do not.
    """
    shape = (2, 4, 64, 64)
    launches = []
    for plan, _, images in plans(shape, layout, "large"):
        floor = images * 4 * 2 * 4 * 64 * 64
        assert meter(plan).bytes_dram <= 1.02 * floor, plan.launches[0].kernel.fn.__name__
        launches.append(len(plan.launches))
    assert launches == [1, 2, 1, 1]


def test_tiles_fill_the_chip_or_grow() -> None:
    device = torch.device("cpu")
    assert choose(1, 3 * 32 * 32, 1, device).positions == 512
    assert choose(256, 3 * 64 * 64, 1, device).positions == 4096
    wide = choose(64, 32 * 32, 256, device)
    assert wide.channels == 64 and wide.positions * wide.channels == 2048
