"""The 3x3 convolution's cases and rows, and the commands that leave it out since it has no Triton kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import main
from benchmarks.convolution.cases import (
    CONVOLUTION_SHAPES,
    ConvolutionCase,
    ConvolutionShape,
    convolution_floor_bytes,
    convolution_flops,
)
from benchmarks.convolution.problems import convolution_problem
from benchmarks.convolution.providers import CONVOLUTION_PROVIDERS, eager_convolution
from benchmarks.families import CONVOLUTION
from benchmarks.providers import Provider
from benchmarks.report.contents import not_timed
from benchmarks.steps import make_step
from benchmarks.suite import PACES, suite_rows
from benchmarks.summary import summarize_rows
from soda_kernels import conv3x3, explain, native_status

CPU = torch.device("cpu")
MODES = ("fwd", "bwd", "fwd+bwd")
native = pytest.mark.skipif(not native_status().available, reason=str(native_status()))


def case(layout: str = "nhwc", dtype: str = "fp32", shape_set: str = "tiny") -> ConvolutionCase:
    (found,) = CONVOLUTION.cases([shape_set], [layout], dtype)
    return found


def test_ids_spell_the_shape() -> None:
    assert case().id == "tiny/2x8->16@6x4"


def test_bytes_and_operations_as_counted_by_hand() -> None:
    # x 384 numbers, y 768, filters 1152, bias 16
    forward, backward = 4 * (384 + 1152 + 16 + 768), 4 * (768 + 384 + 1152 + 384 + 1152 + 16)
    assert [convolution_floor_bytes(case(), mode) for mode in MODES] == [forward, backward, forward + backward]
    assert convolution_floor_bytes(case(dtype="bf16"), "fwd") == forward // 2
    one = 2 * 9 * 8 * 16 * 2 * 6 * 4
    assert [convolution_flops(case(), mode) for mode in MODES] == [one, 2 * one, 3 * one]


@pytest.mark.parametrize("shape_set", CONVOLUTION_SHAPES)
def test_they_are_those_of_the_tensors_and_of_pytorchs_counter(shape_set: str) -> None:
    for each in CONVOLUTION.cases([shape_set], ["nhwc"], "fp32"):
        problem = convolution_problem(each, "meta", grad=True)
        inputs = sum(tensor.nbytes for tensor in problem.named_inputs.values())
        with FlopCounterMode(display=False) as counter:
            y = problem.call(eager_convolution)
            gradients = torch.autograd.grad(y, list(problem.named_inputs.values()), problem.dy)
        assert convolution_floor_bytes(each, "fwd") == inputs + y.nbytes
        written = sum(gradient.nbytes for gradient in gradients)
        # The bias is no input of the backward.
        assert convolution_floor_bytes(each, "bwd") == y.nbytes + inputs - problem.bias.nbytes + written
        assert convolution_flops(each, "fwd+bwd") == counter.get_total_flops()


@native
@pytest.mark.parametrize("shape_set", CONVOLUTION_SHAPES)
def test_every_case_in_channels_last_is_for_winograd(shape_set: str) -> None:
    for each in CONVOLUTION.cases([shape_set], ["nhwc"], "fp32", on_cpu=True):
        problem = convolution_problem(each, CPU)
        assert [choice.backend for choice in explain(problem.call, conv3x3).choices] == ["native"], each.id


@pytest.mark.parametrize("layout", CONVOLUTION.layouts)
def test_a_problem_has_the_layout_of_its_case(layout: str) -> None:
    problem = convolution_problem(case(layout), CPU, grad=True)
    expected = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    assert all(each.is_contiguous(memory_format=expected) for each in (problem.x, problem.weight, problem.dy))
    assert list(problem.named_inputs) == ["x", "weight", "bias"]
    assert all(tensor.requires_grad and tensor.count_nonzero() for tensor in problem.named_inputs.values())
    assert {tensor.dtype for tensor in problem.double().named_inputs.values()} == {torch.float64}


def wrong(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return eager_convolution(x, weight * 1.0001, bias)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Rows of both layouts in all modes."""
    uncompiled = (each for each in CONVOLUTION_PROVIDERS if not each.compiled)
    providers = (*uncompiled, Provider(name="wrong", build=lambda: wrong))
    cases = [case(layout) for layout in CONVOLUTION.layouts]
    return [row for part in suite_rows(CONVOLUTION, cases, MODES, CPU, PACES["quick"], providers) for row in part]


@native
def test_every_provider_has_its_row(rows: list[dict[str, Any]]) -> None:
    status = {(row["provider"], row["case"]["layout"], row["mode"]): row["status"] for row in rows}
    expected = {("ours", "nhwc"): "ok", ("ours", "nchw"): "unavailable"}
    for (provider, layout, _), found in status.items():
        assert found == expected.get((provider, layout), "invalid" if provider == "wrong" else "ok")
    assert len(rows) == len(status) == 3 * 2 * len(MODES)
    for row in rows:
        assert (row["suite"], row["op"]) == ("conv", "conv3x3")
        assert {"N", "C", "K", "H", "W", "layout", "dtype"} <= row["case"].keys()
        assert (row["stats"]["p50"] is None) == (row["status"] != "ok")
        if row["provider"] == "ours":
            assert row["variant"] == ("native" if row["status"] == "ok" else None)


@native
def test_tables_say_once_that_the_other_layout_is_pytorchs(rows: list[dict[str, Any]]) -> None:
    reason = "conv3x3 calls PyTorch's own convolution here: it takes fp32 in nhwc on a CPU"
    assert f"ours, unavailable in 3 of 6 rows: {reason} (all in nchw)" in not_timed(rows)
    eager = [row for row in rows if row["provider"] == "eager"]
    eager[0] = eager[0] | {"status": "failed", "reason": "out of memory"}
    one_by_one = "eager, failed in 1 of 6 rows: out of memory (conv3x3 tiny/2x8->16@6x4 nchw fwd)"
    assert not_timed(eager) == [one_by_one]
    text = summarize_rows(rows)
    assert "nchw, timer wall, median us of a call; ours is not there" in text
    assert "nhwc, timer wall, median us of a call; ours is native" in text


def test_half_precision_is_pytorchs() -> None:
    problem = convolution_problem(case(dtype="bf16"), CPU)
    assert "conv3x3 calls PyTorch's own" in str(CONVOLUTION_PROVIDERS[0].unavailable(problem))


@native
def test_providers_agree_at_the_edges() -> None:
    edges = ConvolutionCase(shape_set="t", shape=ConvolutionShape(3, 24, 16, 5, 7), layout="nhwc", dtype="fp32")
    problem = convolution_problem(edges, CPU, grad=True)
    ours, eager = (make_step(forward, problem, "fwd+bwd")() for forward in (conv3x3, eager_convolution))
    for one, other in zip(ours, eager, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("command", ["tune", "traffic"])
def test_commands_for_triton_kernels_say_that_it_has_none(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--family", "convolution"])
    assert ended.value.code == 2
    line = "'convolution' is no family with Triton kernels; accepted are group_norm, attention, diffusion"
    assert line in capsys.readouterr().err
