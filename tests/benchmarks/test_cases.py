"""The shapes as data: told apart by name, floors as counted by hand, batches that a CPU can bear."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks.cases import DTYPES, LAYOUTS, NORM_SHAPES, NormCase, NormShape, norm_cases, norm_floor_bytes
from benchmarks.plans import norm_plan
from benchmarks.problems import norm_problem

TINY = NormCase(shape_set="tiny", shape=NormShape(2, 16, 8, 8, 2, 4), layout="nhwc", dtype="bf16")
PAIR = NormCase(shape_set="t", shape=NormShape(4, 96, 15, 15, 0, 32, 32), layout="nchw", dtype="fp32")


@pytest.mark.parametrize("on_cpu", [False, True], ids=["full", "cpu"])
def test_every_case_has_a_name_of_its_own(on_cpu: bool) -> None:
    cases = norm_cases(list(NORM_SHAPES), LAYOUTS, "bf16", on_cpu=on_cpu)
    counts = Counter((case.id, case.layout) for case in cases)
    assert len(cases) > 2 * len(NORM_SHAPES)
    assert not [name for name, count in counts.items() if count > 1]


def test_ids_spell_the_shape() -> None:
    assert TINY.id == "tiny/2x16@8x8-g4-m2"
    assert PAIR.id == "t/4x(96+32)@15x15-g32-m0"


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


def test_batches_are_cut_down_for_a_cpu() -> None:
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
