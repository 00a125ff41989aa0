"""Bytes that follow from a few small sizes are those of the whole case, to the byte."""

from __future__ import annotations

import pytest

from benchmarks.attention import metering as attention_metering
from benchmarks.attention.cases import AttentionCase, AttentionShape, attention_floor_bytes
from benchmarks.attention.plans import attention_plan
from benchmarks.diffusion import metering as diffusion_metering
from benchmarks.diffusion.cases import METERED_CALLS, DiffusionCase, ImageShape
from benchmarks.diffusion.plans import diffusion_plan
from benchmarks.group_norm import metering as norm_metering
from benchmarks.group_norm.cases import NormCase, NormShape
from benchmarks.group_norm.plans import norm_plan
from benchmarks.metering import hurried_interpreter, meter_plan
from soda_kernels.attention.config import AttentionConfig
from soda_kernels.diffusion.config import TileConfig
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
        followed, sizes = norm_metering.metered_bytes(case, mode, launch_config)
        whole = meter_plan(norm_plan(case, mode, "cpu", config=launch_config))
    assert len(sizes) == num_sizes
    assert {size.num_groups for size in sizes} == {8 if name.startswith("fewer") else shape.num_groups}
    assert followed == whole


def tiles(variant: str, block_n: int = 16, pairs: int = 1, blocks: int = 1) -> AttentionConfig:
    return AttentionConfig(
        variant=variant, block_m=16, block_n=block_n, num_warps=4, pairs=pairs, blocks=blocks
    )


# mode, shape, config, the heads that were metered, how many shapes. Heads of 24 share sectors with their neighbours,
# and so do the lse of lengths that are no multiple of 8.
ATTENTION = {
    "whole-row": ("fwd", AttentionShape(2, 48, 4, 32), tiles("whole_row", 64, blocks=3), 1, 1),
    "whole-row-pairs": ("fwd", AttentionShape(2, 16, 6, 24), tiles("whole_row", pairs=4), 4, 1),
    "whole-row-odd": ("fwd", AttentionShape(4, 33, 4, 24), tiles("whole_row", 64, blocks=2), 8, 1),
    "whole-row-long": ("fwd", AttentionShape(2, 96, 2, 32, keys=33), tiles("whole_row", 64, blocks=2), 1, 2),
    "online": ("fwd", AttentionShape(2, 96, 4, 24), tiles("online", 32), 2, 4),
    "online-ragged": ("fwd", AttentionShape(2, 56, 4, 24), tiles("online", 32), 2, 1),
    "online-ragged-keys": ("fwd", AttentionShape(2, 48, 2, 24, keys=41), tiles("online", 32), 2, 2),
    "one-kernel": ("bwd", AttentionShape(2, 48, 2, 32), tiles("one_kernel"), 1, 1),
    "one-block": ("bwd", AttentionShape(2, 16, 4, 24), tiles("one_kernel"), 2, 1),
    "two-kernels": ("bwd", AttentionShape(2, 48, 2, 24), tiles("two_kernels"), 2, 4),
    "two-kernels-cross": ("bwd", AttentionShape(2, 48, 2, 32, keys=41), tiles("two_kernels"), 1, 2),
    "two-kernels-odd": ("bwd", AttentionShape(8, 17, 2, 24), tiles("two_kernels"), 8, 1),
    "rows-share-sectors": ("fwd", AttentionShape(2, 48, 3, 24), tiles("online"), 3, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTION)
def test_bytes_of_few_heads_and_short_lengths_are_those_of_all(name: str) -> None:
    mode, shape, launch_config, heads, num_shapes = ATTENTION[name]
    case = AttentionCase(shape_set=name, shape=shape, dtype="bf16")
    with hurried_interpreter():
        followed, shapes = attention_metering.metered_bytes(case, mode, launch_config)
        whole = meter_plan(attention_plan(case, mode, "cpu", config=launch_config))
    assert len(shapes) == num_shapes and {each.heads for each in shapes} == {heads}
    assert followed == whole


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("length", [64, 256])
def test_traffic_of_attention_where_heads_fill_the_chip(length: int, head_dim: int) -> None:
    case = AttentionCase(shape_set="lengths", shape=AttentionShape(128, length, 8, head_dim), dtype="bf16")
    for mode, most in (("fwd", 1.05), ("bwd", 1.10)):
        with hurried_interpreter():
            config = attention_plan(case, mode, "meta").config
            launches, _ = attention_metering.metered_bytes(case, mode, config)
        assert sum(launch["bytes_dram"] for launch in launches) <= most * attention_floor_bytes(case, mode)


# shape, layout, tile, how many samples are metered forward: after as many, images of bytes and the sums of tiles begin
# with a sector again.
DIFFUSION = {
    "one-tile": (ImageShape(16, 2, 8, 8), "nhwc", (128, 4), {"v-u8": 8, "drawn": 8, "ddim-guided-rescale": 8}),
    "tiles": (ImageShape(4, 4, 8, 8), "nchw", (32, 1), {"v-u8": 1, "drawn": 1, "ddim-guided-rescale": 4}),
    "odd": (ImageShape(16, 3, 5, 6), "nhwc", (32, 4), {"v-u8": 16, "drawn": 8, "ddim-guided-rescale": 8}),
    "uneven": (ImageShape(3, 2, 4, 4), "nchw", (32, 1), {"v-u8": 3, "drawn": 3, "ddim-guided-rescale": 3}),
}


@pytest.mark.parametrize("name", DIFFUSION)
def test_bytes_of_a_few_images_are_those_of_all(name: str) -> None:
    shape, layout, (positions, channels), samples = DIFFUSION[name]
    config = TileConfig(positions=positions, channels=channels, num_warps=1)
    for call in METERED_CALLS:
        case = DiffusionCase(shape_set=name, shape=shape, call=call, layout=layout, dtype="bf16")
        for mode in case.modes if call.name in samples else ():
            with hurried_interpreter():
                followed, (fewer,) = diffusion_metering.metered_bytes(case, mode, config)
                whole = meter_plan(diffusion_plan(case, mode, "cpu", config=config))
            assert followed == whole, (call.name, mode)
            assert fewer == shape._replace(batch=samples[call.name]) or mode == "bwd", (call.name, mode)


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
