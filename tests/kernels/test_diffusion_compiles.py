"""What the kernels of noise-schedule sampling become on GPUs that need not be there: no spills, wide accesses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from soda_kernels import NoiseSchedule, _philox
from soda_kernels.aot import specify
from soda_kernels.diffusion import triton_impl
from tests.harness.compilation import compile_specs, gate

IMAGES = frozenset(
    {"x0_ptr", "x_t_ptr", "prediction_ptr", "dprediction_ptr", "cond_ptr", "uncond_ptr", "previous_x0_ptr",
     "x_next_ptr", "out_ptr"}
)  # fmt: skip
SHAPES = {"pixels": (256, 3, 64, 64), "one image": (1, 3, 256, 256), "latents": (64, 4, 32, 32)}


def plans(shape: tuple[int, ...], layout: torch.memory_format) -> list[Any]:
    """Every op in bf16, with all that it can have, and without."""
    table = torch.empty(1000, device="meta")
    index, ids = (torch.empty(shape[0], dtype=torch.int64, device="meta") for _ in range(2))
    scalar = torch.empty((), dtype=torch.int64, device="meta")
    dloss = torch.empty(shape[0], device="meta")

    def image() -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=layout)

    key = (scalar, ids, scalar)
    found = [
        triton_impl.plan_philox(*key, 4096, _philox.STREAMS["noise"], torch.bfloat16, normal=True),
        triton_impl.plan_add_noise(image(), index, table, table, *key, "uniform", 0, 1, torch.bfloat16),
    ]
    for target in ("eps", "v", "x0"):
        loss = (image(), image(), index, table, table, table if target == "v" else None, *key, target)
        found += [triton_impl.plan_denoising_loss(*loss, False), triton_impl.plan_denoising_loss_backward(dloss, *loss)]
    for method, eta in (("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0), ("dpmpp_2m", 0.0)):
        second = method == "dpmpp_2m"
        found.append(triton_impl.plan_sampler_step(
            image(), image(), image(), table, table, table, scalar, scalar, method, "v", 2.0, eta, 1.0, 0.0,
            image() if second else None, scalar if second else None, scalar, ids,
        ))  # fmt: skip
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_measured_shapes(arch: str, layout: torch.memory_format) -> None:
    shapes = SHAPES if arch == "sm_90" else {"pixels": SHAPES["pixels"]}
    launches = [launch for shape in shapes.values() for plan in plans(shape, layout) for launch in plan.launches]
    reports = compile_specs([specify(launch) for launch in launches], arch)
    # Three channels side by side fill no 16 bytes, and of 8 numbers a thread AMD's compiler moves 4 at a time.
    least = 0 if layout != torch.contiguous_format else 8 if arch == "gfx942" else 16
    wrong = [complaint for report in reports for complaint in gate(report, tensors=IMAGES, min_vector_bytes=least)]
    assert wrong == []


def test_the_schedule_has_what_the_kernels_read() -> None:
    schedule = NoiseSchedule.cosine(10)
    assert all(table.dtype == torch.float32 for table in (schedule.alpha, schedule.sigma, schedule.logsnr))
