"""The Triton kernels of attention: every variant against fp64, and what they do with memory.

Where there is a GPU they run on it, compiled. Without one they run in Triton's interpreter, whose products of bf16 are
not products: fp16 and fp32 are run there, and bf16 is compiled (test_attention_compiles.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from soda_kernels._launch import can_describe
from soda_kernels.attention.config import AttentionConfig, Problem, choose, heuristic
from tests.harness.interpreter import require_interpreter
from tests.harness.memory import check_memory
from tests.harness.traffic import meter
from tests.kernels import compositions
from tests.numerics import assert_accurate, assert_accurate_in_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    require_interpreter()
in_the_interpreter = pytest.mark.skipif(DEVICE == "cuda", reason="only Triton's interpreter shows accesses to memory")
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])

# Tiles far smaller than a heuristic's, so that short sequences have many, and programs of several heads and blocks.
FORWARD = {
    "whole_row": AttentionConfig(variant="whole_row", block_m=16, block_n=0, num_warps=1),
    "whole_row_in_turn": AttentionConfig(
        variant="whole_row", block_m=16, block_n=0, num_warps=1, pairs=2, blocks=9
    ),
    "online": AttentionConfig(variant="online", block_m=16, block_n=32, num_warps=1),
    "online_described": AttentionConfig(variant="online", block_m=16, block_n=32, num_warps=1, descriptors=True),
}
BACKWARD = {
    "one_kernel": AttentionConfig(variant="one_kernel", block_m=32, block_n=16, num_warps=1),
    "one_kernel_in_turn": AttentionConfig(variant="one_kernel", block_m=16, block_n=32, num_warps=1, blocks=3),
    "one_block": AttentionConfig(variant="one_kernel", block_m=64, block_n=64, num_warps=1),
    "two_kernels": AttentionConfig(variant="two_kernels", block_m=32, block_n=16, num_warps=1),
    "two_kernels_described": AttentionConfig(
        variant="two_kernels", block_m=32, block_n=16, num_warps=1, descriptors=True
    ),
}
LENGTHS = [(1, 1), (17, 17), (49, 49), (64, 64), (5, 40), (40, 5)]


def random_inputs(queries: int, keys: int, head_dim: int, dtype: torch.dtype, *, heads: int = 3) -> list[Tensor]:
    """q, k, v and do."""
    lengths = (queries, keys, keys, queries)
    return [torch.randn(1, length, heads, head_dim, device=DEVICE).to(dtype) for length in lengths]


def whole(config: AttentionConfig, keys: int) -> AttentionConfig:
    """Make a row whole."""
    if config.variant != "whole_row":
        return config
    return AttentionConfig(**{**vars(config), "block_n": max(16, 1 << (keys - 1).bit_length())})


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, config: AttentionConfig | None) -> Any:
    from soda_kernels.attention.triton_impl import plan_forward

    return plan_forward(q, k, v, scale, config=config and whole(config, k.shape[1]))


def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, config: Any) -> Any:
    from soda_kernels.attention.triton_impl import plan_backward

    return plan_backward(do, q, k, v, o, lse, scale, config=config)


def assert_matches(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, forward_config: Any = None, backward_config: Any = None,
    scale: float = 0.2,
) -> None:  # fmt: skip
    """o, lse and the gradients keep the tolerance rule, against the composition in the same dtype.

    In fp32 in norm: lse's own rounding, which every backward from lse starts with, shows in the largest error.
    """
    assert_close = assert_accurate_in_norm if q.dtype == torch.float32 else assert_accurate
    o, lse = forward(q, k, v, scale, forward_config).run()
    gradients = backward(do, q, k, v, o, lse, scale, backward_config).run()
    plain, double = ([x.detach().to(dtype).requires_grad_() for x in (q, k, v)] for dtype in (q.dtype, torch.float64))
    composed, exact = compositions.attention(*plain, scale=scale), compositions.attention(*double, scale=scale)
    assert_close(o, composed, exact, "o")
    exact_lse = torch.einsum("bthd,bshd->bhts", *double[:2]).mul(scale).logsumexp(-1)
    plain_lse = torch.einsum("bthd,bshd->bhts", q.float(), k.float()).mul(scale).logsumexp(-1)
    assert_close(lse, plain_lse, exact_lse, "lse")
    plain_gradients = torch.autograd.grad(composed, plain, do)
    exact_gradients = torch.autograd.grad(exact, double, do.double())
    for name, gradient, other, truth in zip("qkv", gradients, plain_gradients, exact_gradients, strict=True):
        assert gradient.is_contiguous()
        assert_close(gradient, other, truth, f"d{name}")


@DTYPES
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("variants", [("whole_row", "one_kernel"), ("whole_row_in_turn", "two_kernels"),
                                      ("online", "one_kernel_in_turn"), ("online", "one_block"),
                                      ("online_described", "two_kernels_described")], ids="-".join)  # fmt: skip
def test_every_variant(variants: tuple[str, str], lengths: tuple[int, int], dtype: torch.dtype) -> None:
    assert_matches(*random_inputs(*lengths, 40, dtype), FORWARD[variants[0]], BACKWARD[variants[1]])


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_scales_of_any_sign(scale: float) -> None:
    for variants in (("whole_row", "one_kernel"), ("online", "two_kernels")):
        inputs = random_inputs(17, 33, 8, torch.float32)
        assert_matches(*inputs, FORWARD[variants[0]], BACKWARD[variants[1]], scale)


def test_strides_are_free() -> None:
    heads_first = torch.randn(2, 3, 17, 8, device=DEVICE).transpose(1, 2)
    sliced = torch.randn(2, 40, 3, 16, device=DEVICE)[:, ::2, :, ::2]
    expanded = torch.randn(2, 1, 3, 1, device=DEVICE).expand(2, 20, 3, 8)
    do = torch.randn(8, 3, 17, 2, device=DEVICE).permute(3, 2, 1, 0)
    for variants in (("whole_row", "one_kernel"), ("online", "two_kernels")):
        assert_matches(heads_first, sliced, expanded, do, FORWARD[variants[0]], BACKWARD[variants[1]])


@in_the_interpreter
def test_descriptors_change_no_bit() -> None:
    """Nor do they ask for more of the memory than pointers do, of heads whose width fills no tile."""
    q, k, v, do = random_inputs(40, 49, 24, torch.float16)
    q = torch.randn(1, 40, 6, 24).half()[:, :, ::2]  # heads that do not follow one another
    forwards = [forward(q, k, v, 0.2, FORWARD[name]) for name in ("online", "online_described")]
    assert forwards[1].launches[0].descriptors
    assert meter(forwards[0]).bytes_dram == meter(forwards[1]).bytes_dram
    (o, lse), described = (plan.run() for plan in forwards)
    assert torch.equal(o, described[0]) and torch.equal(lse, described[1])
    backwards = [
        backward(do, q, k, v, o, lse, 0.2, BACKWARD[name]) for name in ("two_kernels", "two_kernels_described")
    ]
    assert all(launch.descriptors for launch in backwards[1].launches)
    assert meter(backwards[0]).bytes_dram == meter(backwards[1]).bytes_dram
    plain, described = (plan.run() for plan in backwards)
    assert all(torch.equal(a, b) for a, b in zip(plain, described, strict=True))


@pytest.mark.parametrize(
    ("change", "describable"),
    [
        (lambda x: x, True),
        (lambda x: x[:, :, :1], True),
        (lambda x: x[:1, :1, :1], True),
        (lambda x: x[:, :, :, 8:], True),
        (lambda x: x[:, :, :, 4:], False),
        (lambda x: x[:, :, :, ::2], False),
        (lambda x: x[:, :, :1].expand(2, 17, 3, 24), False),
        (lambda x: x.reshape(2, 17, 2, 36)[:, :, :, :32], False),
        (lambda x: x.permute(0, 3, 2, 1), False),
    ],
    ids=["dense", "one head", "one row", "from 16 bytes on", "from 8 bytes on", "every other", "expanded",
         "heads 72 bytes apart", "D outermost"],
)  # fmt: skip
def test_what_descriptors_can_stand_for(change: Callable[[Tensor], Tensor], describable: bool) -> None:
    x, k, v, do = (change(torch.randn(2, 17, 3, 24, device=DEVICE).half()) for _ in range(4))
    assert can_describe(x) == describable
    suffix = "_described" if describable else ""
    assert_matches(x, k, v, do, FORWARD[f"online{suffix}"], BACKWARD[f"two_kernels{suffix}"])
    problem = replace(Problem.of(x, x, backward=False), copy_engine=True)
    tuned = AttentionConfig(variant="online", block_m=16, block_n=32, num_warps=1, descriptors=True)
    with patch("soda_kernels._tuning.look_up", return_value=vars(tuned)):
        assert choose(problem, x.device).descriptors == describable
        assert not choose(replace(problem, copy_engine=False), x.device).descriptors


@pytest.mark.parametrize("variant", BACKWARD)
def test_a_packed_gradient_is_the_three_gradients(variant: str) -> None:
    from soda_kernels.attention.triton_impl import plan_backward_qkvpacked

    qkv = torch.randn(2, 17, 3, 2, 40, device=DEVICE)
    do = torch.randn(2, 17, 2, 40, device=DEVICE)
    o, lse = forward(*qkv.unbind(2), 0.2, FORWARD["whole_row"]).run()
    (dqkv,) = plan_backward_qkvpacked(do, qkv, o, lse, 0.2, config=BACKWARD[variant]).run()
    separate = backward(do, *qkv.unbind(2), o, lse, 0.2, BACKWARD[variant]).run()
    assert dqkv.is_contiguous() and torch.equal(dqkv, torch.stack(separate, 2))


def test_an_infinite_key_with_no_weight_spoils_no_other() -> None:
    """Beyond the last query a block holds zeros, whose product with it is NaN."""
    q, k, v, do = random_inputs(17, 5, 8, torch.float32)
    q[..., 0], k[:, 2, :, 0] = q[..., 0].abs() + 0.1, float("-inf")
    for variant in BACKWARD:
        o, lse = forward(q, k, v, 0.2, FORWARD["online"]).run()
        _, dk, dv = backward(do, q, k, v, o, lse, 0.2, BACKWARD[variant]).run()
        others = [0, 1, 3, 4]
        assert dk[:, others].isfinite().all() and dv.isfinite().all()


@DTYPES
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("variants", [("whole_row", "one_kernel"), ("online", "two_kernels")], ids="-".join)
def test_logits_of_ten_thousand_give_no_nan(variants: tuple[str, str], sign: float, dtype: torch.dtype) -> None:
    q = torch.full((1, 2, 1, 4), 100.0, dtype=dtype, device=DEVICE)
    k = torch.full((1, 5, 1, 4), 25.0 * sign, dtype=dtype, device=DEVICE)
    k[0, 3] *= -1
    v = torch.randn(1, 5, 1, 4, device=DEVICE).to(dtype)
    o, lse = forward(q, k, v, 1.0, FORWARD[variants[0]]).run()
    expected = v[0, [0, 1, 2, 4] if sign > 0 else [3]].double().mean(0)
    assert_accurate(o[0, 0], expected.to(dtype), expected, "o")
    gradients = backward(torch.ones_like(o), q, k, v, o, lse, 1.0, BACKWARD[variants[1]]).run()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_second_run_gives_the_same_bits() -> None:
    q, k, v, do = random_inputs(49, 49, 40, torch.float16)
    for variant in BACKWARD:
        runs = []
        for _ in range(2):
            o, lse = forward(q, k, v, 0.2, FORWARD["online"]).run()
            runs.append((o, lse, *backward(do, q, k, v, o, lse, 0.2, BACKWARD[variant]).run()))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@in_the_interpreter
@pytest.mark.parametrize("lengths", [(17, 17), (64, 64), (5, 40), (40, 5)], ids=str)
@pytest.mark.parametrize("head_dim", [8, 40])
def test_memory(lengths: tuple[int, int], head_dim: int) -> None:
    """No access outside a tensor, no output unwritten, no address with two writers."""
    from soda_kernels.attention.triton_impl import plan_backward_qkvpacked

    q, k, v, do = random_inputs(*lengths, head_dim, torch.float32)
    for config in FORWARD.values():
        assert check_memory(forward(q, k, v, 0.2, config), (q, k, v)) == []
    o, lse = forward(q, k, v, 0.2, FORWARD["online"]).run()
    for config in BACKWARD.values():
        assert check_memory(backward(do, q, k, v, o, lse, 0.2, config), (do, q, k, v, o, lse)) == []
        qkv = torch.randn(1, lengths[0], 3, 3, head_dim)
        packed = plan_backward_qkvpacked(do, qkv, o, lse, 0.2, config=config)
        assert check_memory(packed, (do, qkv, o, lse)) == []


def test_heads_that_fill_the_chip_are_read_once() -> None:
    few, many = (
        heuristic(Problem(backward=False, pairs=pairs, queries=256, keys=256, head_dim=64, element_bytes=2))
        for pairs in (16, 1024)
    )
    assert (few.blocks, many.blocks) == (1, 2)
    few, many = (
        heuristic(Problem(backward=True, pairs=pairs, queries=256, keys=256, head_dim=64, element_bytes=2))
        for pairs in (16, 1024)
    )
    assert (few.blocks, many.blocks) == (1, 4)
    short = heuristic(Problem(backward=False, pairs=4096, queries=64, keys=64, head_dim=64, element_bytes=2))
    assert short.pairs == 4


@in_the_interpreter
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("length", [64, 256])
def test_traffic_where_heads_fill_the_chip(length: int, head_dim: int) -> None:
    """DRAM sees each of q, k, v, o, lse and the gradients once: within 5% forward and 10% backward."""
    from soda_kernels.attention.triton_impl import plan_backward_qkvpacked, plan_forward

    heads = 4
    configs = [
        heuristic(
            Problem(
                backward=backward, pairs=4096, queries=length, keys=length, head_dim=head_dim, element_bytes=2
            )
        )
        for backward in (False, True)
    ]  # fmt: skip
    qkv = torch.randn(1, length, 3, heads, head_dim).half()
    do = torch.randn(1, length, heads, head_dim).half()
    forward_plan = plan_forward(*qkv.unbind(2), 0.1, config=configs[0])
    o, lse = forward_plan.outputs
    unit, rows = o.nbytes, lse.nbytes
    assert meter(forward_plan).bytes_dram <= 1.05 * (4 * unit + rows)
    backward_plan = plan_backward_qkvpacked(do, qkv, o, lse, 0.1, config=configs[1])
    assert meter(backward_plan).bytes_dram <= 1.10 * (8 * unit + rows)


@pytest.mark.parametrize(("chosen", "precision"), [("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")])
def test_fp32_products_are_as_pytorch_is_told(chosen: str, precision: str) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = chosen
        plan = forward(*random_inputs(17, 17, 8, torch.float32)[:3], 0.2, None)
    finally:
        matmul.fp32_precision = before
    assert plan.launches[0].constants["PRECISION"] == precision


@pytest.mark.parametrize("index", range(4), ids=["q", "k", "v", "do"])
def test_a_head_beyond_32_bits_goes_to_the_reference(index: int) -> None:
    from soda_kernels.attention.ops import _unsupported

    tensors = [torch.empty(1, 17, 2, 8, device="meta") for _ in range(4)]
    assert _unsupported(*tensors) is None
    tensors[index] = torch.empty(1, device="meta").as_strided((1, 17, 2, 8), (2**32, 2**27, 8, 1))
    assert "32 bits" in str(_unsupported(*tensors))
