"""Rows of the attention suite: every provider, the kernel that really ran, and reasons where none did."""

from __future__ import annotations

import time
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend

from benchmarks.attention import providers
from benchmarks.attention.cases import AttentionCase
from benchmarks.attention.problems import attention_problem
from benchmarks.attention.providers import ATTENTION_PROVIDERS, eager_attention, math_attention, own_attention, sdpa
from benchmarks.families import ATTENTION
from benchmarks.profiles import longest_kernel
from benchmarks.providers import Provider, Refused
from benchmarks.steps import make_step
from benchmarks.suite import PACES, suite_rows
from soda_kernels import native_status

CPU = torch.device("cpu")
MODES = ("fwd", "bwd", "fwd+bwd")
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
PACKED, CROSS = ATTENTION.cases(["tiny"], ATTENTION.layouts, "fp32", on_cpu=True)
PROVIDER = {provider.name: provider for provider in ATTENTION_PROVIDERS}
both = pytest.mark.parametrize("case", [PACKED, CROSS], ids=lambda case: case.layout)


def wrong(*inputs: Tensor) -> Tensor:
    return eager_attention(*inputs) * 1.001


def refusing(*_: Tensor) -> Tensor:
    raise Refused("heads of 16 are too narrow")


PROVIDERS = (
    *(provider for provider in ATTENTION_PROVIDERS if not provider.compiled),
    Provider(name="wrong", build=lambda: wrong),
    Provider(name="refusing", build=lambda: refusing),
)


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str, str], dict[str, Any]]:
    """Every row of both layouts, by layout, provider and mode."""
    measured = suite_rows(ATTENTION, [PACKED, CROSS], MODES, CPU, PACES["quick"], PROVIDERS)
    return {(row["case"]["layout"], row["provider"], row["mode"]): row for rows in measured for row in rows}


@both
def test_every_provider_has_its_row(rows: dict[tuple[str, str, str], dict[str, Any]], case: AttentionCase) -> None:
    assert len(rows) == 2 * len(PROVIDERS) * len(MODES)
    status = {provider.name: {rows[case.layout, provider.name, mode]["status"] for mode in MODES}
              for provider in PROVIDERS}  # fmt: skip
    timed = dict.fromkeys(("ours", "eager", "sdpa-math", "sdpa-flash"), {"ok"})
    absent = dict.fromkeys(("sdpa-efficient", "sdpa-cudnn", "xformers", "flash-attention", "refusing"), {"unavailable"})
    assert status == {**timed, **absent, "wrong": {"invalid"}}
    for row in rows.values():
        assert row["suite"] == row["op"] == "attention"
        assert {"B", "T", "S", "H", "D", "layout", "dtype"} <= row["case"].keys()
        assert (row["reason"] is None) == (row["status"] == "ok")
        assert (row["stats"]["p50"] is None) == (row["status"] != "ok")
    reasons = {name: rows[case.layout, name, "fwd"]["reason"] for name in absent}
    assert reasons["sdpa-cudnn"] == reasons["sdpa-efficient"] == "PyTorch has this backend on CUDA alone"
    assert reasons["refusing"] == "heads of 16 are too narrow"
    assert "times that of PyTorch's own" in rows[case.layout, "wrong", "fwd"]["reason"]


@both
def test_rows_of_sdpa_name_the_kernel(rows: dict[tuple[str, str, str], dict[str, Any]], case: AttentionCase) -> None:
    def kernel(provider: str, mode: str) -> str:
        return rows[case.layout, provider, mode]["config"]["kernel"]

    for provider in ("eager", "sdpa-flash"):
        assert kernel(provider, "fwd") == FLASH
        assert kernel(provider, "bwd") == f"{FLASH}_backward"
        assert kernel(provider, "fwd+bwd").startswith(FLASH)
    assert kernel("sdpa-math", "fwd") == "aten::_scaled_dot_product_attention_math"
    assert kernel("sdpa-math", "bwd").startswith("aten::")
    ours = rows[case.layout, "ours", "fwd"]
    status = native_status()
    assert ours["variant"] == ("native" if status.available else "torch")
    assert ours["config"] == ({"isa": status.isa} if status.available else {})


def test_the_gate_compares_with_math(rows: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    for mode in MODES:
        assert rows["packed", "sdpa-math", mode]["check"]["ratio_to_torch"] == 1.0


@both
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_providers_agree(case: AttentionCase, dtype: str) -> None:
    problem = attention_problem(AttentionCase(shape_set="t", shape=case.shape, dtype=dtype), CPU, grad=True)
    results = [
        make_step(forward, problem, "fwd+bwd")()
        for forward in (own_attention, eager_attention, math_attention, sdpa(SDPBackend.FLASH_ATTENTION))
    ]
    for others in results[1:]:
        assert len(others) == len(results[0]) == (2 if case.layout == "packed" else 4)
        for one, other in zip(results[0], others, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            assert torch.allclose(one, other, atol=3e-2 if dtype == "bf16" else 1e-5)
        assert others[0].is_contiguous()


def test_a_backend_that_refuses_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = attention_problem(PACKED, CPU)

    def refuse(*_: Tensor) -> Tensor:
        warnings.warn("Flash attention kernel not used because: (Triggered internally at x.cpp:1)", stacklevel=1)
        warnings.warn("Expected fp16 or bf16, but got fp32 (Triggered internally at x.cpp:2)", stacklevel=1)
        warnings.warn("Memory efficient attention has been runtime disabled.", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(functional, "scaled_dot_product_attention", refuse)
    with warnings.catch_warnings(), pytest.raises(Refused, match="^Expected fp16 or bf16, but got fp32$"):
        warnings.simplefilter("ignore")
        problem.call(sdpa(SDPBackend.FLASH_ATTENTION))


def test_a_backend_that_cannot_be_had_says_what_pytorch_says() -> None:
    with pytest.raises(Refused, match="No viable backend"):
        attention_problem(PACKED, CPU).call(sdpa(SDPBackend.EFFICIENT_ATTENTION))


def test_an_error_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(functional, "scaled_dot_product_attention", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        attention_problem(PACKED, CPU).call(math_attention)


@pytest.mark.parametrize("name", ["xformers", "flash-attention"])
def test_libraries_are_called_with_their_own_signatures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(
        memory_efficient_attention=lambda q, k, v: math_attention(q, k, v),
        flash_attn_func=lambda q, k, v: math_attention(q, k, v),
        flash_attn_qkvpacked_func=lambda qkv: math_attention(qkv),
    )
    monkeypatch.setattr(providers.importlib, "import_module", lambda _: stand_in)
    forward = PROVIDER[name].build()
    for case in (PACKED, CROSS):
        problem = attention_problem(case, CPU)
        assert torch.equal(problem.call(forward), problem.call(math_attention))


@pytest.mark.parametrize("name", ["xformers", "flash-attention"])
def test_libraries_say_why_they_do_not_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = attention_problem(PACKED, CPU)
    assert PROVIDER[name].unavailable(on_cpu) == f"{name} is not installed"
    monkeypatch.setattr(providers, "is_installed", lambda _: True)
    assert PROVIDER[name].unavailable(on_cpu) == f"{name} runs on CUDA alone"
    gradient = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    reason = PROVIDER[name].unavailable(SimpleNamespace(gradient=gradient))
    assert reason == {"xformers": None, "flash-attention": "flash-attention does not take float32"}[name]


class Slow(torch.autograd.Function):
    """A node of autograd that takes longer than the op that it calls."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return dy + 1


def test_the_longest_op_is_named_where_sdpa_has_none() -> None:
    a = torch.randn(200, 200)
    assert longest_kernel(lambda: (torch.mm(a, a) + 1,), CPU) == "aten::mm"
    leaf = torch.zeros(2, requires_grad=True)
    y = Slow.apply(leaf)
    assert longest_kernel(lambda: torch.autograd.grad(y, leaf, leaf.detach()), CPU).startswith("aten::")
