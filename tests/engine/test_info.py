"""The description of a model: its numbers are those of the model, and its FLOPs those of the formula."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn

from soda_engine import PRESETS, Soda
from soda_engine.info import Info, _measure, describe, describe_model
from soda_kernels import native_status
from tests.engine.tiny_soda import tiny_config

CPU = torch.device("cpu")


def row(text: str, name: str) -> list[float]:
    (line,) = (line for line in text.splitlines() if line.startswith(name))
    return [float(number.replace(",", "")) for number in re.findall(r"[\d,.]+", line.removeprefix(name))]


def test_parameters_and_memory_are_the_models() -> None:
    config = tiny_config()
    text, model = describe_model(config, 2, CPU), Soda(config)
    for name in ("encoder", "denoiser"):
        assert row(text, name)[0] == sum(p.numel() for p in getattr(model, name).parameters())
    total = sum(p.numel() for p in model.parameters())
    assert f"training state (weights, average, gradients, two moments, fp32): {5 * 4 * total / 2**20:,.1f} MiB" in text
    assert "z: 13 numbers in 3 sections: level0 4, level1 4, middle 5" in text and "(batch of 2)" in text


@pytest.mark.parametrize(("batch", "stride"), [(1, 1), (3, 2)], ids=["1x3x8x8-stride1", "3x3x8x8-stride2"])
def test_flops_and_activations_of_a_convolution(batch: int, stride: int) -> None:
    with torch.device("meta"):
        conv, images = nn.Conv2d(3, 16, 3, stride=stride, padding=1), torch.empty(batch, 3, 8, 8)
    flops, kept = _measure(conv, (images,))
    side = 8 // stride
    assert flops == 2 * batch * 16 * side * side * 3 * 3 * 3
    assert kept == 4 * images.numel()  # its input; the weights are no activation


def test_activations_are_counted_once() -> None:
    with torch.device("meta"):
        x = torch.empty(5, 7, requires_grad=True)
    assert _measure(_Cube(), (x,)) == (0, 2 * 4 * 35)  # x, twice kept, and its square


def test_views_of_weights_and_of_activations_are_free() -> None:
    with torch.device("meta"):
        linear, x = nn.Linear(7, 3), torch.empty(5, 7)
    assert _measure(linear, (x,)) == (2 * 5 * 7 * 3, 4 * 35)  # it saves x, and its weight transposed


class _Cube(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x * x)


def test_costs_grow_with_the_batch() -> None:
    one, four = (describe_model(PRESETS["digits"].model, batch, CPU) for batch in (1, 4))
    for name in ("encoder", "denoiser"):
        (parameters, flops, kept), more = row(one, name), row(four, name)
        assert more[0] == parameters
        assert more[1] == pytest.approx(4 * flops, abs=0.03) and more[2] == pytest.approx(4 * kept, abs=0.25)


def test_every_kernel_call_is_named() -> None:
    config = tiny_config()
    lines = describe_model(config, 1, CPU).partition("kernels:\n")[2].splitlines()
    counts = {line.split()[2]: int(line.split()[0]) for line in lines}
    model = Soda(config)
    # two norms a residual block, one an attention, one before the output
    norms = sum(type(module).__name__ == "ModulatedGroupNorm" for module in model.denoiser.modules())
    attentions = sum(type(module).__name__ == "AttentionBlock" for module in model.denoiser.modules())
    assert counts == {"modulated_group_norm": norms, "attention": attentions}
    assert all(re.match(r" +\d+ x \w+ on cpu: \w+", line) and line.endswith(")") for line in lines)


def test_a_described_run_shows_settings_and_model() -> None:
    config = dataclasses.replace(PRESETS["digits"], device="cpu")
    text = describe(config)
    assert '"data": "digits"' in text and f'"total_images": {config.total_images}' in text
    assert f"(batch of {config.batch_size})" in text and "kernels:" in text
    assert str(native_status()) in text.splitlines()


def test_info_prints_presets(capsys: pytest.CaptureFixture[str]) -> None:
    Info(model="digits", device="cpu", batch_size=2)()
    assert capsys.readouterr().out == describe_model(PRESETS["digits"].model, 2, CPU) + "\n"


@pytest.mark.parametrize("batch_size", [0, -1])
def test_wrong_batch_size(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}; it must be positive"):
        describe_model(tiny_config(), batch_size, CPU)
