"""Who computes attention on a GPU: the table's choice, an argument's, and PyTorch's kernels behind the ops.

There need be no GPU: fake tensors stand on one, and PyTorch's own shape functions say what its kernels would return.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from soda_kernels import attention, attention_qkvpacked, explain, native_status, use_backend
from soda_kernels.attention import sdpa
from soda_kernels.attention.config import AttentionConfig, Problem, choose

VARIANTS = pytest.mark.parametrize("variant", ["cudnn", "flash"])
LONG = Problem(backward=False, pairs=64, queries=1024, keys=1024, head_dim=64, element_bytes=2)


def on_a_gpu(*lengths: int, head_dim: int = 64) -> list[Tensor]:
    return [torch.empty(2, length, 4, head_dim, dtype=torch.bfloat16, device="cuda") for length in lengths]


@VARIANTS
@pytest.mark.parametrize("lengths", [(300, 300), (300, 77)], ids=str)
def test_pytorchs_kernels_take_and_return_what_the_ops_do(variant: str, lengths: tuple[int, int]) -> None:
    queries, keys = lengths
    with FakeTensorMode():
        q, k, v = on_a_gpu(queries, keys, keys)
        o, lse = sdpa.forward(q, k, v, 0.1, variant)
        assert o.shape == q.shape and o.is_contiguous()
        assert lse.shape == (2, 4, queries) and lse.dtype == torch.float32
        for gradient, x in zip(sdpa.backward(o, q, k, v, o, lse, 0.1, variant), (q, k, v), strict=True):
            assert gradient.shape == x.shape and gradient.is_contiguous()


@VARIANTS
def test_a_packed_projection_is_copied_nowhere_on_the_way(variant: str) -> None:
    """They read its three parts where they lie, and write o as the projection that follows wants it."""
    with FakeTensorMode():
        qkv = torch.empty(2, 300, 3, 4, 64, dtype=torch.bfloat16, device="cuda")
        with torch.profiler.profile() as profile:
            sdpa.forward(*qkv.unbind(2), 0.1, variant)
    assert {"aten::copy_", "aten::clone"}.isdisjoint(event.name for event in profile.events())


def test_the_values_of_pytorchs_flash_attention() -> None:
    """The CPU's has the same arguments under another name, so that order and meaning are tested with numbers."""
    q, k, v, do = (torch.randn(2, length, 3, 40) for length in (49, 17, 17, 49))

    def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Any:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(query, key, value, scale=scale)

    def backward(
        grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, dropout_p: float,
        is_causal: bool, scale: float, **_: Any,
    ) -> Any:  # fmt: skip
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        return op(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, scale=scale)

    class Op:
        def __init__(self, function: Any) -> None:
            self.default = function

    with (
        patch.object(torch.ops.aten, "_scaled_dot_product_flash_attention", Op(forward)),
        patch.object(torch.ops.aten, "_scaled_dot_product_flash_attention_backward", Op(backward)),
    ):
        o, lse = sdpa.forward(q, k, v, 0.2, "flash")
        gradients = sdpa.backward(do, q, k, v, o, lse, 0.2, "flash")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with use_backend("reference"):
        expected = attention(*leaves, scale=0.2)
    torch.testing.assert_close(o, expected.detach())
    for gradient, other in zip(gradients, torch.autograd.grad(expected, leaves, do), strict=True):
        torch.testing.assert_close(gradient, other)


def explained(q: Tensor, backend: str | None = None) -> list[Any]:
    """What runs the forward and the backward of self-attention."""

    def run() -> None:
        o = attention(q, q, q, backend=backend)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], device=q.device)
        torch.ops.soda_kernels.attention_backward(o, q, q, q, o, lse, 0.1, backend)

    return list(explain(run).choices)


def test_explain_tells_of_the_backward_of_what_is_differentiated() -> None:
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    cpu = "native" if native_status().available else "torch"
    choices = explain(lambda: torch.autograd.grad(attention(q, q, q).sum(), q)).choices
    assert [(choice.op, choice.backend) for choice in choices] == [
        ("attention", cpu), ("attention_backward", cpu),
    ]  # fmt: skip


def test_explain_tells_who_runs_and_an_argument_overrides_the_table() -> None:
    with FakeTensorMode():
        q = torch.empty(16, 1024, 4, 64, dtype=torch.bfloat16, device="cuda")
    guessed = explained(q)
    table = {LONG.key: vars(AttentionConfig(variant="cudnn"))}
    with patch("soda_kernels._tuning.look_up", lambda family, key, device: table.get(key)):
        measured, own, flash = explained(q), explained(q, "triton"), explained(q, "flash")
    assert [(choice.op, choice.backend, choice.config["variant"]) for choice in measured] == [
        ("attention", "torch", "cudnn"), ("attention_backward", "triton", "two_kernels"),
    ]  # fmt: skip
    assert [choice.config["variant"] for choice in own] == ["online", "two_kernels"]
    assert [choice.config["variant"] for choice in flash] == ["flash", "flash"]
    assert measured[0].reason == f"{LONG.key} of cuda:0: measured"
    assert guessed[0].reason == own[0].reason == f"{LONG.key} of cuda:0: not measured, by heuristic"
    assert flash[0].reason == "asked for by `backend`"


def test_a_table_is_kept_from_what_it_did_not_measure() -> None:
    """Its keys say nothing of strides, and PyTorch's kernels want them in multiples of 16 bytes."""
    here = torch.device("cpu")
    with patch("soda_kernels._tuning.look_up", return_value=vars(AttentionConfig(variant="flash"))):
        assert choose(LONG, here).variant == "flash"
        assert choose(replace(LONG, copy_engine=False), here).variant == "flash"
        assert choose(replace(LONG, aligned=False), here).variant == "online"
        assert choose(LONG, here, "triton").variant == "online"
    assert choose(LONG, here).variant == "online"  # nothing was measured


@VARIANTS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.float(), "it takes bf16 and fp16, not float32"),
        (lambda q: q.double(), "it takes bf16 and fp16, not float64"),
        (lambda q: q.narrow(-1, 0, 20), "it takes head dims in multiples of 8, not 20"),
        (lambda q: q.transpose(1, 3), "it takes heads whose numbers lie together"),
    ],
    ids=["fp32", "fp64", "20 wide", "D outermost"],
)
def test_what_pytorchs_kernels_do_not_take_is_said(variant: str, change: Any, message: str) -> None:
    with FakeTensorMode():
        q = change(torch.empty(2, 64, 4, 64, dtype=torch.bfloat16, device="cuda"))
    with pytest.raises(ValueError, match=f"backend is '{variant}', which cannot run: {message}"):
        explain(lambda: attention(q, q, q, backend=variant))


def test_a_backend_that_cannot_be_had_is_refused_in_one_line() -> None:
    qkv = torch.randn(1, 5, 3, 2, 8)
    with pytest.raises(ValueError, match="backend is 'fast'; it must be one of"):
        attention_qkvpacked(qkv, backend="fast")
    with pytest.raises(ValueError, match="backend is 'flash'; on cpu there is one alone"):
        attention_qkvpacked(qkv, backend="flash")
    with pytest.raises(ValueError, match="backend is 'triton'; on cpu there is one alone"):
        attention(*qkv.unbind(2), backend="triton")
    with FakeTensorMode():
        q, k, v = on_a_gpu(5, 5, 5)
    with use_backend("reference"), pytest.raises(ValueError, match="inside use_backend"):
        attention(q, k, v, backend="cudnn")


def test_what_the_kernels_cannot_take_is_refused_where_a_backend_was_asked_for() -> None:
    from soda_kernels.attention import ops

    q = torch.empty(1, 5, 2, 300, device="meta")
    with pytest.raises(ValueError, match="backend is 'triton', which cannot run: the kernels take head dims up to 256"):
        ops._gpu_forward(q, q, q, 0.1, "triton")
    assert ops._unsupported(q, q, q) == "the kernels take head dims up to 256"
