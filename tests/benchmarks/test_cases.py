"""The shapes as data: told apart by name, floors as counted by hand, batches that a CPU can bear."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks.attention.cases import (
    ATTENTION_SHAPES,
    AttentionCase,
    AttentionShape,
    attention_cases,
    attention_floor_bytes,
    attention_flops,
)
from benchmarks.attention.plans import attention_plan
from benchmarks.attention.problems import attention_problem
from benchmarks.cases import DTYPES
from benchmarks.diffusion.cases import METERED_CALLS, diffusion_floor_bytes, diffusion_flops
from benchmarks.diffusion.plans import diffusion_plan
from benchmarks.diffusion.problems import diffusion_problem
from benchmarks.families import DIFFUSION, SUITES, TRITON_FAMILIES, Family, choose_cases
from benchmarks.group_norm.cases import LAYOUTS, NORM_SHAPES, NormCase, NormShape, norm_cases, norm_floor_bytes
from benchmarks.group_norm.plans import norm_plan
from benchmarks.group_norm.problems import norm_problem

TINY = NormCase(shape_set="tiny", shape=NormShape(2, 16, 8, 8, 2, 4), layout="nhwc", dtype="bf16")
PAIR = NormCase(shape_set="t", shape=NormShape(4, 96, 15, 15, 0, 32, 32), layout="nchw", dtype="fp32")
PACKED = AttentionCase(shape_set="t", shape=AttentionShape(2, 16, 3, 8), dtype="bf16")
CROSS = AttentionCase(shape_set="t", shape=AttentionShape(2, 16, 3, 8, keys=5), dtype="fp32")


@pytest.mark.parametrize("on_cpu", [False, True], ids=["full", "cpu"])
@pytest.mark.parametrize("family", SUITES.values(), ids=lambda family: family.name)
def test_every_case_has_a_name_of_its_own(family: Family, on_cpu: bool) -> None:
    cases = family.cases(list(family.shapes), family.layouts, "bf16", on_cpu=on_cpu)
    counts = Counter((case.id, case.layout) for case in cases)
    assert len(cases) > 2 * len(family.shapes)
    assert not [name for name, count in counts.items() if count > 1]


def test_ids_spell_the_shape() -> None:
    assert TINY.id == "tiny/2x16@8x8-g4-m2"
    assert PAIR.id == "t/4x(96+32)@15x15-g32-m0"
    assert (PACKED.id, PACKED.layout) == ("t/2x16-h3-d8", "packed")
    assert (CROSS.id, CROSS.layout) == ("t/2x16x5-h3-d8", "separate")


def test_every_shape_is_a_group_norm() -> None:
    for case in norm_cases(list(NORM_SHAPES), ("nchw",), "bf16"):
        assert case.num_channels % case.shape.num_groups == 0, case.id
        assert case.shape.modulations <= 2, case.id


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        # image 4096, weight and bias 128, four modulations 256, mean and rstd 64
        (TINY, 2 * 4096 + 128 + 256 + 64, 3 * 4096 + 2 * 128 + 2 * 256 + 64),
        # image 460800, weight and bias 1024, mean and rstd 1024
        (PAIR, 2 * 460800 + 1024 + 1024, 3 * 460800 + 2 * 1024 + 1024),
    ],
    ids=lambda value: value.id if isinstance(value, NormCase) else "",
)
def test_floor_as_counted_by_hand(case: NormCase, forward: int, backward: int) -> None:
    assert norm_floor_bytes(case, "fwd") == forward
    assert norm_floor_bytes(case, "bwd") == backward
    assert norm_floor_bytes(case, "fwd+bwd") == forward + backward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape_set", NORM_SHAPES)
def test_floor_is_the_size_of_inputs_and_outputs(shape_set: str, dtype: str) -> None:
    for case in norm_cases([shape_set], ("nchw",), dtype):
        problem = norm_problem(case, "meta")
        inputs = sum(tensor.nbytes for tensor in problem.named_inputs.values())
        y, _, mean, rstd = norm_plan(case, "fwd", "meta").outputs
        assert norm_floor_bytes(case, "fwd") == inputs + y.nbytes + mean.nbytes + rstd.nbytes
        *gradients, dmodulations = norm_plan(case, "bwd", "meta").outputs
        outputs = sum(tensor.nbytes for tensor in (*gradients, *dmodulations))
        assert norm_floor_bytes(case, "bwd") == inputs + problem.dy.nbytes + mean.nbytes + rstd.nbytes + outputs


@pytest.mark.parametrize(
    ("case", "forward", "backward", "product"),
    [
        # q, k, v and o are 1536 bytes each, lse is 384
        (PACKED, 4 * 1536 + 384, 8 * 1536 + 384, 2 * 6 * 16 * 16 * 8),
        # q and o 3072, k and v 960, lse 384
        (CROSS, 2 * 3072 + 2 * 960 + 384, 4 * 3072 + 4 * 960 + 384, 2 * 6 * 16 * 5 * 8),
    ],
    ids=lambda value: value.id if isinstance(value, AttentionCase) else "",
)
def test_attention_as_counted_by_hand(case: AttentionCase, forward: int, backward: int, product: int) -> None:
    assert attention_floor_bytes(case, "fwd") == forward
    assert attention_floor_bytes(case, "bwd") == backward
    assert attention_floor_bytes(case, "fwd+bwd") == forward + backward
    flops = [attention_flops(case, mode) for mode in ("fwd", "bwd", "fwd+bwd")]
    assert flops == [2 * product, 5 * product, 7 * product]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape_set", ATTENTION_SHAPES)
def test_floor_is_the_size_of_attentions_inputs_and_outputs(shape_set: str, dtype: str) -> None:
    for case in attention_cases([shape_set], ("packed", "separate"), dtype):
        problem = attention_problem(case, "meta")
        inputs = sum(tensor.nbytes for tensor in problem.named_inputs.values())
        o, lse = attention_plan(case, "fwd", "meta").outputs
        assert attention_floor_bytes(case, "fwd") == inputs + o.nbytes + lse.nbytes
        outputs = sum(tensor.nbytes for tensor in attention_plan(case, "bwd", "meta").outputs)
        assert attention_floor_bytes(case, "bwd") == inputs + problem.do.nbytes + o.nbytes + lse.nbytes + outputs


# An image is 768 bytes in bf16, 384 of uint8; a key is 32 bytes; of integers there are 16 a batch and 8 of floats.
FLOORS = {
    "normals": (768 + 32, None),
    "given": (2 * 768 + 32 + 16 + 2 * 8, None),
    "drawn-u8": (384 + 768 + 32 + 16 + 2 * 8, None),
    "eps": (768 + 32 + 16 + 2 * 8, 2 * 768 + 32 + 16 + 2 * 8),
    "v": (2 * 768 + 32 + 2 * 8 + 16 + 2 * 8, 3 * 768 + 32 + 2 * 8 + 16 + 2 * 8),
    "x0": (2 * 768 + 16 + 2 * 8, 3 * 768 + 16 + 2 * 8),
    "v-u8": (768 + 384 + 32 + 2 * 8 + 16 + 2 * 8, 2 * 768 + 384 + 32 + 2 * 8 + 16 + 2 * 8),
    "eps-saved": (2 * 768 + 32 + 16 + 2 * 8, 2 * 768 + 8),
    "ddim": (4 * 768, None),
    "ddim-guided-rescale": (5 * 768, None),
    "ddpm": (4 * 768 + 32, None),
    "dpmpp-guided-clip": (6 * 768, None),
}


@pytest.mark.parametrize("name", FLOORS)
def test_noising_and_sampling_as_counted_by_hand(name: str) -> None:
    (case,) = (case for case in DIFFUSION.cases(["tiny"], ["nchw"], "bf16") if case.call.name == name)
    forward, backward = FLOORS[name]
    assert case.id == f"tiny/2x3@8x8 {name}"
    assert diffusion_floor_bytes(case, "fwd") == forward and diffusion_flops(case, "fwd") > 0
    assert case.modes == (("fwd",) if backward is None else ("fwd", "bwd"))
    if backward is not None:
        assert diffusion_floor_bytes(case, "bwd") == backward
        assert diffusion_floor_bytes(case, "fwd+bwd") == forward + backward


def test_noising_and_loss_is_the_sum_of_its_ops() -> None:
    by_name = {case.call.name: case for case in DIFFUSION.cases(["tiny"], ["nchw"], "bf16")}
    for both in DIFFUSION.cases(["tiny"], ["nchw"], "bf16", timed=True):
        if both.op == "noising_and_loss":
            loss = by_name[both.call.name]
            expected = diffusion_floor_bytes(by_name["given"], "fwd") + diffusion_floor_bytes(loss, "fwd")
            assert diffusion_floor_bytes(both, "fwd") == expected
            assert diffusion_floor_bytes(both, "bwd") == diffusion_floor_bytes(loss, "bwd")


def test_every_op_and_way_of_calling_it_is_measured() -> None:
    ops = Counter(call.op for call in METERED_CALLS)
    assert ops.keys() == {"philox_normal", "add_noise", "denoising_loss", "sampler_step"}
    losses = {(call.target, call.saves) for call in METERED_CALLS if call.op == "denoising_loss"}
    assert losses == {(target, saves) for target in ("eps", "v", "x0") for saves in (False, True)}
    steps = {(call.method, call.guided) for call in METERED_CALLS if call.op == "sampler_step"}
    assert steps == {(method, guided) for method in ("ddpm", "ddim", "dpmpp_2m") for guided in (False, True)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_images_of_noising_and_sampling_are_the_plans(dtype: str) -> None:
    """What the floor says is written, a plan writes, but for a sample's few numbers."""
    for case in DIFFUSION.cases(["odd", "sd15"], DIFFUSION.layouts, dtype):
        image = case.image_elements * case.torch_dtype.itemsize
        problem = diffusion_problem(case, "meta")
        given = (problem.x, problem.prediction, problem.uncond, problem.previous_x0)
        if case.op == "sampler_step":
            read = sum(each.nbytes for each in given if each is not None)
            key = 8 * (2 + case.shape.batch) if case.call.draws else 0
            assert diffusion_floor_bytes(case, "fwd") == read + 2 * image + key
        for mode in case.modes:
            written = [each for each in diffusion_plan(case, mode, "meta").outputs if each.ndim > 1]
            loss_alone = case.op == "denoising_loss" and mode == "fwd" and not case.call.saves
            count = 0 if loss_alone else 2 if case.op == "sampler_step" else 1
            assert [each.nbytes for each in written] == [image] * count


def test_attention_of_a_models_shapes_has_its_heads() -> None:
    heads = {name: {case.shape.head_dim for case in attention_cases([name], ("packed", "separate"), "bf16")}
             for name in ("cifar", "soda-64", "soda-128", "sd15")}  # fmt: skip
    assert heads == {"cifar": {64}, "soda-64": {64}, "soda-128": {64}, "sd15": {40, 80, 160}}
    assert {case.num_keys for case in attention_cases(["sd15"], ("separate",), "bf16")} == {77}


def test_cases_are_of_the_sets_and_layouts_that_a_family_has() -> None:
    families, usual = list(TRITON_FAMILIES.values()), ("cifar", "lengths")
    chosen = choose_cases(families, None, ("nchw", "packed"), "bf16", usual=usual)
    found = {name: {(case.shape_set, case.layout) for case in cases} for name, cases in chosen.items()}
    assert found == {
        "group_norm": {("cifar", "nchw")}, "attention": {("cifar", "packed"), ("lengths", "packed")},
        "diffusion": {("cifar", "nchw")},
    }  # fmt: skip
    assert chosen == choose_cases(families, usual, ("nchw", "packed"), "bf16", usual=())
    everything = choose_cases(families, None, None, "bf16", usual=usual)
    assert [len(cases) for cases in everything.values()] == [8, 14, 43]
    timed = choose_cases(families, None, None, "bf16", usual=usual, timed=True)
    assert [len(cases) for cases in timed.values()] == [8, 14, 10]


@pytest.mark.parametrize(
    ("names", "shape_sets", "layouts", "said"),
    [
        (["attention"], ("cifar", "vae-decode"), None, "vae-decode is no shape set of attention, which has lengths, c"),
        (["group_norm"], None, ("nhwc", "packed"), "packed is no layout of group_norm, which has nchw, nhwc$"),
        (list(TRITON_FAMILIES), ("vae-decode",), ("packed",), "or diffusion has no case of vae-decode in packed"),
    ],
)  # fmt: skip
def test_what_no_family_has_is_said(names: list[str], shape_sets: Any, layouts: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        choose_cases([TRITON_FAMILIES[name] for name in names], shape_sets, layouts, "bf16", usual=("cifar",))


def test_batches_are_cut_down_for_a_cpu() -> None:
    assert {case.shape.batch for case in attention_cases(["lengths"], ["packed"], "fp32", on_cpu=True)} == {1, 2}
    assert {case.shape.batch for case in norm_cases(["cifar"], LAYOUTS, "fp32", on_cpu=True)} == {32}
    assert {case.shape.batch for case in norm_cases(["soda-64"], LAYOUTS, "fp32", on_cpu=True)} == {8}
    assert {case.shape.batch for case in norm_cases(["sd15"], LAYOUTS, "fp32", on_cpu=True)} == {1, 2}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_problem_has_the_layout_and_dtypes_of_its_case(layout: str) -> None:
    case = NormCase(shape_set="t", shape=PAIR.shape._replace(modulations=1), layout=layout, dtype="bf16")
    problem = norm_problem(case, "cpu", grad=True)
    expected = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    assert problem.skip is not None
    for image in (problem.x, problem.skip, problem.dy):
        assert image.is_contiguous(memory_format=expected) and image.dtype == torch.bfloat16
    assert problem.weight.dtype == problem.bias.dtype == torch.float32
    assert list(problem.named_inputs) == ["x", "skip", "weight", "bias", "scale1", "shift1"]
    assert all(tensor.requires_grad and tensor.count_nonzero() for tensor in problem.named_inputs.values())


def test_attentions_tensors_are_as_their_case_says() -> None:
    packed, cross = (attention_problem(case, "cpu", grad=True) for case in (PACKED, CROSS))
    assert list(packed.named_inputs) == ["qkv"] and list(cross.named_inputs) == ["q", "k", "v"]
    assert packed.inputs[0].shape == (2, 16, 3, 3, 8) and packed.inputs[0].dtype == torch.bfloat16
    assert [part.shape for part in packed.parts] == 3 * [(2, 16, 3, 8)]
    assert [part.shape for part in cross.parts] == [(2, 16, 3, 8), (2, 5, 3, 8), (2, 5, 3, 8)]
    for problem in (packed, cross):
        assert problem.gradient.shape == (2, 16, 3, 8)
        assert all(tensor.requires_grad and tensor.count_nonzero() for tensor in problem.named_inputs.values())
        wide = problem.double().named_inputs.values()
        assert all(tensor.dtype == torch.float64 and tensor.is_leaf and tensor.requires_grad for tensor in wide)
