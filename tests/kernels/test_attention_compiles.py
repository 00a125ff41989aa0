"""What the kernels of attention become on GPUs that need not be there: no spills, wide accesses, matrix units."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from soda_kernels._tuning import for_wavefronts
from soda_kernels.aot import specify
from soda_kernels.attention.config import AttentionConfig, Problem, for_small_registers, heuristic
from tests.harness.compilation import compile_specs, gate

IMAGES = frozenset({"q_ptr", "k_ptr", "v_ptr", "o_ptr", "do_ptr", "dq_ptr", "dk_ptr", "dv_ptr"})
LENGTHS = (64, 256, 1024)


def packed_plans(length: int, head_dim: int, dtype: torch.dtype, batch: int = 32, heads: int = 8) -> list[Any]:
    """Both directions of self-attention on a packed projection."""
    from soda_kernels.attention.triton_impl import plan_backward_qkvpacked, plan_forward

    qkv = torch.empty(batch, length, 3, heads, head_dim, dtype=dtype, device="meta")
    o = torch.empty(batch, length, heads, head_dim, dtype=dtype, device="meta")
    lse = torch.empty(batch, heads, length, device="meta")
    return [plan_forward(*qkv.unbind(2), 0.1), plan_backward_qkvpacked(o, qkv, o, lse, 0.1)]


def complaints(plans: list[Any], arch: str, *, hgmma: bool, min_vector_bytes: int = 16) -> list[str]:
    launches = [launch for plan in plans for launch in plan.launches]
    found = []
    for launch, report in zip(launches, compile_specs([specify(each) for each in launches], arch), strict=True):
        wrong = gate(report, tensors=IMAGES, hgmma=hgmma, min_vector_bytes=min_vector_bytes)
        if launch.descriptors and "UTMALDG" not in report.listing.read_text():
            wrong.append("descriptors, and the copy engine loads nothing")
        found += [f"{launch.kernel.fn.__name__} {launch.constants}: {complaint}" for complaint in wrong]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 96, 128])
def test_measured_shapes(head_dim: int) -> None:
    shapes = [(length, batch) for length in LENGTHS for batch in (1, 32)]
    plans = [plan for length, batch in shapes for plan in packed_plans(length, head_dim, torch.bfloat16, batch)]
    assert complaints(plans, "sm_90", hgmma=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [160, 256])
def test_measured_shapes_of_wide_heads(head_dim: int) -> None:
    """Everything in registers; the products are of warp groups but for S and dP of the gradients of keys."""
    plans = [plan for length in LENGTHS for plan in packed_plans(length, head_dim, torch.bfloat16)]
    assert complaints(plans, "sm_90", hgmma=False) == []
    reports = compile_specs([specify(launch) for plan in plans for launch in plan.launches], "sm_90")
    assert all(report.has_hgmma for report in reports)
    assert {report.kernel.partition(":")[2] for report in reports if report.has_hmma} <= {
        "_attention_bwd_head_kernel", "_attention_bwd_keys_kernel",
    }  # fmt: skip


@pytest.mark.slow
def test_no_atomics() -> None:
    """What makes a second run give the same bits."""
    plans = [plan for length in LENGTHS for plan in packed_plans(length, 64, torch.bfloat16)]
    for report in compile_specs([specify(launch) for plan in plans for launch in plan.launches], "sm_90"):
        assert not re.search(r"\b(ATOM|ATOMG|RED|REDG)\b", report.listing.read_text())


@pytest.mark.slow
def test_ragged_crossed_and_half() -> None:
    from soda_kernels.attention.triton_impl import plan_backward, plan_forward

    plans = []
    for queries, keys, heads, dtype in ((257, 77, 8, torch.float16), (100, 100, 1, torch.bfloat16)):
        q, k, v = (torch.empty(32, length, heads, 64, dtype=dtype, device="meta") for length in (queries, keys, keys))
        lse = torch.empty(32, heads, queries, device="meta")
        plans += [plan_forward(q, k, v, 0.1), plan_backward(q, q, k, v, q, lse, 0.1)]
    assert complaints(plans, "sm_90", hgmma=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
def test_fp32(head_dim: int) -> None:
    plans = [plan for length in LENGTHS for plan in packed_plans(length, head_dim, torch.float32)]
    if head_dim > 128:  # the backward's products would need more registers than there are
        plans = plans[::2]
    assert complaints(plans, "sm_90", hgmma=False) == []


@pytest.mark.slow
def test_sm_100() -> None:
    plans = [plan for length in LENGTHS for plan in packed_plans(length, 64, torch.bfloat16)]
    assert complaints(plans, "sm_100", hgmma=False) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "fitted", "head_dim"),
    [("sm_80", for_small_registers, 64), ("sm_80", for_small_registers, 128), ("gfx942", for_wavefronts, 64)],
)
def test_other_architectures(arch: str, fitted: Any, head_dim: int) -> None:
    def choose(problem: Problem, *_: Any) -> AttentionConfig:
        return fitted(heuristic(replace(problem, copy_engine=False)))

    with patch("soda_kernels.attention.triton_impl.choose", choose):
        plans = [plan for length in LENGTHS for plan in packed_plans(length, head_dim, torch.bfloat16)]
    assert complaints(plans, arch, hgmma=False, min_vector_bytes=8 if arch == "gfx942" else 16) == []


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("length", LENGTHS)
def test_launches(length: int, head_dim: int) -> None:
    forward, backward = packed_plans(length, head_dim, torch.bfloat16)
    assert len(forward.launches) == 1
    assert len(backward.launches) == (1 if length * head_dim <= 16384 else 2)
    assert bool(forward.launches[0].descriptors) == (length > 256)
    assert all(bool(launch.descriptors) == (len(backward.launches) == 2) for launch in backward.launches)
