"""Attention: values and gradients against the plain composition, in fp64 and in the tolerance rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from soda_kernels import attention, attention_qkvpacked, register_flop_formulas, use_backend
from tests.kernels import compositions
from tests.numerics import assert_accurate, assert_exact

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def random_qkv(
    batch: int, queries: int, keys: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    lengths = (queries, keys, keys)
    return [torch.randn(batch, n, heads, head_dim).to(dtype).requires_grad_() for n in lengths]


def assert_equal_to_composition(qkv: list[Tensor], scale: float | None = None, do: Tensor | None = None) -> None:
    actual, exact = attention(*qkv, scale=scale), compositions.attention(*qkv, scale=scale)
    assert actual.is_contiguous()
    assert_exact(actual, exact, "o")
    do = torch.randn_like(actual) if do is None else do
    gradients = zip("qkv", torch.autograd.grad(actual, qkv, do), torch.autograd.grad(exact, qkv, do), strict=True)
    for name, gradient, exact_gradient in gradients:
        assert_exact(gradient, exact_gradient, f"d{name}")


@pytest.mark.parametrize("head_dim", [8, 32, 40, 80])
@pytest.mark.parametrize("length", [1, 17, 49, 64])
def test_self_attention_equals_the_composition_in_fp64(length: int, head_dim: int) -> None:
    assert_equal_to_composition(random_qkv(2, length, length, 3, head_dim))


@pytest.mark.parametrize(("queries", "keys"), [(1, 17), (17, 1), (64, 49), (49, 77), (0, 5)])
@pytest.mark.parametrize("scale", [None, 0.3, -1.0, 0.0])
def test_cross_attention_equals_the_composition_in_fp64(queries: int, keys: int, scale: float | None) -> None:
    assert_equal_to_composition(random_qkv(2, queries, keys, 2, 8), scale)


@settings(max_examples=20)
@given(
    batch=st.integers(0, 3), queries=st.integers(1, 20), keys=st.integers(1, 20), heads=st.integers(1, 4),
    head_dim=st.integers(1, 24),
)  # fmt: skip
def test_any_shape(batch: int, queries: int, keys: int, heads: int, head_dim: int) -> None:
    assert_equal_to_composition(random_qkv(batch, queries, keys, heads, head_dim))


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(attention, random_qkv(1, 3, 4, 2, 3))


@DTYPES
@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(17, 17, 40), (64, 64, 32), (49, 17, 80), (1, 64, 8)])
def test_low_precision_is_within_the_tolerance_rule(dtype: torch.dtype, queries: int, keys: int, head_dim: int) -> None:
    qkv = random_qkv(2, queries, keys, 3, head_dim, dtype)
    double = [tensor.detach().double().requires_grad_() for tensor in qkv]
    with use_backend("reference"):
        actual = attention(*qkv)
    composed, exact = compositions.attention(*qkv), compositions.attention(*double)
    assert actual.dtype == dtype
    assert_accurate(actual, composed, exact, "o")
    do = torch.randn_like(actual)
    results = zip(
        "qkv",
        torch.autograd.grad(actual, qkv, do),
        torch.autograd.grad(composed, qkv, do),
        torch.autograd.grad(exact, double, do.double()),
        strict=True,
    )
    for name, gradient, plain, exact_gradient in results:
        assert gradient.dtype == dtype
        assert_accurate(gradient, plain, exact_gradient, f"d{name}")


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.bfloat16, 40), (torch.float16, 40), (torch.float64, 40), (torch.float32, 12)],
    ids=str,
)
def test_where_no_native_kernel_is_it_is_pytorchs_own_bit_for_bit(dtype: torch.dtype, head_dim: int) -> None:
    qkv = random_qkv(2, 49, 17, 3, head_dim, dtype)
    actual = attention(*qkv, scale=0.2)
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), scale=0.2).transpose(1, 2)
    do = torch.randn_like(actual)
    assert torch.equal(actual, theirs)
    for own, other in zip(torch.autograd.grad(actual, qkv, do), torch.autograd.grad(theirs, qkv, do), strict=True):
        assert torch.equal(own, other)


def test_a_packed_projection_is_not_copied_by_pytorchs_kernel() -> None:
    qkv = torch.randn(2, 16, 3, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.profiler.profile() as profile:
        o = attention_qkvpacked(qkv)
    copies = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::cat", "aten::stack"}
    assert copies.isdisjoint(event.name for event in profile.events())
    do = torch.randn_like(o)
    with torch.profiler.profile() as profile:
        o.backward(do)
    # The three gradients meet in one packed tensor, and nothing else moves.
    moved = [event.name for event in profile.events() if event.name in copies]
    assert moved == ["aten::stack", "aten::cat"]


@DTYPES
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_logits_of_ten_thousand_give_no_nan(dtype: torch.dtype, sign: float) -> None:
    """Four keys at the one end and one at the other: the values' mean of the four, or the one's value."""
    q = torch.full((1, 2, 1, 4), 100.0, dtype=dtype).requires_grad_()
    k = torch.full((1, 5, 1, 4), 25.0 * sign, dtype=dtype)
    k[0, 3] *= -1
    k.requires_grad_()
    v = torch.randn(1, 5, 1, 4).to(dtype).requires_grad_()
    o = attention(q, k, v, scale=1.0)
    winners = [0, 1, 2, 4] if sign > 0 else [3]
    expected = v[0, winners, 0].double().mean(0)
    assert_accurate(o[0, 0, 0], expected.to(dtype), expected, "o")
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(o.sum(), (q, k, v)))


def test_strides_are_free() -> None:
    heads_first = torch.randn(2, 3, 17, 8).double().transpose(1, 2)
    sliced = torch.randn(2, 40, 3, 16).double()[:, ::2, :, ::2]
    expanded = torch.randn(2, 1, 3, 1).double().expand(2, 20, 3, 8)
    qkv = [tensor.requires_grad_() for tensor in (heads_first, sliced, expanded)]
    assert_equal_to_composition(qkv, do=torch.randn(8, 3, 17, 2).double().permute(3, 2, 1, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("packing", ["dense", "sliced"])
def test_packed_equals_unpacked(packing: str, dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 17, 3, 2, 40).to(dtype)
    if packing == "sliced":
        qkv = torch.randn(4, 17, 6, 2, 40).to(dtype)[::2, :, 1::2]
    qkv.requires_grad_()
    packed, unpacked = attention_qkvpacked(qkv, scale=0.2), attention(*qkv.unbind(2), scale=0.2)
    assert packed.is_contiguous()
    assert torch.equal(packed, unpacked)
    do = torch.randn(2, 17, 2, 40).to(dtype)
    (gradient,) = torch.autograd.grad(packed, qkv, do)
    assert gradient.is_contiguous()
    assert torch.equal(gradient, torch.autograd.grad(unpacked, qkv, do)[0])


def test_a_gradient_for_some_arguments_only() -> None:
    q, k, v = random_qkv(1, 5, 5, 2, 8)
    expected = torch.autograd.grad(attention(q, k, v).sum(), k)[0]
    (gradient,) = torch.autograd.grad(attention(q.detach(), k, v.detach()).sum(), k)
    assert torch.equal(gradient, expected)


def test_the_flop_counter_counts_two_products_forward_and_five_backward() -> None:
    qkv = random_qkv(2, 5, 7, 3, 8, torch.float32)
    product = 2 * 2 * 3 * 5 * 7 * 8
    register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        o = attention(*qkv)
    assert counter.get_total_flops() == 2 * product
    with counter:
        o.sum().backward()
    assert counter.get_total_flops() == 5 * product
    packed = torch.randn(2, 5, 3, 3, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        attention_qkvpacked(packed).sum().backward()
    assert counter.get_total_flops() == 7 * (2 * 2 * 3 * 5 * 5 * 8)
