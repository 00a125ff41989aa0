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
from benchmarks.families import FAMILIES, Family, choose_cases
from benchmarks.group_norm.cases import LAYOUTS, NORM_SHAPES, NormCase, NormShape, norm_cases, norm_floor_bytes
from benchmarks.group_norm.plans import norm_plan
from benchmarks.group_norm.problems import norm_problem

TINY = NormCase(shape_set="tiny", shape=NormShape(2, 16, 8, 8, 2, 4), layout="nhwc", dtype="bf16")
PAIR = NormCase(shape_set="t", shape=NormShape(4, 96, 15, 15, 0, 32, 32), layout="nchw", dtype="fp32")
PACKED = AttentionCase(shape_set="t", shape=AttentionShape(2, 16, 3, 8), dtype="bf16")
CROSS = AttentionCase(shape_set="t", shape=AttentionShape(2, 16, 3, 8, keys=5), dtype="fp32")


@pytest.mark.parametrize("on_cpu", [False, True], ids=["full", "cpu"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
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


def test_attention_of_a_models_shapes_has_its_heads() -> None:
    heads = {name: {case.shape.head_dim for case in attention_cases([name], ("packed", "separate"), "bf16")}
             for name in ("cifar", "soda-64", "soda-128", "sd15")}  # fmt: skip
    assert heads == {"cifar": {64}, "soda-64": {64}, "soda-128": {64}, "sd15": {40, 80, 160}}
    assert {case.num_keys for case in attention_cases(["sd15"], ("separate",), "bf16")} == {77}


def test_cases_are_of_the_sets_and_layouts_that_a_family_has() -> None:
    families, usual = list(FAMILIES.values()), ("cifar", "lengths")
    chosen = choose_cases(families, None, ("nchw", "packed"), "bf16", usual=usual)
    found = {name: {(case.shape_set, case.layout) for case in cases} for name, cases in chosen.items()}
    assert found == {"group_norm": {("cifar", "nchw")}, "attention": {("cifar", "packed"), ("lengths", "packed")}}
    assert chosen == choose_cases(families, usual, ("nchw", "packed"), "bf16", usual=())
    everything = choose_cases(families, None, None, "bf16", usual=usual)
    assert [len(cases) for cases in everything.values()] == [8, 14]


@pytest.mark.parametrize(
    ("names", "shape_sets", "layouts", "said"),
    [
        (["attention"], ("cifar", "vae-decode"), None, "vae-decode is no shape set of attention, which has lengths, c"),
        (["group_norm"], None, ("nhwc", "packed"), "packed is no layout of group_norm, which has nchw, nhwc$"),
        (list(FAMILIES), ("vae-decode",), ("packed",), "group_norm or attention has no case of vae-decode in packed"),
    ],
)  # fmt: skip
def test_what_no_family_has_is_said(names: list[str], shape_sets: Any, layouts: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        choose_cases([FAMILIES[name] for name in names], shape_sets, layouts, "bf16", usual=("cifar",))


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
