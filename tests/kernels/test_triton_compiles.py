"""What the kernels of modulated group norm become on GPUs that need not be there: no spills, wide accesses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.group_norm.cases import norm_cases
from benchmarks.group_norm.plans import norm_plan
from soda_kernels._tuning import for_wavefronts
from soda_kernels.aot import specify
from soda_kernels.group_norm import config
from soda_kernels.group_norm.config import GroupNormConfig
from tests.harness.compilation import compile_specs, gate

# The arguments as large as an image: for these the width of an access decides the speed.
IMAGES = frozenset(
    {"x_ptr", "skip_ptr", "residual_ptr", "y_ptr", "summed_ptr", "dy_ptr", "dsummed_ptr", "dx_ptr", "dskip_ptr"}
)
H200_MULTIPROCESSORS = 132
SPLIT = (Path(config.__file__).parent / "triton_split.py").read_text()
MAX_LAUNCHES = {("resident", "fwd"): 1, ("looped", "fwd"): 1, ("split", "fwd"): 3,
                ("resident", "bwd"): 2, ("looped", "bwd"): 2, ("split", "bwd"): 4}  # fmt: skip


def complaints(plans: list[Any], arch: str) -> list[str]:
    """What the gates say of every launch of some plans."""
    launches = [launch for plan in plans for launch in plan.launches]
    reports = compile_specs([specify(launch) for launch in launches], arch)
    found = [
        f"{launch.kernel.fn.__name__} {launch.constants}: {complaint}"
        for launch, report in zip(launches, reports, strict=True)
        for complaint in gate(report, tensors=IMAGES)
    ]
    # Beside its tiles, the statistics kernel loads one element of each channel, to centre its sums on.
    anchors = {f"triton_split.py:{number}:" for number, line in enumerate(SPLIT.splitlines(), 1) if "+ anchors" in line}
    assert len(anchors) == 2
    return [each for each in found if not any(anchor in each for anchor in anchors)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape_set", ["cifar", "soda-64", "soda-128", "sd15"])
def test_the_heuristics_choices_for_the_measured_shapes(shape_set: str, layout: str) -> None:
    plans = []
    for case in norm_cases([shape_set], [layout], "bf16"):
        for mode in ("fwd", "bwd"):
            plan = norm_plan(case, mode, "meta")
            assert len(plan.launches) <= MAX_LAUNCHES[plan.config.variant, mode], (case.id, mode)
            if case.num_elements * 2 >= 1 << 20:
                passes = [launch for launch in plan.launches if IMAGES & launch.arguments.keys()]
                assert min(launch.num_programs for launch in passes) >= H200_MULTIPROCESSORS, (case.id, mode)
            plans.append(plan)
    assert complaints(plans, "sm_90") == []


def images(count: int, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Iterator[Tensor]:
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    for _ in range(count):
        yield torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def full_plans(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, *, scaled: bool, wavefronts: bool = False
) -> list[Any]:
    """Both directions with everything that can be fused: residual, two modulations, dropout.

    With a factor on the sum the seeds are each sample's, as in the engine. With a factor and one seed, a launch spilled
    8 bytes, the forward of (128, 128, 32, 32) in bf16 and channels_last on sm_90: ptxas takes 96 registers there, with
    which a fifth program fits on a multiprocessor, and 100 without the factor.
    """
    from soda_kernels.group_norm.triton_impl import plan_backward, plan_forward

    x, residual, dy, dsummed = images(4, shape, layout, dtype)
    weight, bias = (torch.empty(shape[1], device="meta") for _ in range(2))
    modulations = [torch.empty(shape[:2], dtype=dtype, device="meta") for _ in range(4)]
    mean, rstd = (torch.empty(shape[0], 32, device="meta") for _ in range(2))
    seed = torch.empty(shape[:1] if scaled else (), dtype=torch.int64, device="meta")
    ending = (True, 0.1, seed, 2**-0.5 if scaled else 1.0)
    parameters = (weight, bias, modulations)
    forward = (x, None, residual, *parameters, 32, 1.0, 1e-5, *ending)
    backward = (dy, dsummed, x, None, *parameters, mean, rstd, 1.0, *ending)
    plans = [plan_forward(*forward), plan_backward(*backward)]
    if not wavefronts:
        return plans
    configs = [for_wavefronts(plan.config) for plan in plans]
    return [plan_forward(*forward, config=configs[0]), plan_backward(*backward, config=configs[1])]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["resident", "looped", "split"])
def test_sizes_of_one_compile(variant: str) -> None:
    """Triton makes a constant of every integer argument that is 1, which has fewer methods than a number."""
    from soda_kernels.group_norm.triton_impl import plan_backward, plan_forward

    for shape, num_groups in [((1, 1, 1, 1), 1), ((1, 4, 1), 2), ((2, 1, 5), 1), ((1, 2, 9), 2)]:
        x, dy = (torch.empty(shape, device="meta") for _ in range(2))
        statistics = [torch.empty(shape[0], num_groups, device="meta") for _ in range(2)]
        modulations = [torch.empty(shape[:2], device="meta") for _ in range(2)]
        seed = torch.empty((), dtype=torch.int64, device="meta")
        groups = num_groups if variant == "split" else 1
        slab = 1 << (groups * shape[1] // num_groups - 1).bit_length()
        rows = 1 << (x[0, 0].numel() - 1).bit_length() if variant == "resident" else 8
        chosen = GroupNormConfig(variant=variant, slab=slab, rows=rows, num_warps=1, groups=groups)
        weight, bias = (torch.empty(shape[1], device="meta") for _ in range(2))
        parameters = (weight, bias, modulations)
        plans = [
            plan_forward(x, None, None, *parameters, num_groups, 1.0, 1e-5, True, 0.5, seed, config=chosen),
            plan_backward(dy, None, x, None, *parameters, *statistics, 1.0, True, 0.5, seed, config=chosen),
        ]
        launches = [launch for plan in plans for launch in plan.launches]
        assert len(compile_specs([specify(launch) for launch in launches], "sm_90")) == len(launches)


SHAPES = [(128, 128, 32, 32), (64, 576, 16, 16), (16, 256, 64, 64), (1, 320, 64, 64)]


FLOAT16 = pytest.param(torch.float16, marks=pytest.mark.exhaustive)  # becomes what bf16 does, but for its conversions


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT16, torch.float32], ids=str)
def test_everything_fused(dtype: torch.dtype, layout: str) -> None:
    plans = [
        plan for shape in SHAPES for scaled in (False, True) for plan in full_plans(shape, layout, dtype, scaled=scaled)
    ]
    assert complaints(plans, "sm_90") == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_other_architectures(arch: str, layout: str) -> None:
    wavefronts = arch == "gfx942"
    plans = [
        plan
        for shape in SHAPES[:1] + SHAPES[3:]
        for plan in full_plans(shape, layout, torch.bfloat16, scaled=True, wavefronts=wavefronts)
    ]
    assert complaints(plans, arch) == []
