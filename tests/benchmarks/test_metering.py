"""Bytes that follow from a few small sizes are those of the whole case, to the byte."""

from __future__ import annotations

import pytest

from benchmarks.cases import NormCase, NormShape
from benchmarks.metering import COUNTS, hurried_interpreter, metered_bytes
from benchmarks.plans import norm_plan
from soda_kernels.group_norm.config import GroupNormConfig
from tests.harness.interpreter import is_interpreting
from tests.harness.traffic import meter

pytestmark = pytest.mark.skipif(not is_interpreting(), reason="Triton compiles here: set TRITON_INTERPRET=1")


def config(variant: str, slab: int, rows: int, groups: int, samples: int = 1, tiles: int = 1) -> GroupNormConfig:
    return GroupNormConfig(
        variant=variant, slab=slab, rows=rows, num_warps=4, groups=groups, samples=samples, tiles=tiles
    )


# shape, config, how many sizes are metered. Groups of 12 bytes of parameters make sectors that programs share.
CASES = {
    "resident": (NormShape(7, 48, 4, 8, 2, 8), config("resident", 8, 32, 1), 2),
    "resident-4-samples": (NormShape(11, 48, 4, 4, 2, 8), config("resident", 8, 16, 1, samples=4), 3),
    "looped": (NormShape(4, 48, 16, 16, 1, 8), config("looped", 32, 32, 4), 3),
    "looped-2-samples": (NormShape(6, 48, 16, 16, 1, 8), config("looped", 32, 32, 4, samples=2), 4),
    "looped-ragged": (NormShape(4, 48, 9, 11, 1, 8), config("looped", 32, 32, 4), 2),
    "split": (NormShape(3, 48, 16, 32, 2, 4), config("split", 16, 32, 4, tiles=2), 3),
    "split-ragged": (NormShape(4, 48, 9, 31, 2, 4), config("split", 16, 32, 4, tiles=2), 2),
    "samples-share-sectors": (NormShape(3, 40, 8, 16, 2, 4), config("split", 16, 32, 4, tiles=2), 1),
    "chunks-share-sectors": (NormShape(5, 48, 8, 8, 2, 4), config("split", 16, 8, 4), 1),
    "split-pair": (NormShape(3, 32, 16, 16, 0, 4, 16), config("split", 16, 32, 2, tiles=2), 3),
    "fewer-groups": (NormShape(5, 96, 4, 8, 1, 16), config("resident", 16, 32, 2), 2),
    "fewer-groups-split": (NormShape(3, 128, 8, 8, 2, 16), config("split", 16, 32, 4), 3),
    "fewer-groups-pair": (NormShape(5, 128, 4, 8, 0, 16, 64), config("split", 32, 32, 4), 2),
    "small": (NormShape(2, 48, 4, 4, 2, 8), config("resident", 8, 16, 1, samples=2), 1),
}


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("mode", ["fwd", "bwd"])
@pytest.mark.parametrize("name", CASES)
def test_extrapolated_bytes_are_the_whole_cases(name: str, mode: str, layout: str) -> None:
    shape, launch_config, num_sizes = CASES[name]
    case = NormCase(shape_set=name, shape=shape, layout=layout, dtype="bf16")
    with hurried_interpreter():
        followed, sizes = metered_bytes(case, mode, launch_config)
        whole = meter(norm_plan(case, mode, "cpu", config=launch_config))
    assert len(sizes) == num_sizes
    assert {size.num_groups for size in sizes} == {8 if name.startswith("fewer") else shape.num_groups}
    assert followed == [{count: getattr(launch, count) for count in COUNTS} for launch in whole.launches]


def test_the_hurried_interpreter_counts_the_same_and_is_put_back() -> None:
    from triton.runtime import interpreter

    before = interpreter.InterpretedFunction.__call__, interpreter.interpreter_builder.options
    shape, launch_config, _ = CASES["small"]
    case = NormCase(shape_set="small", shape=shape, layout="nhwc", dtype="bf16")
    usual = meter(norm_plan(case, "bwd", "cpu", config=launch_config))
    with hurried_interpreter():
        hurried = meter(norm_plan(case, "bwd", "cpu", config=launch_config))
        assert interpreter.InterpretedFunction.__call__ is not before[0]
    assert hurried == usual
    assert (interpreter.InterpretedFunction.__call__, interpreter.interpreter_builder.options) == before
