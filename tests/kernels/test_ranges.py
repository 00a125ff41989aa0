"""Named ranges: none unless asked for, and then one a kernel call, for NVTX as for the profiler."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import profile

from soda_kernels import attention_qkvpacked, modulated_group_norm, span, use_backend, use_ranges
from soda_kernels._backend import current_ops

CALLS = ["modulated_group_norm", "attention", "attention_qkvpacked_backward", "modulated_group_norm_backward"]


def forward_and_backward() -> torch.Tensor:
    x = torch.randn(2, 24, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = modulated_group_norm(x, 4)
    assert isinstance(y, torch.Tensor)
    attention_qkvpacked(y.transpose(1, 2).unflatten(2, (3, 2, 4))).square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What NVTX would be told, by a package of its name."""
    told: list[str] = []
    nvtx = SimpleNamespace(push_range=told.append, pop_range=lambda: told.append("pop"))
    monkeypatch.setitem(sys.modules, "nvtx", nvtx)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return told


def test_nothing_is_named_unless_asked_for(pushed: list[str]) -> None:
    assert current_ops() is torch.ops.soda_kernels
    with profile() as seen, span("a phase"):
        forward_and_backward()
    assert not pushed and not {"a phase", "soda_kernels.attention"} & {event.key for event in seen.key_averages()}


@pytest.mark.parametrize(("backend", "namespace"), [("auto", "soda_kernels"), ("reference", "soda_kernels_reference")])
def test_every_kernel_call_is_a_range(backend: str, namespace: str, pushed: list[str]) -> None:
    names = [f"{namespace}.{call}" for call in CALLS]
    with use_backend(backend):  # type: ignore[arg-type]
        plain = forward_and_backward()
        with use_ranges(), profile() as seen, span("a phase"):
            named = forward_and_backward()
    assert torch.equal(plain, named)
    assert pushed == ["a phase", *(told for name in names for told in (name, "pop")), "pop"]
    counts = {event.key: event.count for event in seen.key_averages()}
    assert [counts[name] for name in ("a phase", *names)] == [1] * 5
    assert current_ops() is torch.ops.soda_kernels


def test_a_range_ends_where_a_call_fails(pushed: list[str]) -> None:
    with use_ranges(), pytest.raises(KeyError), span("a phase"):
        raise KeyError
    assert pushed == ["a phase", "pop"]


@pytest.mark.parametrize("enabled", [False, True], ids=["off", "on"])
def test_compilation_sees_no_spans(enabled: bool) -> None:
    def phases(x: torch.Tensor) -> torch.Tensor:
        with span("a phase"):
            y = modulated_group_norm(x, 4)
        assert isinstance(y, torch.Tensor)
        return y + 1

    x = torch.randn(2, 8, 4)
    with use_ranges(enabled):
        torch.testing.assert_close(torch.compile(phases, backend="eager", fullgraph=True)(x), phases(x))
