"""The native CPU kernels of modulated group norm: values, gradients and layouts, in each instruction set here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from soda_kernels import _native, modulated_group_norm
from tests.kernels.norm_problems import FORMS, LAYOUTS, SHAPES, Form, Problem, call, problem
from tests.numerics import assert_accurate, assert_accurate_in_norm

_native.load()
# Not in silence where it could be built: tests/packaging/test_native_build.py fails there.
pytestmark = pytest.mark.skipif(not _native.native_status().available, reason=str(_native.native_status()))

NATIVE, REFERENCE = torch.ops.soda_kernels, torch.ops.soda_kernels_reference
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
# Odd and even, within one block of rows and beyond, groups of one channel, of all and across vectors.
MORE_SHAPES = [
    ((2, 96, 7, 7), 1),
    ((2, 12, 5, 3), 12),
    ((257, 6, 1, 1), 2),
    ((2, 64, 16, 16), 32),
    ((1, 40, 33, 70), 4),
    ((2, 96, 3, 4, 5), 32),
]


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def results(case: Problem) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Outputs and gradients by name: of the op, of the composition, and of the composition in fp64."""
    double, sides = case.to(torch.float64), []
    output_gradients = [torch.randn_like(out) for out in case.composed()]
    for problem_of, outputs in ((case, case.fused()), (case, case.composed()), (double, double.composed())):
        gradients = problem_of.gradients(outputs, [dy.to(outputs[0].dtype) for dy in output_gradients])
        sides.append({"y": outputs[0], **({"summed": outputs[1]} if outputs[1:] else {}), **gradients})
    for name, result in sides[0].items():
        assert result.dtype == case.leaves[name if name in case.leaves else "x"].dtype
    return [(name, *(side[name].detach() for side in sides)) for name in sides[0]]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES, ids=named)
def test_every_form(isa: str, dtype: torch.dtype, parameter_dtype: torch.dtype, layout: str, form: Form) -> None:
    for name, actual, composed, exact in results(problem((3, 24, 9, 7), 4, layout, form, dtype, parameter_dtype)):
        # Of 24 values the largest error is a draw: over 200 seeds 0.85 times the composition's in the mean, and 4 times
        # more than twice.
        (assert_accurate_in_norm if actual.ndim == 1 else assert_accurate)(actual, composed, exact, name)


@pytest.mark.parametrize("form", [FORMS[3], FORMS[6], FORMS[7]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
@pytest.mark.parametrize(
    ("shape", "num_groups"), [case for case in SHAPES if 0 not in case[0]] + MORE_SHAPES, ids=lambda value: str(value)
)
def test_every_shape(isa: str, shape: tuple[int, ...], num_groups: int, dtype: torch.dtype, form: Form) -> None:
    """In relative L2 error over all results: the largest error of four numbers, as some gradients are, is a draw."""
    for layout in ["nchw"] + {4: ["nhwc"], 5: ["ndhwc"]}.get(len(shape), []):
        case = problem(shape, num_groups, layout, form, dtype)
        found = results(case)
        if shape[1] // num_groups * torch.Size(shape[2:]).numel() <= 2:
            # x_hat of one or two numbers is 0 or 1 to rounding, and its gradient rounding alone.
            found = [result for result in found if result[0] in ("y", "summed")]
        ours = sum(float((actual - exact).norm() / exact.norm()) ** 2 for _, actual, _, exact in found)
        stock = sum(float((composed - exact).norm() / exact.norm()) ** 2 for _, _, composed, exact in found)
        assert ours**0.5 <= 2 * stock**0.5 + torch.finfo(dtype).eps


@pytest.mark.parametrize("dropout_p", [0.1, 0.9, 1e-7])
@pytest.mark.parametrize("shape", [(3, 24, 4, 6), (3, 24, 9, 7), (2, 70, 80), (2, 24, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("pair", [False, True], ids=["image", "pair"])
def test_dropout_masks_are_the_references_bit_for_bit(
    isa: str, pair: bool, shape: tuple[int, ...], dropout_p: float
) -> None:
    form = Form(activation=None, pair=pair, dropout_p=dropout_p)
    seeds = [torch.tensor(5), torch.tensor(-(2**40) - 1), torch.tensor([[7, 0], [-3, 0], [2**40, 0]])[: shape[0], 0]]
    for layout in ["nchw"] + {4: ["nhwc"], 5: ["ndhwc"]}.get(len(shape), []):
        case = problem(shape, 2, layout, form, torch.float32)
        for seed in seeds:
            actual, expected = call(case, NATIVE, seed), call(case, REFERENCE, seed)
            assert torch.equal(actual[0] == 0, expected[0] == 0)
            for result, reference in zip(actual, expected, strict=True):
                torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_pair_of_different_means(isa: str, layout: str) -> None:
    """Statistics of the one image are summed around its own means."""
    torch.manual_seed(0)
    x, skip = torch.randn(2, 2, 32, 16, 16).unbind()
    skip = skip + 1e4
    if layout == "nhwc":
        x, skip = (image.contiguous(memory_format=torch.channels_last) for image in (x, skip))
    y = NATIVE.modulated_group_norm(x, skip, None, None, None, [], 2, 1.0, 1e-5, False, 0.0, None)[0]
    for half, image in zip(y.chunk(2, dim=1), (x, skip), strict=True):
        exact = torch.nn.functional.group_norm(image.double(), 1)
        plain = torch.nn.functional.group_norm(image, 1)
        assert (half - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("kind", ["sliced", "channel-sliced", "expanded", "transposed"])
def test_images_dense_in_no_layout(isa: str, kind: str) -> None:
    x = {
        "sliced": torch.randn(4, 16, 5, 12)[:, ::2, :, ::2],
        "channel-sliced": torch.randn(4, 20, 5, 6).contiguous(memory_format=torch.channels_last)[:, 4:12],
        "expanded": torch.randn(1, 8, 1, 6).expand(4, 8, 5, 6),
        "transposed": torch.randn(4, 8, 6, 5).mT,
    }[kind]
    actual = NATIVE.modulated_group_norm(x, None, x, None, None, [], 4, 1.0, 1e-5, True, 0.0, None)
    expected = NATIVE.modulated_group_norm(
        x.contiguous(), None, x.contiguous(), None, None, [], 4, 1.0, 1e-5, True, 0.0, None
    )
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3], FORMS[6], FORMS[7]], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 8, 3, 5), (2, 8, 1, 1), (1, 8, 2, 1), (2, 6, 2, 3, 5), (3, 6, 5), (3, 6)], ids=str
)
def test_strides_are_those_of_the_fake(shape: tuple[int, ...], form: Form) -> None:
    for layout in ["nchw"] + {4: ["nhwc"], 5: ["ndhwc"]}.get(len(shape), []):
        case = problem(shape, 2, layout, form, torch.bfloat16, torch.float32)
        seed = torch.tensor(1)
        real = {name: leaf.detach() for name, leaf in case.leaves.items()}
        with FakeTensorMode() as mode:
            leaves = tree_map_only(Tensor, mode.from_tensor, real)
            fakes = call(replace(case, leaves=leaves), NATIVE, mode.from_tensor(seed))
        for result, fake in zip(call(case, NATIVE, seed), fakes, strict=True):
            assert (result.shape, result.dtype, result.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(2, 64, 16, 16), (2, 32, 5, 3), (3, 8, 70, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
def test_a_mean_far_above_the_deviation(isa: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    """10000 +- 0.1 in fp32, and 100 +- 1 in bf16, which has no number between 10000 and 10048."""
    mean, width = (10_000, 0.2) if dtype == torch.float32 else (100, 2)
    x = (mean + width * (torch.rand(shape) - 0.5)).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    exact = torch.nn.functional.group_norm(x.double(), 4)
    stock = torch.nn.functional.group_norm(x, 4)
    y = modulated_group_norm(x, 4, activation=None)
    assert (y - exact).norm() <= 2 * (stock - exact).norm() + exact.norm() * torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("jumps", ["one step", "every block", "a ramp"])
def test_means_that_move_inside_an_image(isa: str, jumps: str, layout: str) -> None:
    """Squares are summed around the mean of what came before, wherever that is: no error may be seen of it."""
    height, width = 64, 16  # blocks of the channels_last kernel are four rows
    row = torch.arange(height).view(1, 1, height, 1)
    offset = {
        "one step": 1e4 * (row >= 32), "every block": 1e4 * (row // 4 % 2), "a ramp": 1e3 * row,
    }[jumps]  # fmt: skip
    x = (offset + 0.1 * torch.randn(2, 32, height, width)).contiguous(memory_format=LAYOUTS[layout])
    exact = torch.nn.functional.group_norm(x.double(), 8)
    stock = torch.nn.functional.group_norm(x, 8)
    y = modulated_group_norm(x, 8, activation=None)
    assert (y - exact).norm() <= 2 * (stock - exact).norm() + torch.finfo(torch.float32).eps * exact.norm()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_constant_gives_the_shift(isa: str, layout: str) -> None:
    shift = torch.randn(2, 8)
    for value in (0.0, 7.25, 0.1, 3e38):
        x = torch.full((2, 8, 9, 15), value).contiguous(memory_format=LAYOUTS[layout])
        y = modulated_group_norm(x, 2, modulations=[(torch.randn(2, 8), shift)], activation=None)
        assert torch.equal(y, shift.view(2, 8, 1, 1).expand_as(y)) or value == 3e38
        assert not y.isnan().any() or value == 3e38  # the sum of such a run is infinite in fp32


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_group(isa: str, value: float, layout: str) -> None:
    x = torch.randn(2, 8, 9, 15).contiguous(memory_format=LAYOUTS[layout])
    clean = modulated_group_norm(x, 2, dropout_p=0.5, seed=1)
    x[1, 5, 2, 3] = value
    y = modulated_group_norm(x, 2, dropout_p=0.5, seed=1)
    assert y[1, 4:].isnan().all()
    y[1, 4:] = clean[1, 4:]
    assert torch.equal(y, clean)


def test_silu_at_its_ends_is_finite_and_accurate(isa: str) -> None:
    p = torch.cat((torch.linspace(-100, 100, 4001), torch.tensor([-3e38, -1e30, -88.8, -87.4, 87.4, 88.8, 1e30, 3e38])))
    x, gain = torch.zeros(1, len(p), 1, 1), torch.zeros(1, len(p))
    statistics = torch.zeros(1, 1), torch.ones(1, 1)
    y = NATIVE.modulated_group_norm(x, None, None, None, p, [], 1, 0.0, 1e-5, True, 0.0, None)[0].flatten()
    exact = p.double() * p.double().sigmoid()
    assert ((y - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs() + 2e-36).all()
    for infinite, limit in ((torch.inf, torch.inf), (-torch.inf, 0.0)):
        bias = torch.tensor([infinite])
        y = NATIVE.modulated_group_norm(x[:, :1], None, None, None, bias, [], 1, 0.0, 1e-5, True, 0.0, None)[0]
        assert y.item() == pytest.approx(limit, abs=2e-36)
    # The gradient of the shift of a channel with one place is silu'(p) dy.
    derivative = NATIVE.modulated_group_norm_backward(
        torch.ones_like(x), None, x, None, None, p, [gain, gain + p], *statistics, 0.0, True, 0.0, None
    )[4][1].flatten()
    sigmoid = p.double().sigmoid()
    exact = sigmoid * (1 + p.double() * (-p.double()).sigmoid())
    assert ((derivative - exact).abs() <= 4e-7).all()


def test_what_the_kernels_do_not_take_goes_to_the_reference() -> None:
    seed = torch.tensor(2)
    for shape in ((0, 8, 3, 3), (2, 8, 0), (2, 8, 3, 0)):
        case = problem(shape, 2, "nchw", FORMS[6], torch.float32)
        for result, reference in zip(call(case, NATIVE, seed), call(case, REFERENCE, seed), strict=True):
            assert (result.shape, result.dtype) == (reference.shape, reference.dtype)
            assert torch.equal(result, reference)
    for dtypes in ((torch.float64, torch.float64), (torch.float32, torch.float64), (torch.float64, torch.float32)):
        case = problem((2, 8, 3, 5), 2, "nhwc", FORMS[6], *dtypes)
        for result, reference in zip(call(case, NATIVE, seed), call(case, REFERENCE, seed), strict=True):
            assert result.dtype == reference.dtype and torch.equal(result, reference)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(8)}, ValueError, r"x has shape \(8,\); it must have at least 2 dimensions"),
        ({"x": torch.zeros(2, 8, 3, dtype=torch.int64)}, TypeError, "x has dtype torch.int64; accepted are"),
        ({"weight": torch.zeros(8, dtype=torch.int64)}, TypeError, "weight has dtype torch.int64; accepted are"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias is on meta and x on cpu"),
        ({"modulations": [(torch.zeros(2, 8), torch.zeros(2, 7))]}, ValueError, r"modulations\[0\] shift has shape"),
        ({"num_groups": 3}, ValueError, "num_groups is 3; it must divide the 8 channels of x"),
        ({"num_groups": True}, TypeError, "num_groups is a bool; it must be an int"),
        ({"residual": torch.zeros(2, 8, 4)}, ValueError, "residual has shape"),
        ({"x": (torch.zeros(2, 4, 3), torch.zeros(4))}, ValueError, "skip has shape"),
    ],
    ids=str,
)
@pytest.mark.parametrize("grad", [False, True])
def test_what_the_library_refuses_is_said_in_words(
    change: dict[str, Any], error: type[Exception], message: str, grad: bool
) -> None:
    """The checks are left to the library where it runs, which knows no argument's name."""
    weight = torch.ones(8, requires_grad=grad)
    arguments: dict[str, Any] = {"x": torch.zeros(2, 8, 3), "num_groups": 2, "weight": weight}
    with pytest.raises(error, match=message) as raised:
        modulated_group_norm(**(arguments | change))
    assert raised.value.__context__ is None


@pytest.mark.parametrize("form", [FORMS[6], FORMS[7]], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_opcheck(layout: str, form: Form) -> None:
    case = problem((2, 8, 3, 5), 2, layout, form, torch.bfloat16, torch.float32)
    leaves = {name: leaf.detach() for name, leaf in case.leaves.items()}
    modulations = [leaves[f"{name}{i}"] for i in range(form.modulations) for name in ("scale", "shift")]
    parts = leaves.get("skip"), leaves.get("residual"), leaves["weight"], leaves["bias"], modulations
    arguments = (leaves["x"], *parts, 2, 1.0, 1e-5, True, 0.5, torch.tensor(1), form.residual_scale)
    torch.library.opcheck(NATIVE.modulated_group_norm.default, arguments)


X, ROW = torch.randn(2, 8, 3, 5), torch.randn(2, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, None, None, torch.ones(7), None, [], 2), "weight"),
        ((X, None, None, None, torch.ones(2, 8), [], 2), "bias"),
        ((X, None, None, None, None, [ROW, ROW[:1]], 2), "modulations"),
        ((X, None, None, None, None, [ROW], 2), "modulations has 1 tensors"),
        ((X, None, None, None, None, [], 3), "num_groups is 3"),
        ((X, X[..., :4], None, None, None, [], 2), "skip"),
        ((X, None, X[:1], None, None, [], 2), "residual"),
        ((X, X, X, None, None, [], 2), "residual came with skip"),
    ],
)
def test_the_op_itself_refuses_what_would_be_read_out_of_bounds(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        NATIVE.modulated_group_norm(*arguments, 1.0, 1e-5, True, 0.0, None)
    with pytest.raises(RuntimeError, match="seed"):
        NATIVE.modulated_group_norm(X, None, None, None, None, [], 2, 1.0, 1e-5, True, 0.5, torch.arange(3))
    with pytest.raises(RuntimeError, match="residual_scale is 0.5 without a residual"):
        NATIVE.modulated_group_norm(X, None, None, None, None, [], 2, 1.0, 1e-5, True, 0.0, None, 0.5)
    with pytest.raises(RuntimeError, match="residual_scale is 0.5 with skip"):
        NATIVE.modulated_group_norm_backward(
            X, None, X[:, :4], X[:, 4:], None, None, [], ROW[:, :2], ROW[:, :2], 1.0, True, 0.0, None, 0.5
        )
    with pytest.raises(RuntimeError, match="rstd"):
        NATIVE.modulated_group_norm_backward(
            X, None, X, None, None, None, [], ROW[:, :2], ROW[:1, :2], 1.0, True, 0.0, None
        )


def test_a_missing_library_is_said_and_not_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_native, "_library", None)
    monkeypatch.setattr(_native, "_reason", "")
    monkeypatch.setattr(_native, "do_without_native", lambda: None)  # which would outlive this test
    monkeypatch.setattr(_native, "LIBRARY", tmp_path / "libsoda_kernels.so")
    monkeypatch.setattr(_native, "BUILD_NOTE", tmp_path / "native_build.txt")
    _native.load()
    assert str(_native.native_status()).startswith("no native CPU library: it was not built")
    _native.BUILD_NOTE.write_text("there was no C++ compiler\n")
    _native.load()
    assert str(_native.native_status()) == "no native CPU library: there was no C++ compiler"
    _native.LIBRARY.write_text("no library")
    _native.load()
    assert str(_native.native_status()).startswith("no native CPU library: it does not load: ")
    with pytest.raises(ValueError, match="the native library is missing"):
        _native.use_isa("generic")


@pytest.mark.parametrize(("wanted", "outcome"), [("generic", "generic"), ("sse9", "SODA_CPU_ISA is 'sse9'; it must")])
def test_the_environment_variable_chooses_the_instruction_set(wanted: str, outcome: str) -> None:
    code = "from soda_kernels import _native; _native.load(); print(_native.native_status().isa)"
    finished = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, _native.ISA_VARIABLE: wanted}, capture_output=True, text=True,
        cwd=Path(_native.__file__).parents[1], check=False,
    )  # fmt: skip
    assert outcome in finished.stdout + finished.stderr


def test_a_large_pair_whose_parts_are_no_whole_lines() -> None:
    """Results of this size are written past the caches, which takes addresses on whole vectors."""
    h, skip = (
        torch.randn(1, channels, 256, 256).to(memory_format=torch.channels_last) for channels in (20, 12)
    )  # fmt: skip
    arguments = (h, skip, None, None, None, [], 4, 1.0, 1e-5, True, 0.0, None)
    actual, expected = (ops.modulated_group_norm(*arguments)[0] for ops in (NATIVE, REFERENCE))
    assert torch.allclose(actual, expected, rtol=0, atol=1e-5)
