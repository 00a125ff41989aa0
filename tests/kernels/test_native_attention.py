"""The native CPU kernels of attention in each instruction set here, and what they leave to PyTorch's."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from soda_kernels import _native, attention, attention_qkvpacked, explain
from tests.kernels import compositions
from tests.numerics import assert_accurate_in_norm

_native.load()
# Not in silence where it could be built: tests/packaging/test_native_build.py fails there.
pytestmark = pytest.mark.skipif(not _native.native_status().available, reason=str(_native.native_status()))

# Batch, queries, keys, heads, head dim: one query, one key, keys that fill no vector, panels of every width, head dims
# that no wide vector fills, several blocks of 256 keys, a last one of one key.
SHAPES = [
    (2, 1, 17, 3, 8),
    (3, 17, 2, 2, 32),
    (2, 64, 3, 2, 24),
    (2, 49, 77, 3, 40),
    (1, 100, 257, 2, 64),
    (1, 33, 513, 2, 16),
    (1, 30, 1100, 1, 48),
    (1, 65, 40, 1, 256),
    (1, 13, 40, 2, 320),
]
NAMES = ("o", "dq", "dk", "dv")


def problem(shape: tuple[int, ...]) -> list[Tensor]:
    """q, k, v and dO."""
    batch, queries, keys, heads, head_dim = shape
    torch.manual_seed(sum(shape))
    return [torch.randn(batch, length, heads, head_dim) for length in (queries, keys, keys, queries)]


def results(tensors: list[Tensor], function: Callable[..., Tensor] = attention, **options: Any) -> list[Tensor]:
    """o, dq, dk and dv."""
    *qkv, do = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    o = function(*leaves, **options)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def backends(tensors: list[Tensor]) -> set[str]:
    """Who runs forward and backward."""

    def both(*qkv: Tensor) -> None:
        leaves = [tensor.detach().requires_grad_() for tensor in qkv[:3]]
        torch.autograd.grad(attention(*leaves), leaves, qkv[3])

    return {choice.backend for choice in explain(both, *tensors).choices}


@pytest.mark.parametrize("factor", [None, -1.5, 0.0], ids=["usual scale", "negative scale", "no scale"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(isa: str, shape: tuple[int, ...], factor: float | None) -> None:
    tensors = problem(shape)
    scale = None if factor is None else factor * shape[-1] ** -0.5
    assert backends(tensors) == {"native"}
    with _native.poisoned_results() as poisoned:
        ours = results(tensors, scale=scale)
    assert poisoned == [5], "the library made all results"
    plain = results(tensors, compositions.attention, scale=scale)
    exact = results([tensor.double() for tensor in tensors], compositions.attention, scale=scale)
    for name, *each in zip(NAMES, ours, plain, exact, strict=True):
        assert each[0].dtype == torch.float32 and each[0].is_contiguous()
        assert_accurate_in_norm(*each, name)


def test_a_single_key(isa: str) -> None:
    """Whose P is 1: dq and dk are 0 but for the rounding of dP and delta, which are the same number."""
    tensors = problem((3, 17, 1, 2, 32))
    o, dq, dk, dv = results(tensors)
    torch.testing.assert_close(o, tensors[2].expand_as(o), rtol=1e-6, atol=0)
    torch.testing.assert_close(dv, tensors[3].sum(1, keepdim=True))
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[6]], ids=str)
def test_the_log_of_the_sums(isa: str, shape: tuple[int, ...]) -> None:
    q, k, v, _ = problem(shape)
    _, lse = torch.ops.soda_kernels.attention(q, k, v, 0.2, None)
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k.double()) * 0.2
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_of_ten_thousand_and_their_opposites(isa: str, sign: float) -> None:
    """Four keys at the one end and one at the other: the values' mean of the four, or the one's value."""
    q, k = torch.full((1, 2, 1, 8), 100.0), torch.full((1, 5, 1, 8), 12.5 * sign)
    k[:, 3] *= -1
    v = torch.randn(1, 5, 1, 8)
    o, *gradients = results([q, k, v, torch.ones_like(q)], scale=1.0)
    expected = v[0, [0, 1, 2, 4], 0].mean(0) if sign > 0 else v[0, 3, 0]
    torch.testing.assert_close(o[0, 0, 0], expected, rtol=0, atol=1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, -1, 0x7F800000], ids=hex)  # three NaNs, inf
def test_what_is_not_finite_stays_in_its_head(isa: str, bits: int) -> None:
    tensors = problem((2, 20, 600, 2, 16))
    clean = results(tensors)
    tensors[1][1, 7, 0, 3:4].view(torch.int32).fill_(bits)
    value = float(tensors[1][1, 7, 0, 3])
    found = results(tensors)
    for name, dirty, before in zip(NAMES, found, clean, strict=True):
        assert torch.equal(dirty[0], before[0]) and torch.equal(dirty[1, :, 1], before[1, :, 1]), name
    reached = tensors[0][1, :, 0, 3] > 0 if value == float("inf") else torch.ones(20, dtype=torch.bool)
    assert found[0][1, reached, 0].isnan().all(), "every query whose greatest score is that key's"
    assert found[0][1, ~reached, 0].isfinite().all(), "none that the key is infinitely far from"
    assert all(found[i][1, reached if i == 1 else ..., 0].isnan().any() for i in (1, 2, 3)), "some of every gradient"


def test_a_first_block_of_keys_that_are_infinitely_far_weighs_nothing(isa: str) -> None:
    q, k, v, _ = problem((1, 9, 300, 1, 8))
    q, k[:, :256] = q.abs().clamp_min(0.1) * 1e20, -1e20
    k[:, 256:] *= 1e-20
    o = attention(q, k, v)
    torch.testing.assert_close(o, attention(q, k[:, 256:], v[:, 256:]))
    nothing, lse = torch.ops.soda_kernels.attention(q, k[:, :256], v[:, :256], 1.0, None)
    assert nothing.isnan().all() and lse.eq(-float("inf")).all()


@pytest.mark.parametrize("shape", [(1, 100, 257, 1, 64), (3, 49, 600, 3, 16)], ids=str)
def test_the_same_bits_for_every_number_of_threads_and_every_repetition(shape: tuple[int, ...]) -> None:
    tensors, threads = problem(shape), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append(results(tensors))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    tensors = problem((6, 49, 77, 3, 40))
    parts = [results([tensor[i : i + 2] for tensor in tensors]) for i in range(0, 6, 2)]
    for whole, *each in zip(results(tensors), *parts, strict=True):
        assert torch.equal(whole, torch.cat(each))


def test_rows_may_lie_anywhere() -> None:
    heads_first = torch.randn(2, 3, 17, 8).transpose(1, 2)
    sliced = torch.randn(2, 40, 6, 24)[:, ::2, ::2, 8:16]
    expanded = torch.randn(2, 1, 3, 8).expand(2, 20, 3, 8)
    tensors = [heads_first, sliced, expanded, torch.randn(2, 3, 17, 8).transpose(1, 2)]
    assert backends(tensors) == {"native"}
    for ours, dense in zip(results(tensors), results([tensor.contiguous() for tensor in tensors]), strict=True):
        assert torch.equal(ours, dense)


@pytest.mark.parametrize("packing", ["dense", "sliced"])
def test_a_packed_projection_is_read_and_its_gradient_written_in_place(packing: str) -> None:
    qkv = torch.randn(2, 17, 3, 2, 40)
    if packing == "sliced":
        qkv = torch.randn(4, 17, 6, 2, 40)[::2, :, 1::2]
    do = torch.randn(2, 17, 2, 40)
    expected, *gradients = results([*qkv.unbind(2), do])
    qkv.requires_grad_()
    with torch.profiler.profile() as profile:
        o = attention_qkvpacked(qkv)
        (gradient,) = torch.autograd.grad(o, qkv, do)
    assert torch.equal(o, expected) and torch.equal(gradient, torch.stack(gradients, dim=2))
    moved = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::cat", "aten::stack"}
    assert moved.isdisjoint(event.name for event in profile.events())


def _every_other(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor), dim=-1).flatten(-2)[..., ::2]


NOT_NATIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": Tensor.bfloat16,
    "fp64": Tensor.double,
    "head dim 12": lambda tensor: tensor[..., :12],
    "numbers apart": _every_other,
}


@pytest.mark.parametrize("name", NOT_NATIVE)
def test_everything_else_is_pytorchs(name: str) -> None:
    tensors = [NOT_NATIVE[name](tensor) for tensor in problem((2, 17, 20, 3, 16))]
    assert backends(tensors) == {"torch"}
    for ours, plain in zip(results(tensors), results(tensors, compositions.attention), strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=5e-2 if name == "bf16" else 1e-5)


def test_a_gradient_whose_numbers_lie_apart() -> None:
    *qkv, do = problem((2, 17, 20, 3, 16))
    for apart in (_every_other(do), torch.ones(1, 1, 1, 1).expand_as(do)):
        assert backends([*qkv, apart]) == {"native"}
        for ours, dense in zip(results([*qkv, apart]), results([*qkv, apart.contiguous()]), strict=True):
            assert torch.equal(ours, dense)


def test_the_ops_themselves_refuse_what_would_be_read_beyond_its_end() -> None:
    q, k, v, do = problem((2, 17, 20, 3, 16))
    ops = torch.ops.soda_kernels
    o, lse = ops.attention(q, k, v, 0.2, None)
    for wrong in ((q, k[:1], v), (q, k, v[:, :, :1]), (q, k, v[:, :5]), (q[..., :8], k, v), (q, k[:, :0], v[:, :0])):
        with pytest.raises(RuntimeError):
            ops.attention(*wrong, 0.2, None)
    right = [do, q, k, v, o, lse]
    for index, part in ((0, do[:, :5]), (2, k[:1]), (3, v[:, :5]), (4, o[:1]), (5, lse[:, :1]), (5, lse[:, :, :2])):
        with pytest.raises(RuntimeError):
            ops.attention_backward(*right[:index], part, *right[index + 1 :], 0.2, None)
    qkv = torch.stack((q, q, q), dim=2)
    for wrong_do, wrong_o, wrong_lse in ((do[:, :5], o, lse), (do, o[:1], lse), (do, o, lse[:, :1])):
        with pytest.raises(RuntimeError):
            ops.attention_qkvpacked_backward(wrong_do, qkv, wrong_o, wrong_lse, 0.2, None)


def test_without_the_library_pytorchs_kernel_runs() -> None:
    code = textwrap.dedent(
        """
        import pathlib, torch
        exists = pathlib.Path.exists
        pathlib.Path.exists = lambda path: path.name != "libsoda_kernels.so" and exists(path)
        from soda_kernels import attention, explain, native_status
        assert not native_status().available
        q = torch.randn(2, 17, 3, 16, requires_grad=True)
        with torch.profiler.profile() as profile:
            attention(q, q, q).sum().backward()
        flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
        names = {event.name for event in profile.events()}
        assert {flash, flash + "_backward"} <= names, names
        print(*(choice.backend for choice in explain(attention, q, q, q).choices))
        """
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.stdout.split() == ["torch"], finished.stderr
