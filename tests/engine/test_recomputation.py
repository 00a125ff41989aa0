"""Resampling that keeps less for the backward: the same bits as PyTorch's own, and only what the backward needs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soda_engine.models.recomputation import calling, convolved_doubled, halved
from soda_engine.roofline.saved import list_saved


def results(run: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = run(x)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad(y, (x, *parameters), dy.contiguous(memory_format=layout_of(y)))]


def layout_of(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def bytes_kept(run: Callable[[], Tensor], *parts: nn.Module) -> int:
    return sum(tensor.own_bytes for tensor in list_saved(nn.ModuleList(parts), run))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resampling_is_pytorchs_to_the_bit(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(3, 8, 6, 10).to(dtype, memory_format=layout)
    conv = nn.Conv2d(8, 5, 3, padding=1).to(dtype)
    for ours, theirs, parameters in (
        (lambda x: halved(x, torch.full_like(x, torch.nan)), lambda x: F.avg_pool2d(x, 2), ()),
        (
            lambda x: convolved_doubled(conv, x), lambda x: conv(F.interpolate(x, scale_factor=2.0)),
            (conv.weight, conv.bias),
        ),
    ):  # fmt: skip
        for got, expected in zip(results(ours, x, *parameters), results(theirs, x, *parameters), strict=True):
            assert torch.equal(got, expected) and got.stride() == expected.stride()


def test_what_is_kept() -> None:
    x, conv = torch.randn(2, 4, 6, 6, requires_grad=True), nn.Conv2d(4, 5, 3)
    assert bytes_kept(lambda: halved(x * 2, x)) == 0 < bytes_kept(lambda: halved(x * 2))
    kept = []
    y = calling(conv, x * 2, lambda: kept.append("again") or x * 2)  # type: ignore[func-returns-value]
    assert not kept
    y.sum().backward()
    assert kept == ["again"]
    with torch.no_grad():
        calling(conv, x * 2, lambda: kept.append("never") or x)  # type: ignore[func-returns-value]
    assert kept == ["again"]


def test_a_doubled_image_is_not_kept() -> None:
    memory: list[torch.multiprocessing.reductions.StorageWeakRef] = []
    conv = nn.Conv2d(4, 5, 3, padding=1)

    def watched(large: Tensor) -> Tensor:
        memory.append(torch.multiprocessing.reductions.StorageWeakRef(large.untyped_storage()))
        return F.conv2d(large, conv.weight, conv.bias, padding=1)

    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    y = convolved_doubled(watched, x)  # type: ignore[arg-type]
    assert y.requires_grad and memory[0].expired()


def test_compiled_whole() -> None:
    conv, x = nn.Conv2d(4, 5, 3), torch.randn(2, 4, 6, 6)

    def run(x: Tensor) -> Tensor:
        return convolved_doubled(conv, halved(x, x))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for got, expected in zip(results(compiled, x), results(run, x), strict=True):
        torch.testing.assert_close(got, expected)
