"""What the kernels of noise-schedule sampling become on GPUs that need not be there: no spills, wide accesses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from soda_kernels import NoiseSchedule, _philox
from soda_kernels.aot import specify
from soda_kernels.diffusion import triton_impl
from soda_kernels.diffusion.config import TileConfig
from soda_kernels.diffusion.reference import SAMPLINGS, TARGETS
from tests.harness.compilation import compile_specs, gate

IMAGES = frozenset(
    {"x0_ptr", "x_t_ptr", "prediction_ptr", "gradient_ptr", "image_ptr", "scaled_ptr", "cond_ptr", "uncond_ptr",
     "previous_x0_ptr", "x_next_ptr", "out_ptr"}
)  # fmt: skip
SHAPES = {"pixels": (256, 3, 64, 64), "one image": (1, 3, 256, 256), "latents": (64, 4, 32, 32)}
METHODS = DDIM, STOCHASTIC, DDPM, SECOND_ORDER = ("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0), ("dpmpp_2m", 0.0)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

TABLE = torch.empty(1000, device="meta")
SCALAR = torch.empty((), dtype=torch.int64, device="meta")


class Images:
    """Tensors of one shape and layout that only have sizes, and what comes with them."""

    def __init__(self, shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.layout, self.dtype = shape, LAYOUTS[layout], dtype
        self.index, self.ids = (torch.empty(shape[0], dtype=torch.int64, device="meta") for _ in range(2))
        self.key = (SCALAR, self.ids, SCALAR)
        self.dloss = torch.empty(shape[0], device="meta")

    def __call__(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta", memory_format=self.layout)

    def noising(self, sampling: str | None, x0: Tensor) -> Any:
        """With a sampling the indices are drawn."""
        index = self.index if sampling is None else None
        sampled = (sampling or "uniform", 0, self.shape[0])
        return triton_impl.plan_add_noise(x0, index, TABLE, TABLE, *self.key, *sampled, self.dtype)

    def loss(self, target: str, x0: Tensor, save_gradient: bool) -> Any:
        return triton_impl.plan_denoising_loss(*self._scored(target, x0), save_gradient)

    def loss_backward(self, target: str, x0: Tensor) -> Any:
        return triton_impl.plan_denoising_loss_backward(self.dloss, *self._scored(target, x0))

    def _scored(self, target: str, x0: Tensor) -> tuple[Any, ...]:
        return self(), x0, self.index, TABLE, TABLE, TABLE if target == "v" else None, *self.key, target

    def step(
        self, method: str, eta: float, target: str = "v", guidance_rescale: float = 0.0,
        config: TileConfig | None = None,
    ) -> Any:  # fmt: skip
        """With guidance, clipping and for "dpmpp_2m" the step before."""
        second = method == "dpmpp_2m"
        return triton_impl.plan_sampler_step(
            self(), self(), self(), TABLE, TABLE, TABLE, SCALAR, SCALAR, method, target, 2.0, eta, 1.0,
            guidance_rescale, self() if second else None, SCALAR if second else None, SCALAR, self.ids, config=config,
        )  # fmt: skip


def plans(shape: tuple[int, ...], layout: str) -> list[Any]:
    """Every op in bf16, with all that it can have, and without."""
    images = Images(shape, layout)
    found = [
        triton_impl.plan_philox(*images.key, 4096, _philox.STREAMS["noise"], torch.bfloat16, normal=True),
        triton_impl.plan_add_noise_backward(images(), images.index, TABLE),
        triton_impl.plan_scale_samples(images(), images.dloss),
        images.noising(None, images()),
        images.noising(None, images(torch.uint8)),
    ]
    for sampling in SAMPLINGS:
        found.append(triton_impl.plan_draw_step_index(*images.key, 1000, sampling, 0, shape[0]))
        found.append(images.noising(sampling, images()))
    for target in TARGETS:
        found += [images.loss(target, images(), False), images.loss_backward(target, images())]
    found += [images.loss("v", images(), True), images.loss("v", images(torch.uint8), True)]
    found += [images.step(*method) for method in METHODS]
    found += [images.step(*method, guidance_rescale=0.7) for method in (DDIM, DDPM)]
    return found


def complaints(found: list[Any], arch: str, min_vector_bytes: int) -> list[str]:
    reports = compile_specs([specify(launch) for plan in found for launch in plan.launches], arch)
    return [
        complaint for report in reports
        for complaint in gate(report, tensors=IMAGES, min_vector_bytes=min_vector_bytes)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_measured_shapes(arch: str, layout: str) -> None:
    shapes = SHAPES if arch == "sm_90" else {"pixels": SHAPES["pixels"]}
    # Three channels side by side fill no 16 bytes, and of 8 numbers a thread AMD's compiler moves 4 at a time.
    least = 0 if layout != "nchw" else 8 if arch == "gfx942" else 16
    assert complaints([plan for shape in shapes.values() for plan in plans(shape, layout)], arch, least) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_largest_whole_samples(arch: str) -> None:
    """The largest that a program holds to rescale guidance: without noise, and with it in one or several channels."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for images, methods in (
            (Images((8, 4, 64, 64), "nhwc", dtype), (DDIM, SECOND_ORDER)),
            (Images((8, 8, 32, 32), "nchw", dtype), (STOCHASTIC, DDPM)),
            (Images((8, 4, 32, 32), "nhwc", dtype), (STOCHASTIC, DDPM)),
        ):
            found += [images.step(*method, target, guidance_rescale=0.7) for method in methods for target in TARGETS]
    assert all(len(plan.launches) == 1 for plan in found)
    assert complaints(found, arch, 0) == []
    for shape, layout, method in (
        ((8, 5, 64, 64), "nhwc", DDIM), ((8, 9, 32, 32), "nchw", DDPM), ((8, 5, 32, 32), "nhwc", DDPM)
    ):  # fmt: skip
        assert Images(shape, layout).step(*method, guidance_rescale=0.7).config.walkers


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_walks_over_samples(arch: str) -> None:
    """By one program and by several, and with a launch before."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((64, 3, 64, 64), (16, 3, 128, 128), (256, 16, 64, 64), (8, 3, 256, 256)):
            for layout in LAYOUTS:
                images = Images(shape, layout, dtype)
                several = TileConfig(positions=2048, channels=1, num_warps=16, walkers=8)
                if layout == "nhwc":
                    several = TileConfig(positions=512, channels=4, num_warps=16, walkers=8)
                for method in (DDPM, SECOND_ORDER):
                    found.append(images.step(*method, guidance_rescale=0.7))
                    if shape[2] == 128:
                        found.append(images.step(*method, guidance_rescale=0.7, config=several))
    assert {plan.config.walkers for plan in found} == {0, 1, 8}
    assert complaints(found, arch, 0) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_tiles_of_every_width(arch: str) -> None:
    """Which channels_last images get by their channels."""
    found = []
    for channels in (2, 4, 8, 16, 32, 64):
        images = Images((256, channels, 32, 32), "nhwc")
        found += [images.noising("logit_normal", images()), images.loss("v", images(), True), images.step(*DDPM)]
    assert len({plan.config.channels for plan in found}) == 6
    assert complaints(found, arch, 0) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_losses_of_two_samples(arch: str) -> None:
    found = []
    for layout in LAYOUTS:
        images = Images((128, 3, 32, 32), layout)
        scored = images(), images(), images.index, TABLE, TABLE, TABLE, *images.key, "eps"
        found.append(triton_impl.plan_denoising_loss(*scored, False))
    assert all(plan.config.samples == 2 for plan in found)
    assert complaints(found, arch, 0) == []


def test_the_schedule_has_what_the_kernels_read() -> None:
    schedule = NoiseSchedule.cosine(10)
    assert all(table.dtype == torch.float32 for table in (schedule.alpha, schedule.sigma, schedule.logsnr))
