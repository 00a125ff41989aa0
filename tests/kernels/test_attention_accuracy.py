"""The Triton attention kernels against PyTorch's plain math: every head dim and length, as the heuristic lays them out.

In Triton's interpreter the long and wide ones take minutes: they are marked `exhaustive`, which `python -m pytest -m
exhaustive` runs. On a GPU all of them run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tests.harness.interpreter import require_interpreter
from tests.numerics import assert_accurate_in_norm, ulp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    require_interpreter()

HEAD_DIMS = (8, 32, 40, 64, 80, 96, 128, 160, 256)
LENGTHS = (1, 17, 49, 64, 100, 255, 256, 257, 1000, 1024)
# The interpreter's products of bf16 are none.
DTYPES = (torch.float16, torch.float32) if DEVICE == "cpu" else (torch.bfloat16, torch.float16, torch.float32)
# From so many values on, their error's norm is no draw.
_MANY = 1000
_USUAL_LENGTHS = {torch.float16: (100, 257, 1000), torch.float32: (64, 100, 100)}
"""Up to which length the interpreter runs every head dim, those to 64, and 40 alone without being asked."""


def is_exhaustive(dtype: torch.dtype, length: int, head_dim: int) -> bool:
    if DEVICE == "cuda":
        return False
    every, narrow, one = _USUAL_LENGTHS[dtype]
    return length > (one if head_dim == 40 else narrow if head_dim in (32, 64) else every)


def cases() -> list[Any]:
    return [
        pytest.param(
            dtype, length, head_dim, id=f"{str(dtype).removeprefix('torch.')}-{length}-{head_dim}",
            marks=[pytest.mark.exhaustive] if is_exhaustive(dtype, length, head_dim) else [],
        )
        for dtype in DTYPES for length in LENGTHS for head_dim in HEAD_DIMS
    ]  # fmt: skip


def by_plain_math(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float) -> list[Tensor]:
    """Return o, dq, dk and dv of SDPA's math backend."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        o = scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), scale=scale).transpose(1, 2)
    return [o, *torch.autograd.grad(o, leaves, do)]


@pytest.mark.parametrize(("dtype", "length", "head_dim"), cases())
def test_the_error_is_at_most_twice_plain_maths(dtype: torch.dtype, length: int, head_dim: int) -> None:
    """In norm, and the largest error but for one rounding of the largest value: a gradient is a sum of either sign,
    whose error knows nothing of its size. In fp32 in norm alone: lse's own rounding shows in the largest error.
    """
    assert_near(*random_inputs(length, head_dim, dtype), head_dim**-0.5)


@pytest.mark.parametrize("head_dim", [32, 64])
def test_the_error_where_a_row_of_scores_is_nearly_one_hot(head_dim: int) -> None:
    """There dP and delta nearly cancel. Where one block holds a head delta is formed from P, else from a rounded o."""
    q, k, v, do = random_inputs(64, head_dim, torch.float16)
    assert_near(6 * q, 6 * k, 6 * v, do, head_dim**-0.5)


def random_inputs(length: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and do."""
    return [torch.randn(1, length, 2, head_dim, device=DEVICE).to(dtype) for _ in range(4)]


def assert_near(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float) -> None:
    """Hold o, dq, dk and dv against plain math: their norms to twice its error, of few values with a rounding more."""
    from soda_kernels.attention.triton_impl import plan_backward, plan_forward

    o, lse = plan_forward(q, k, v, scale).run()
    own = [o, *plan_backward(do, q, k, v, o, lse, scale).run()]
    plain, exact = by_plain_math(q, k, v, do, scale), by_plain_math(*(x.double() for x in (q, k, v, do)), scale)
    for name, result, other, truth in zip(("o", "dq", "dk", "dv"), own, plain, exact, strict=True):
        assert_accurate_in_norm(result, other, truth, name)
        errors = [(x.double() - truth).abs() for x in (result, other)]
        if result.numel() >= _MANY:
            norm, allowed = (float(error.norm()) for error in errors)
            assert norm <= 2 * allowed, f"{name}: an error of norm {norm:.3g} against {allowed:.3g}"
        if q.dtype != torch.float32:
            largest, others = (error.max() for error in errors)
            rounding = ulp(truth.abs().max(), q.dtype)
            assert largest <= 2 * others + rounding, f"{name}: {largest:.3g} against {others:.3g}"
