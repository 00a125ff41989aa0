"""Modulated group norm: values and every gradient against the plain composition, in fp64 and in the tolerance rule."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from soda_kernels import ModulatedGroupNorm, modulated_group_norm, use_backend
from tests.kernels import compositions
from tests.kernels.norm_problems import FORMS, LAYOUTS, SHAPES, Form, problem
from tests.numerics import assert_accurate, assert_exact, ulp


def cases() -> Iterator[Any]:
    """Every shape in its layouts, with a form that turns over the shapes; and every form on one shape."""
    for index, (shape, groups) in enumerate(SHAPES):
        last = {4: ["nhwc"], 5: ["ndhwc"]}.get(len(shape), []) if shape[0] else []  # an empty tensor has every layout
        for name in ["nchw", *last]:
            for form in (FORMS[index % len(FORMS)], FORMS[3], FORMS[7]):
                yield pytest.param(shape, groups, name, form, id=f"{'x'.join(map(str, shape))}-g{groups}-{name}-{form}")
    for form in FORMS:
        for name in ("nchw", "nhwc"):
            yield pytest.param((3, 12, 5, 3), 4, name, form, id=f"3x12x5x3-g4-{name}-{form}")


@pytest.mark.parametrize(("shape", "num_groups", "layout", "form"), list(cases()))
def test_values_and_gradients_equal_the_composition_in_fp64(
    shape: tuple[int, ...], num_groups: int, layout: str, form: Form
) -> None:
    case = problem(shape, num_groups, layout, form)
    actual, exact = case.fused(), case.composed()
    output_gradients = [torch.randn_like(out) for out in actual]
    actual_gradients = case.gradients(actual, output_gradients)
    exact_gradients = case.gradients(exact, output_gradients)
    for out, reference in zip(actual, exact, strict=True):
        assert_exact(out, reference)
        assert out.is_contiguous(memory_format=LAYOUTS[layout])
    for name, gradient in exact_gradients.items():
        assert_exact(actual_gradients[name], gradient, name)
    for name in ("x", "skip", "residual"):
        assert name not in actual_gradients or actual_gradients[name].is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("form", [FORMS[1], FORMS[3], FORMS[6], FORMS[7]], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_low_precision_is_within_the_tolerance_rule(
    dtype: torch.dtype, parameter_dtype: torch.dtype, layout: str, form: Form
) -> None:
    case = problem((3, 24, 9, 7), 4, layout, form, dtype, parameter_dtype)
    actual, composed = case.fused(), case.composed()
    output_gradients = [torch.randn_like(out) for out in actual]
    double = case.to(torch.float64)
    exact = double.composed()
    for out, plain, reference in zip(actual, composed, exact, strict=True):
        assert out.dtype == dtype
        assert_accurate(out, plain, reference)
    gradients, plain_gradients = case.gradients(actual, output_gradients), case.gradients(composed, output_gradients)
    exact_gradients = double.gradients(exact, [gradient.double() for gradient in output_gradients])
    for name, gradient in gradients.items():
        assert gradient.dtype == case.leaves[name].dtype
        assert_accurate(gradient, plain_gradients[name], exact_gradients[name], name)


@pytest.mark.parametrize("form", [FORMS[3], FORMS[6], FORMS[7]], ids=str)
def test_gradcheck(form: Form) -> None:
    case = problem((2, 4, 2, 2), 2, "nchw", form)
    names = list(case.leaves)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return replace(case, leaves=dict(zip(names, leaves, strict=True))).fused()

    assert torch.autograd.gradcheck(call, tuple(case.leaves.values()))


@settings(max_examples=25)
@given(
    batch=st.integers(0, 4),
    groups=st.integers(1, 5),
    group_channels=st.integers(1, 4),
    space=st.lists(st.integers(1, 5), max_size=3),
    form=st.sampled_from(FORMS),
    channels_last=st.booleans(),
)
def test_any_shape(
    batch: int, groups: int, group_channels: int, space: list[int], form: Form, channels_last: bool
) -> None:
    layout = {2: "nhwc", 3: "ndhwc"}.get(len(space), "nchw") if channels_last else "nchw"
    if groups * group_channels == 1:
        form = replace(form, pair=False)
    case = problem((batch, groups * group_channels, *space), groups, layout, form)
    actual, exact = case.fused(), case.composed()
    output_gradients = [torch.randn_like(out) for out in actual]
    assert_exact(actual[0], exact[0])
    exact_gradients = case.gradients(exact, output_gradients)
    for name, gradient in case.gradients(actual, output_gradients).items():
        # A group of one value has variance 0, where 1 / sqrt(eps) = 316 amplifies the rounding of zeros.
        assert_exact(gradient, exact_gradients[name], name, tolerance=1e-10 if group_channels == 1 else 1e-12)


def strided(kind: str) -> Tensor:
    """A (4, 8, 5, 6) view that is dense in no layout."""
    if kind == "sliced":
        return torch.randn(4, 16, 5, 12, dtype=torch.float64)[:, ::2, :, ::2]
    if kind == "channel-sliced-nhwc":
        return torch.randn(4, 20, 5, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)[:, 4:12]
    if kind == "expanded":
        return torch.randn(1, 8, 1, 6, dtype=torch.float64).expand(4, 8, 5, 6)
    return torch.randn(4, 8, 6, 5, dtype=torch.float64).mT


@pytest.mark.parametrize("kind", ["sliced", "channel-sliced-nhwc", "expanded", "transposed"])
@pytest.mark.parametrize("form", [FORMS[3], FORMS[6], replace(FORMS[7], dropout_p=0.0)], ids=str)
def test_non_contiguous_inputs(kind: str, form: Form) -> None:
    case = problem((4, 8, 5, 6), 4, "nchw", form)
    images = {"x": strided(kind)}
    if form.pair:
        images = {"x": strided(kind)[:, :3], "skip": strided(kind)[:, 3:]}
    if form.residual:
        images["residual"] = strided("sliced")
    parameters = {
        name: torch.randn(4, 16, dtype=torch.float64)[:, ::2] if leaf.ndim == 2
        else torch.randn(16, dtype=torch.float64)[::2]
        for name, leaf in case.leaves.items()
        if leaf.ndim < 3
    }  # fmt: skip
    case.leaves = {name: leaf.requires_grad_() for name, leaf in (images | parameters).items()}
    actual, exact = case.fused(), case.composed()
    output_gradients = [strided("sliced") for _ in actual]
    assert_exact(actual[0], exact[0])
    assert actual[0].is_contiguous()
    exact_gradients = case.gradients(exact, output_gradients)
    for name, gradient in case.gradients(actual, output_gradients).items():
        assert_exact(gradient, exact_gradients[name], name)


@pytest.mark.parametrize("form", [FORMS[3], FORMS[6], FORMS[7]], ids=str)
@pytest.mark.parametrize(("layout", "other"), [("nhwc", "nchw"), ("nchw", "nhwc")])
def test_gradient_in_the_other_layout(layout: str, other: str, form: Form) -> None:
    case = problem((3, 12, 5, 3), 4, layout, form)
    actual, exact = case.fused(), case.composed()
    output_gradients = [torch.randn(3, 12, 5, 3).double().contiguous(memory_format=LAYOUTS[other]) for _ in actual]
    exact_gradients = case.gradients(exact, output_gradients)
    for name, gradient in case.gradients(actual, output_gradients).items():
        assert_exact(gradient, exact_gradients[name], name)
        assert gradient.ndim < 4 or gradient.is_contiguous(memory_format=LAYOUTS[layout])


def test_residual_in_another_layout_than_x() -> None:
    x = torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    residual = torch.randn(2, 8, 3, 5)
    y, summed = modulated_group_norm(x, 4, residual=residual)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert summed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(summed, x + residual)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("scale", [2**-0.5, -3.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_scaled_sum_is_torchs_in_fp32_rounded_to_the_dtype(
    dtype: torch.dtype, scale: float, layout: str, backend: str
) -> None:
    x, residual = (torch.randn(2, 8, 9, 5).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    with use_backend(backend):
        y, summed = modulated_group_norm(x, 4, residual=residual, residual_scale=scale)
        assert torch.equal(summed, ((x.to(wide) + residual.to(wide)) * scale).to(dtype))
        assert torch.equal(y, modulated_group_norm(summed, 4))
        assert y.stride() == summed.stride() == x.stride()


class Unread(torch.autograd.Function):
    """Pass tensors on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return tuple(None for _ in gradients)


@pytest.mark.parametrize("read", [(0,), (1,), (0, 1), ()], ids=["y", "sum", "both", "none"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("form", [FORMS[5], FORMS[6]], ids=str)
def test_gradients_where_an_output_is_not_read(form: Form, layout: str, read: tuple[int, ...]) -> None:
    case = problem((3, 12, 5, 3), 4, layout, form)
    for other in ("nchw", "nhwc"):  # of the gradient
        weights = [torch.randn(3, 12, 5, 3).double().contiguous(memory_format=LAYOUTS[other]) for _ in range(2)]
        found = []
        for outputs in (case.fused(), case.composed()):
            for leaf in case.leaves.values():
                leaf.grad = None
            loss = sum((outputs[i] * weights[i]).sum() for i in read)
            if not read:  # its gradient is not there, rather than zero
                loss = sum(output.sum() for output in Unread.apply(*outputs))
            loss.backward()
            found.append({name: leaf.grad for name, leaf in case.leaves.items()})
        for name, leaf in case.leaves.items():
            actual, expected = (gradients[name] for gradients in found)
            assert actual is not None and actual.stride() == leaf.stride()
            assert_exact(actual, torch.zeros_like(leaf) if expected is None else expected, name)


def test_gradients_of_what_is_not_read_are_not_computed() -> None:
    """Neither zeros of an image's size for the sum, nor the norm's backward for the sum alone."""
    called: list[tuple[str, tuple[Any, ...]]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append((func._schema.name, args))
            return func(*args, **(kwargs or {}))

    weight = torch.randn(8, requires_grad=True)
    for read in range(2):
        x, residual = (torch.randn(2, 8, 5, 3, requires_grad=True) for _ in range(2))
        output, gradient = modulated_group_norm(x, 4, weight, residual=residual)[read], torch.ones(2, 8, 5, 3)
        called.clear()
        with Recorder():
            torch.autograd.grad(output, (x, residual, weight), gradient)
        norms = [args for name, args in called if name == "soda_kernels::modulated_group_norm_backward"]
        if read == 0:
            assert [args[1] for args in norms] == [None]
        else:
            assert norms == []
            assert [args[0].shape for name, args in called if "zero" in name] == [weight.shape]


def test_compiled_gradients_where_an_output_is_not_read() -> None:
    torch._dynamo.reset()
    for read in range(2):

        def loss(x: Tensor, residual: Tensor, weight: Tensor, read: int = read) -> Tensor:
            return modulated_group_norm(x, 4, weight, residual=residual, residual_scale=0.7)[read].square().sum()

        leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 8, 5, 3), (2, 8, 5, 3), (8,))]
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        actual, expected = (torch.autograd.grad(each(*leaves), leaves, allow_unused=True) for each in (compiled, loss))
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(2, 8, 5, 3), (2, 32, 16, 16), (3, 8, 65), (3, 8, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_a_mean_far_above_the_deviation_keeps_its_digits(shape: tuple[int, ...], channels_last: bool) -> None:
    x = 10_000 + 0.2 * (torch.rand(shape) - 0.5)
    if channels_last and len(shape) > 3:
        x = x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    x.requires_grad_()
    y = modulated_group_norm(x, 4, activation=None)
    double = x.detach().double().requires_grad_()
    exact, _ = compositions.modulated_group_norm(double, 4, activation=None)
    # What an fp32 mean two ulp off does to values whose standard deviation is 0.2 / sqrt(12).
    tolerance = 2 * float(ulp(torch.tensor(10_000.0), torch.float32)) / (0.2 / 12**0.5)
    assert (y - exact).abs().max() < tolerance
    dy = torch.randn(shape)
    gradient, exact_gradient = torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(exact, double, dy.double())[0]
    assert (gradient - exact_gradient).norm() < tolerance * exact_gradient.norm()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_constant_input_gives_the_shift_and_finite_gradients(layout: str) -> None:
    x = torch.full((2, 8, 3, 5), 7.25).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    shift = torch.randn(2, 8)
    y = modulated_group_norm(x, 2, modulations=[(torch.randn(2, 8), shift)], activation=None)
    assert torch.equal(y, shift.view(2, 8, 1, 1).expand_as(y))
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_constant_that_no_mean_can_equal_gives_the_shift(layout: str, backend: str) -> None:
    x = torch.full((2, 12, 8, 9), 10_000.1).contiguous(memory_format=LAYOUTS[layout])
    shift = torch.randn(2, 12)
    with use_backend(backend):
        y = modulated_group_norm(x, 4, modulations=[(torch.randn(2, 12), shift)], activation=None)
    assert (y - shift.view(2, 12, 1, 1)).abs().max() < 1e-6


def test_no_modulation_and_no_activation_is_group_norm() -> None:
    x, weight, bias = torch.randn(2, 8, 5, 3), torch.randn(8), torch.randn(8)
    expected = nn.functional.group_norm(x.double(), 2, weight.double(), bias.double(), eps=1e-3)
    actual = modulated_group_norm(x, 2, weight, bias, activation=None, eps=1e-3)
    assert_accurate(actual, nn.functional.group_norm(x, 2, weight, bias, eps=1e-3), expected)


def test_zero_modulations_are_the_identity() -> None:
    x, zero = torch.randn(2, 8, 5, 3), torch.zeros(2, 8)
    assert torch.equal(modulated_group_norm(x, 2, modulations=[(zero, zero), (zero, zero)]), modulated_group_norm(x, 2))


def test_a_bf16_scale_keeps_its_digits_beside_the_offset() -> None:
    """1 + 2^-9 is 1 in bf16: formed there, the modulation would be lost."""
    x = torch.randn(2, 8, 5, 3)
    scale, shift = torch.full((2, 8), 2.0**-9, dtype=torch.bfloat16), torch.zeros(2, 8, dtype=torch.bfloat16)
    plain = modulated_group_norm(x, 2, activation=None)
    assert torch.allclose(modulated_group_norm(x, 2, modulations=[(scale, shift)], activation=None) / plain - 1,
                          torch.tensor(2.0**-9), rtol=1e-3)  # fmt: skip


def test_gradients_are_the_same_bits_each_time() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        case = problem((4, 12, 5, 3), 4, "nhwc", FORMS[6], torch.bfloat16)
        outputs = case.fused()
        results.append(case.gradients(outputs, [torch.ones_like(out) for out in outputs]))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_gradients_of_x_and_residual_do_not_share_memory() -> None:
    x, residual = (torch.randn(2, 8, 3, 3, requires_grad=True) for _ in range(2))
    y, summed = modulated_group_norm(x, 4, residual=residual)
    (y + summed).sum().backward()
    assert torch.equal(x.grad, residual.grad)
    assert x.grad.data_ptr() != residual.grad.data_ptr()


# Dropout


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
def test_keep_rate_is_within_binomial_error(dropout_p: float) -> None:
    factor = compositions.dropout_factor((4, 8, 64, 64), dropout_p, seed=3)
    kept, num = int(factor.count_nonzero()), factor.numel()
    rate = 1 - round(dropout_p * 65536) / 65536
    assert abs(kept - num * rate) < 4 * (num * rate * (1 - rate)) ** 0.5
    assert torch.unique(factor).tolist() == pytest.approx([0.0, 1 / rate], rel=1e-15)


def test_dropout_scale_is_not_rounded_to_the_images_dtype() -> None:
    """In bf16, 1 / 0.9 would be 0.16% low in every element."""
    bias = 1 + torch.arange(128.0) / 128  # every bf16 number from 1 to 2
    x = torch.zeros(1, 128, 64, dtype=torch.bfloat16)
    y = modulated_group_norm(x, 4, None, bias, activation=None, dropout_p=0.1, seed=0)
    factor = compositions.dropout_factor(x.shape, 0.1, seed=0)
    assert torch.equal(y, (bias.double().view(1, 128, 1) * factor).bfloat16())


@pytest.mark.parametrize("dropout_p", [1e-7, 1 - 1e-7])
def test_dropout_probabilities_at_the_ends_stay_finite(dropout_p: float) -> None:
    factor = compositions.dropout_factor((2, 8, 16), dropout_p, seed=0)
    assert factor.isfinite().all()


def test_dropout_mask_does_not_depend_on_the_layout() -> None:
    x = torch.randn(3, 8, 5, 3)
    y = modulated_group_norm(x, 4, dropout_p=0.5, seed=1)
    last = modulated_group_norm(x.contiguous(memory_format=torch.channels_last), 4, dropout_p=0.5, seed=1)
    assert torch.equal(y == 0, last == 0)


def test_one_seed_for_the_batch_gives_each_sample_its_own_mask() -> None:
    factor = compositions.dropout_factor((4, 8, 8, 8), 0.5, seed=1)
    assert not any(torch.equal(factor[i], factor[j]) for i in range(4) for j in range(i))
    assert torch.equal(factor, compositions.dropout_factor((4, 8, 8, 8), 0.5, torch.tensor(1)))
    assert not torch.equal(factor, compositions.dropout_factor((4, 8, 8, 8), 0.5, seed=2))
    assert not torch.equal(factor, compositions.dropout_factor((4, 8, 8, 8), 0.5, seed=1 + (1 << 40)))


def test_a_seed_for_each_sample_makes_masks_independent_of_the_position() -> None:
    seeds = torch.tensor([11, 2**40 + 11, -3, 11])
    factor = compositions.dropout_factor((4, 8, 8, 8), 0.5, seeds)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(compositions.dropout_factor((3, 8, 8, 8), 0.5, seeds[order]), factor[order])
    assert torch.equal(factor[0], factor[3])
    assert not torch.equal(factor[0], factor[1])
    assert not torch.equal(factor[0], factor[2])


# Module


def test_module_has_group_norms_state_dict_and_values() -> None:
    stock = nn.GroupNorm(4, 8)
    with torch.no_grad():
        stock.weight.normal_()
        stock.bias.normal_()
    module = ModulatedGroupNorm(4, 8, activation=None)
    module.load_state_dict(stock.state_dict())
    x = torch.randn(2, 8, 5, 3)
    torch.testing.assert_close(module(x), stock(x))
    assert isinstance(module, nn.GroupNorm)
    assert module.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize(
    "keywords", [{"eps": -1.0}, {"eps": 10**400}, {"scale_offset": "one"}, {"dropout_p": 1.0}], ids=str
)
def test_a_module_refuses_numbers_when_it_is_made(keywords: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(keywords))} is "):
        ModulatedGroupNorm(4, 8, **keywords)


def test_module_drops_in_training_mode_only() -> None:
    module = ModulatedGroupNorm(4, 8, dropout_p=0.5)
    x = torch.randn(2, 8, 5, 3)
    scale, shift = torch.randn(2, 8), torch.randn(2, 8)
    assert int((module(x, (scale, shift), seed=0) == 0).sum()) > 10
    expected = modulated_group_norm(x, 4, module.weight, module.bias, [(scale, shift)])
    assert torch.equal(module.eval()(x, (scale, shift)), expected)
    y, summed = module(x, (scale, shift), residual=x, residual_scale=1.5)
    assert torch.equal(summed, 3 * x)


def test_module_prints_copies_pickles_and_lives_on_meta() -> None:
    module = ModulatedGroupNorm(4, 8, dropout_p=0.5, affine=False)
    assert "dropout_p=0.5" in repr(module)
    assert copy.deepcopy(module).scale_offset == pickle.loads(pickle.dumps(module)).scale_offset == 1.0
    meta = ModulatedGroupNorm(4, 8, device="meta", dtype=torch.bfloat16)
    assert meta.weight.is_meta
    assert meta(torch.empty(2, 8, 3, device="meta")).shape == (2, 8, 3)
