"""Residual sums left to the next group norm: the same values as sums formed at once, with fewer passes."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from soda_engine.config import DenoiserConfig, LatentConfig
from soda_engine.models.blocks import AttentionBlock, ConvResample, CrossAttentionBlock, ResidualBlock
from soda_engine.models.residual import ResidualSum, formed, normalized
from soda_engine.models.unet import Denoiser, Layer
from soda_kernels import ModulatedGroupNorm, attention, attention_qkvpacked, use_backend

CONFIG = DenoiserConfig(
    image_size=8, channels=8, multipliers=(1, 2), blocks=2, attention_resolutions=(4,), head_dim=8, num_groups=4,
    dropout=0.0, residual_scale=1.0,
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "resblock": {},
    "conv-cross": {"resample_in_block": False, "cross_attention": True},
    "scaled": {"residual_scale": 2**-0.5},
}
EACH_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def build(layout: torch.memory_format, dtype: torch.dtype = torch.float32, **options: Any) -> Denoiser:
    """A denoiser in training mode, none of whose parameters is zero."""
    model = Denoiser(dataclasses.replace(CONFIG, **options), LatentConfig(dim=16))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).to(memory_format=layout)


def inputs(layout: torch.memory_format, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x_t = torch.randn(2, 3, 8, 8, dtype=dtype).contiguous(memory_format=layout)
    return x_t, torch.rand(2, dtype=dtype), torch.randn(2, 16, dtype=dtype)


def plain_block(block: ResidualBlock, x: Tensor, skip: Tensor | None, time: Tensor, section: Tensor) -> Tensor:
    def resampled(x: Tensor) -> Tensor:
        if block.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0) if block.resample == "up" else x

    h = block.conv1(resampled(block.norm1(x if skip is None else (x, skip))))
    modulations = block.time_proj(time).chunk(2, dim=1), block.z_proj(section).chunk(2, dim=1)
    h = block.conv2(block.norm2(h, *modulations))
    if skip is not None:
        assert block.shortcut is not None
        on_x, on_skip = block.shortcut.weight.split((x.shape[1], skip.shape[1]), dim=1)
        return (h + (F.conv2d(x, on_x, block.shortcut.bias) + F.conv2d(skip, on_skip))) * block.residual_scale
    x = resampled(x)
    return (h + (x if block.shortcut is None else block.shortcut(x))) * block.residual_scale


def plain_attention(block: AttentionBlock | CrossAttentionBlock, x: Tensor, tokens: Tensor | None) -> Tensor:
    h = block.norm(x)
    if isinstance(block, AttentionBlock):
        qkv = block.qkv(h).permute(0, 2, 3, 1).reshape(len(x), -1, 3, block.num_heads, block.head_dim)
        o = attention_qkvpacked(qkv)
    else:
        assert tokens is not None
        q = block.q(h).permute(0, 2, 3, 1).reshape(len(x), -1, block.num_heads, block.head_dim)
        o = attention(q, *block.kv(tokens).unflatten(2, (2, block.num_heads, block.head_dim)).unbind(2))
    o = o.view(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    return (x + block.proj(o)) * block.residual_scale


def plain_denoiser(model: Denoiser, x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """The denoiser's modules with every residual sum formed at once."""
    time, sections = model.time(t), [z[:, cut] for cut in model.section_slices]
    tokens = None if model.tokens is None else model.tokens(sections)

    def run(layer: Layer | ConvResample, h: Tensor, skip: Tensor | None = None) -> Tensor:
        if isinstance(layer, ConvResample):
            return layer(h)
        h = plain_block(layer.block, h, skip, time, sections[layer.section])
        for block in (layer.attention, layer.cross):
            h = h if block is None else plain_attention(block, h, tokens)
        return h

    h = model.conv_in(x_t)
    skips = [h]
    for layer in model.down:
        h = run(layer, h)
        skips.append(h)
    for layer in model.middle:
        h = run(layer, h)
    for layer in model.up:
        h = run(layer, h, skips.pop() if layer.takes_skip else None)
    return model.conv_out(model.norm_out(h))


@pytest.mark.parametrize("differentiated", [False, True], ids=["inference", "training"])
@EACH_LAYOUT
@EACH_OPTION
def test_values_are_those_of_sums_formed_at_once(
    options: dict[str, Any], layout: torch.memory_format, differentiated: bool
) -> None:
    model, batch = build(layout, **options), inputs(layout)
    with torch.set_grad_enabled(differentiated):
        for backend in ("reference", "auto"):
            with use_backend(backend):
                assert torch.equal(model(*batch), plain_denoiser(model, *batch))


@EACH_LAYOUT
@EACH_OPTION
def test_gradients_are_those_of_sums_formed_at_once(options: dict[str, Any], layout: torch.memory_format) -> None:
    model = build(layout, torch.float64, **options)
    twin = copy.deepcopy(model)
    x_t, t, z = inputs(layout, torch.float64)
    dy = torch.randn_like(x_t)
    for own, forward in ((model, model), (twin, lambda *batch: plain_denoiser(twin, *batch))):
        own.zero_grad()
        forward(x_t, t, z).backward(dy)
    for (name, own), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert own.grad is not None and own.grad.any(), name
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_the_denoiser_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    model, (x_t, t, z) = build(torch.channels_last, blocks=1, cross_attention=True), inputs(torch.channels_last)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    results = []
    for forward in (model, compiled):
        z = z.detach().requires_grad_()
        y = forward(x_t, t, z)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), z)))
    torch.testing.assert_close(*results)
    assert counter.frame_count == 1


def test_autocast_runs_in_bf16() -> None:
    model = build(torch.channels_last, cross_attention=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(*inputs(torch.channels_last))
    assert y.dtype == torch.bfloat16 and y.isfinite().all() and y.any()


class CountingNorm(ModulatedGroupNorm):
    """Counts its calls with a residual and without."""

    def __init__(self) -> None:
        super().__init__(2, 4)
        self.calls = {"residual": 0, "plain": 0}

    def forward(  # type: ignore[override]
        self, x: Tensor, *, residual: Tensor | None = None, residual_scale: float = 1.0
    ) -> Any:
        self.calls["plain" if residual is None else "residual"] += 1
        return super().forward(x, residual=residual, residual_scale=residual_scale)


def images(layout: torch.memory_format = torch.channels_last) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, 4, 3, 5).contiguous(memory_format=layout) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("scale", [1.0, 2**-0.5])
def test_a_sum_is_formed_once_and_by_the_first_who_reads_it(scale: float) -> None:
    (a, b), norm = images(), CountingNorm()
    total = ResidualSum(a, b, scale)
    first = normalized(norm, total)
    assert norm.calls == {"residual": 1, "plain": 0}
    assert torch.equal(formed(total), (a + b) * scale) and formed(total) is formed(total)
    assert torch.equal(normalized(norm, total), first)
    assert norm.calls == {"residual": 1, "plain": 1}
    needed_first = ResidualSum(a, b, scale)
    assert formed(needed_first) is formed(needed_first)
    assert torch.equal(normalized(norm, needed_first), first)
    assert norm.calls == {"residual": 1, "plain": 2}


@pytest.mark.parametrize("case", ["dtype", "layout"])
def test_what_the_norm_does_not_take_is_an_ordinary_sum(case: str) -> None:
    (a, b), norm = images(), CountingNorm()
    b = b.bfloat16() if case == "dtype" else b.contiguous()
    total = ResidualSum(a, b, 0.5)
    y = normalized(norm, total)
    assert norm.calls == {"residual": 0, "plain": 1}
    assert torch.equal(formed(total), (a + b) * 0.5) and formed(total).stride() == a.stride()
    torch.testing.assert_close(y, norm((a + b) * 0.5))


def test_images_pass_through() -> None:
    (a, b), norm = images(), CountingNorm()
    assert formed(a) is a
    assert torch.equal(normalized(norm, a), norm(a))
    wide = ModulatedGroupNorm(2, 8)
    assert torch.equal(normalized(wide, (a, b)), wide((a, b)))
