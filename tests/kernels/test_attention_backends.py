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

from soda_kernels import attention, attention_qkvpacked, explain, use_backend
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


def test_explain_tells_who_runs_and_an_argument_overrides_the_table() -> None:
    table = {LONG.key: vars(AttentionConfig(variant="cudnn"))}

    def look_up(family: str, key: str, device: torch.device) -> Any:
        return table.get(key)

    def call(**options: Any) -> Any:
        with FakeTensorMode():
            q, k, v = (torch.empty(16, 1024, 4, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        with patch("torch._subclasses.fake_tensor.FakeTensorMode.from_tensor", lambda self, x: x):
            return explain(attention, q, k, v, **options).choices[0]

    with (
        patch("soda_kernels._tuning.look_up", look_up),
        patch("soda_kernels._tuning.has_copy_engine", lambda device: True),
        patch("soda_kernels._tuning.num_multiprocessors", lambda device: 132),
    ):
        measured, own, flash = call(), call(backend="triton"), call(backend="flash")
    assert (measured.backend, measured.config) == ("torch", {"variant": "cudnn"})
    assert (own.backend, own.config["variant"]) == ("triton", "online")
    assert (flash.backend, flash.config) == ("torch", {"variant": "flash"})
    assert "asked for" in flash.reason and LONG.key in measured.reason


def test_a_table_is_kept_from_what_it_did_not_measure() -> None:
    """Its keys say nothing of strides, and PyTorch's kernels want them in multiples of 16 bytes."""
    measured = vars(AttentionConfig(variant="flash"))
    with patch("soda_kernels._tuning.look_up", return_value=measured):
        assert choose(LONG, torch.device("cpu")).variant == "flash"
        assert choose(replace(LONG, describable=False), torch.device("cpu")).variant == "online"
        assert choose(LONG, torch.device("cpu"), "triton").variant == "online"
    assert choose(LONG, torch.device("cpu")).variant == "online"  # nothing was measured


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
