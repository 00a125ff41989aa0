"""What is computed again instead of kept for the backward: the same bits, and less memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from soda_engine.models.blocks import ConvResample, ResidualBlock
from soda_engine.models.recomputation import calling, halved, halved_keeping
from soda_engine.presets import PRESETS
from soda_engine.roofline.saved import LiveMemory, list_saved
from soda_engine.roofline.step import count_step
from soda_engine.train.checkpoint import load
from soda_engine.train.trainer import Trainer
from tests.engine.tiny import tiny_model, tiny_run
from tests.engine.tiny_soda import tiny_soda


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
    up = ConvResample(8, "up").to(dtype)
    conv = up.conv
    for ours, theirs, parameters in (
        (lambda x: halved_keeping(torch.full_like(x, torch.nan), x), lambda x: F.avg_pool2d(x, 2), ()),
        (
            up, lambda x: conv(F.interpolate(x, scale_factor=2.0)),
            (conv.weight, conv.bias),
        ),
    ):  # fmt: skip
        for got, expected in zip(results(ours, x, *parameters), results(theirs, x, *parameters), strict=True):
            assert torch.equal(got, expected) and got.stride() == expected.stride()


def test_what_is_kept() -> None:
    x, conv = torch.randn(2, 4, 6, 6, requires_grad=True), nn.Conv2d(4, 5, 3)
    assert bytes_kept(lambda: halved_keeping(x, x * 2)) == 0 < bytes_kept(lambda: halved(x * 2))
    kept = []
    y = calling(conv, x * 2, lambda: kept.append("again") or x * 2)  # type: ignore[func-returns-value]
    assert not kept
    y.sum().backward()
    assert kept == ["again"]
    with torch.no_grad():
        calling(conv, x * 2, lambda: kept.append("never") or x)  # type: ignore[func-returns-value]
    assert kept == ["again"]


def test_a_doubled_image_is_not_kept() -> None:
    memory: list[StorageWeakRef] = []
    up = ConvResample(4, "up")
    up.conv.register_forward_pre_hook(lambda _, inputs: memory.append(StorageWeakRef(inputs[0].untyped_storage())))
    y = up(torch.randn(2, 4, 6, 6, requires_grad=True))
    assert y.requires_grad and memory[0].expired()


MODES = ("none", "norms", "blocks")
VARIANTS: dict[str, dict[str, Any]] = {
    "adm": {"multipliers": (1, 2, 2), "attention_resolutions": (4,)},
    "conv-resampling-cross": {"resample_in_block": False, "cross_attention": True},
}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("what", ["norms", "blocks"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_changes_no_bit(variant: str, what: Literal["norms", "blocks"], bf16: bool) -> None:
    """With dropout, whose masks come from keys."""
    config = dataclasses.replace(tiny_model(dropout=0.5, in_channels=3, **VARIANTS[variant]))
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, in_channels=3))
    model = tiny_soda(config).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.rand(5, 3, 8, 8).contiguous(memory_format=torch.channels_last) * 2 - 1
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def step(key: int) -> list[Tensor]:
        model.load_state_dict(statistics, strict=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = model(images, images, seed=key, sample_ids=torch.arange(5), step=3)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), list(model.parameters()))]

    plain, other = step(0), step(1)
    model.denoiser.checkpoint_activations(what)
    again = step(0)
    assert all(torch.equal(got, expected) for got, expected in zip(again, plain, strict=True))
    assert not torch.equal(plain[0], other[0])


def test_checkpointing_holds_less_and_counts_what_it_repeats() -> None:
    configs = {what: dataclasses.replace(PRESETS["digits"], checkpoint_activations=what) for what in MODES}
    costs = {what: count_step(config, batch_size=8, dtype="bf16") for what, config in configs.items()}
    held = {what: each.held_bytes for what, each in costs.items()}
    # All kinds of blocks together keep four images each; norms' results are half of them, the encoder's stay.
    assert held["norms"] < 0.75 * held["none"] and held["blocks"] < 0.45 * held["none"]
    assert len({each.flops for each in costs.values()}) == 1
    repeated = {what: sum(work.flops for work in each.work if work.again) for what, each in costs.items()}
    assert repeated["none"] == repeated["norms"] == 0
    forward = sum(work.flops for work in costs["none"].work if work.phase == "forward" and "denoiser" in work.layer)
    assert 0.5 * forward < repeated["blocks"] < forward  # a block's last convolution is not needed again


def test_live_memory_by_hand() -> None:
    x = torch.zeros(100)
    with LiveMemory() as memory:
        y = x * 2
        z = y.view(10, 10) + 1
        del y
        assert memory.num_bytes() == 400
        z.mul_(2)
    assert (memory.num_bytes(), memory.peak_bytes) == (400, 800)


def test_checkpointing_is_a_setting_of_a_run(tmp_path: Path) -> None:
    for what in ("none", "blocks"):
        trainer = Trainer(tiny_run(tmp_path / what, total_images=48, checkpoint_activations=what))
        assert {module.recompute for module in trainer.model.modules() if isinstance(module, ResidualBlock)} == {
            {"none": "resampled", "blocks": "nothing"}[what]
        }
        trainer.train()
    plain, again = (load(tmp_path / what).state_dict() for what in ("none", "blocks"))
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    # What it keeps is free to change: the run goes on with the other setting.
    resumed = Trainer(tiny_run(tmp_path / "none", total_images=96, checkpoint_activations="norms"))
    assert resumed.progress.images == 48
    with pytest.raises(ValueError, match="checkpoint_activations is 'all'; it must be one of"):
        resumed.model.denoiser.checkpoint_activations("all")  # type: ignore[arg-type]


def test_compiled_whole() -> None:
    up, x = ConvResample(4, "up"), torch.randn(2, 4, 6, 6)

    def run(x: Tensor) -> Tensor:
        return up(halved_keeping(x, x))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for got, expected in zip(results(compiled, x), results(run, x), strict=True):
        torch.testing.assert_close(got, expected)
