"""The 3x3 convolution: Winograd's kernels in each instruction set here, what they are not for, and wrong arguments."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import profile

from soda_kernels import _native, conv3x3, explain, use_backend
from tests.numerics import assert_accurate_in_norm

_native.load()
# Not in silence where it could be built: tests/packaging/test_native_build.py fails there.
native = pytest.mark.skipif(not _native.native_status().available, reason=str(_native.native_status()))

# Even and odd sides, one row, panels of every width, chunks that do not come out even, more filters than a unit has;
# and 2x2 pixels, where all of a tile but a quarter is border.
SHAPES = [
    ((8, 16, 2, 2), 16),
    ((3, 24, 5, 7), 8),
    ((2, 8, 6, 4), 40),
    ((16, 48, 1, 9), 24),
    ((1, 32, 9, 16), 72),
    ((2, 80, 17, 3), 16),
    ((128, 48, 16, 16), 48),
    ((4, 16, 12, 10), 136),
]  # fmt: skip


class Problem:
    """One call's tensors, channels_last, and the gradient that comes back."""

    def __init__(self, shape: tuple[int, ...], filters: int, *, weight_format: Any = torch.channels_last) -> None:
        torch.manual_seed(sum(shape) + filters)
        batch, channels, *sides = shape

        def image(count: int) -> Tensor:
            return torch.randn(batch, count, *sides).to(memory_format=torch.channels_last)

        weight = torch.randn(filters, channels, 3, 3) / (9 * channels) ** 0.5
        self.x, self.residual, self.dy = image(channels), image(filters), image(filters)
        self.weight, self.bias = weight.to(memory_format=weight_format), torch.randn(filters)

    def results(self, function: Callable[..., Tensor], dtype: torch.dtype, *, activation: str | None) -> list[Tensor]:
        """The convolution and its gradients."""
        leaves = [t.to(dtype).requires_grad_() for t in (self.x, self.weight, self.bias, self.residual)]
        *arguments, residual = leaves
        y = function(*arguments, residual=residual, activation=activation)
        return [y, *torch.autograd.grad(y, leaves, self.dy.to(dtype))]


def plain(x: Tensor, weight: Tensor, bias: Tensor, *, residual: Tensor, activation: str | None) -> Tensor:
    y = F.conv2d(x, weight, bias, padding=1) + residual
    return y if activation is None else F.relu(y)


@native
@pytest.mark.parametrize("weight_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(("shape", "filters"), SHAPES, ids=str)
def test_values_and_gradients(isa: str, shape: tuple[int, ...], filters: int, weight_format: Any) -> None:
    problem = Problem(shape, filters, weight_format=weight_format)
    assert {choice.backend for choice in explain(conv3x3, problem.x, problem.weight).choices} == {"native"}
    with _native.poisoned_results() as poisoned:
        ours = problem.results(conv3x3, torch.float32, activation=None)
    assert poisoned[0] == (4 if weight_format == torch.channels_last else 6)  # copies of the filters
    stock, exact = (problem.results(plain, dtype, activation=None) for dtype in (torch.float32, torch.float64))
    for name, *each in zip(("y", "dx", "dweight", "dbias", "dresidual"), ours, stock, exact, strict=True):
        assert each[0].dtype == torch.float32
        assert_accurate_in_norm(*each, name)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


@native
def test_the_activation_and_its_gradients(isa: str) -> None:
    problem = Problem((3, 24, 5, 7), 16)
    ours, stock, exact = (
        problem.results(function, dtype, activation="relu")
        for function, dtype in ((conv3x3, torch.float32), (plain, torch.float32), (plain, torch.float64))
    )
    assert float(ours[0].detach().min()) == 0.0
    for each in zip(ours, stock, exact, strict=True):
        assert_accurate_in_norm(*each)


@native
def test_an_activated_nan_stays_one() -> None:
    problem = Problem((3, 24, 5, 7), 16)
    problem.x[1, 3, 2, 2] = torch.nan
    y = conv3x3(problem.x, problem.weight, activation="relu")
    spread = y[1].isnan()
    assert spread[:, 1:4, 1:4].all(), "every output that reads the pixel"
    assert not y[0].isnan().any() and not y[2].isnan().any()
    assert not spread[:, 4:].any() and not spread[:, :, 4:].any(), "no tile that does not read it"


@native
@pytest.mark.parametrize(("shape", "filters"), [SHAPES[2], SHAPES[6], SHAPES[7]], ids=str)
def test_the_same_bits_for_every_number_of_threads_and_every_repetition(shape: Any, filters: int) -> None:
    problem = Problem(shape, filters)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append(problem.results(conv3x3, torch.float32, activation="relu"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@native
def test_an_image_does_not_depend_on_its_batch() -> None:
    problem = Problem((6, 24, 9, 8), 16)
    whole = conv3x3(problem.x, problem.weight, problem.bias)
    parts = [conv3x3(problem.x[i : i + 2], problem.weight, problem.bias) for i in range(0, 6, 2)]
    assert torch.equal(whole, torch.cat(parts))


@native
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
def test_only_the_gradients_that_are_asked_for(wanted: str) -> None:
    problem = Problem((3, 24, 5, 7), 16)
    tensors = {name: getattr(problem, name) for name in ("x", "weight", "bias", "residual")}
    alone = conv3x3(**{**tensors, wanted: tensors[wanted].requires_grad_()})
    (gradient,) = torch.autograd.grad(alone, tensors[wanted], problem.dy)
    tensors[wanted].requires_grad_(False)
    every = dict(zip(("y", *tensors), problem.results(conv3x3, torch.float32, activation=None), strict=True))
    assert torch.equal(gradient, every[wanted])


def _half(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x.bfloat16(), w.bfloat16()


NOT_FOR_WINOGRAD: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "bf16": _half,
    "fp64": lambda x, w: (x.double(), w.double()),
    "contiguous": lambda x, w: (x.contiguous(), w),
    "three channels": lambda x, w: (x[:, :3].contiguous(memory_format=torch.channels_last), w[:, :3]),
    "twelve filters": lambda x, w: (x, w[:12]),
    "no image": lambda x, w: (x[:0], w),
    "four tiles": lambda x, w: (x[:1, :, :4, :4].contiguous(memory_format=torch.channels_last), w),
    "a slice": lambda x, w: (x[:, :, ::2], w),
}


@pytest.mark.parametrize("name", NOT_FOR_WINOGRAD)
def test_everything_else_is_pytorchs(name: str) -> None:
    problem = Problem((16, 24, 5, 7), 16)
    x, weight = (t.detach().requires_grad_() for t in NOT_FOR_WINOGRAD[name](problem.x, problem.weight))
    assert not explain(conv3x3, x, weight).choices
    y, expected = conv3x3(x, weight), F.conv2d(x, weight, padding=1)
    assert torch.equal(y, expected) and y.stride() == expected.stride()
    # The op itself leaves it to its reference too.
    op = torch.ops.soda_kernels.conv3x3(x.detach(), weight.detach(), None, None, False)
    assert torch.equal(op, expected)
    backward = torch.ops.soda_kernels.conv3x3_backward
    gradients = backward(expected.detach(), x.detach(), weight.detach(), True, True, True)
    for ours, stock in zip(gradients, torch.autograd.grad(expected, (x, weight), expected.detach()), strict=False):
        torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_of_one_pixel_sees_the_centres(dtype: torch.dtype, activation: str | None) -> None:
    problem = Problem((16, 24, 1, 1), 16)
    # Numbers of bf16, so that the three compute the same.
    problem.x, problem.weight, problem.bias, problem.residual, problem.dy = (
        each.bfloat16().float() for each in (problem.x, problem.weight, problem.bias, problem.residual, problem.dy)
    )
    assert not explain(conv3x3, problem.x, problem.weight).choices
    ours, stock, exact = (
        problem.results(function, each, activation=activation)
        for function, each in ((conv3x3, dtype), (plain, dtype), (plain, torch.float64))
    )
    assert ours[0].stride() == stock[0].stride()
    for name, *each in zip(("y", "dx", "dweight", "dbias", "dresidual"), ours, stock, exact, strict=True):
        assert_accurate_in_norm(*each, name)
    assert not ours[2][:, :, 0].any() and ours[2][:, :, 1, 1].any()
    assert ours[2].is_contiguous(memory_format=torch.channels_last), "as the filters are"


def test_the_reference_backend_and_autocast_run_pytorchs() -> None:
    problem = Problem((16, 24, 5, 7), 16)
    with use_backend("reference"):
        assert torch.equal(conv3x3(problem.x, problem.weight), F.conv2d(problem.x, problem.weight, padding=1))
        pixel = problem.x[:, :, :1, :1]
        with profile() as seen:
            conv3x3(pixel, problem.weight)
        assert "aten::linear" not in {event.name for event in seen.events()}
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3x3(problem.x, problem.weight).dtype == torch.bfloat16
        assert conv3x3(pixel, problem.weight).dtype == torch.bfloat16


def test_on_meta_it_has_a_shape() -> None:
    y = conv3x3(torch.empty(2, 8, 6, 6, device="meta"), torch.empty(16, 8, 3, 3, device="meta"))
    assert y.is_meta and y.shape == (2, 16, 6, 6)


@native
def test_a_second_derivative_is_refused() -> None:
    problem = Problem((3, 24, 5, 7), 16)
    x = problem.x.requires_grad_()
    (dx,) = torch.autograd.grad(conv3x3(x, problem.weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@native
def test_the_op_itself_refuses_what_would_be_read_beyond_its_end() -> None:
    problem, op = Problem((3, 24, 5, 7), 16), torch.ops.soda_kernels.conv3x3
    for bias, residual in ((torch.zeros(15), None), (None, problem.residual[:2]), (torch.zeros(16).double(), None)):
        with pytest.raises(RuntimeError):
            op(problem.x, problem.weight, bias, residual, False)
    with pytest.raises(RuntimeError):
        torch.ops.soda_kernels.conv3x3_backward(problem.dy[:2], problem.x, problem.weight, True, True, True)


X, W = torch.randn(2, 8, 6, 6), torch.randn(16, 8, 3, 3)
WRONG: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((None, W), {}, TypeError, "x is a NoneType; it must be a tensor"),
    ((X[0], W), {}, ValueError, r"x has shape \(8, 6, 6\); it must be \(N, C, H, W\)"),
    ((X, W[:, :4]), {}, ValueError, r"weight has shape \(16, 4, 3, 3\); it must be \(16, 8, 3, 3\)"),
    ((X, W[..., :1]), {}, ValueError, r"weight has shape \(16, 8, 3, 1\); it must be \(16, 8, 3, 3\)"),
    ((X, W[0]), {}, ValueError, r"weight has shape \(8, 3, 3\); it must be \(K, C, 3, 3\)"),
    ((X, W.double()), {}, TypeError, "weight has dtype torch.float64 and x torch.float32; they must be the same"),
    ((X, W, torch.zeros(8)), {}, ValueError, r"bias has shape \(8,\); it must be \(16,\)"),
    ((X, W, torch.zeros(16, dtype=torch.int64)), {}, TypeError, "bias has dtype torch.int64"),
    ((X, W), {"residual": X}, ValueError, r"residual has shape \(2, 8, 6, 6\); it must be \(2, 16, 6, 6\)"),
    ((X, W), {"activation": "silu"}, ValueError, r"activation is 'silu'; it must be one of \['relu', None\]"),
    ((X, W.to("meta")), {}, ValueError, "weight is on meta and x on cpu; they must be on one device"),
]


@native
@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("bias", torch.zeros(24), r"bias has shape (24,); it must be (16,)"),
        ("bias", torch.zeros(16, dtype=torch.float64), "bias has dtype torch.float64 and x torch.float32"),
        ("bias", torch.zeros(16).to_sparse(), "bias has layout torch.sparse_coo; it must be a dense tensor"),
        ("bias", 0.0, "bias is a float; it must be a tensor"),
        ("residual", torch.zeros(16, 16, 5, 6), "residual has shape (16, 16, 5, 6); it must be (16, 16, 5, 7)"),
        ("residual", torch.zeros(16, 16, 5, 7).half(), "residual has dtype torch.float16 and x torch.float32"),
        ("weight", torch.zeros(16, 24, 3, 3).to_mkldnn(), "weight has layout torch._mkldnn; it must be a dense tensor"),
        ("weight", torch.zeros(16, 16, 3, 3), "weight has shape (16, 16, 3, 3); it must be (16, 24, 3, 3)"),
    ],
    ids=str,
)  # fmt: skip
def test_one_wrong_argument_beside_right_ones(name: str, value: Any, line: str) -> None:
    problem = Problem((16, 24, 5, 7), 16)
    arguments = {"x": problem.x, "weight": problem.weight, "bias": problem.bias, "residual": problem.residual}
    assert explain(conv3x3, **arguments).choices
    with pytest.raises((TypeError, ValueError), match=re.escape(line)):
        conv3x3(**arguments | {name: value})


@pytest.mark.parametrize(("args", "kwargs", "error", "line"), WRONG, ids=[line[:24] for *_, line in WRONG])
def test_wrong_arguments(args: Any, kwargs: Any, error: type[Exception], line: str) -> None:
    with pytest.raises(error, match=line):
        conv3x3(*args, **kwargs)
