"""The model of a training step: FLOPs are PyTorch's count, bytes those of a hand's, floors and files what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from soda_engine.info import Info
from soda_engine.models.blocks import ResidualBlock
from soda_engine.models.residual import Image, formed
from soda_engine.models.soda import Soda
from soda_engine.presets import PRESETS
from soda_engine.roofline.devices import GPUS, H200, Ceilings
from soda_engine.roofline.layers import Layers
from soda_engine.roofline.report import RooflineOptions, describe_roofline, read_measured
from soda_engine.roofline.saved import list_saved
from soda_engine.roofline.step import StepCosts, _Counter, count_step
from soda_engine.train.trainer import Trainer
from tests.engine.tiny import tiny_run

DIGITS = PRESETS["digits"]


@pytest.fixture(scope="module")
def digits() -> StepCosts:
    return count_step(DIGITS, batch_size=128, dtype="bf16")


def test_flops_are_those_of_torchs_counter() -> None:
    costs = count_step(DIGITS, batch_size=4, dtype="fp32")
    with torch.device("meta"):
        model, images = Soda(DIGITS.model), torch.empty(4, 1, 8, 8)
        ids = torch.empty(4, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(images, images, seed=0, sample_ids=ids, step=0).mean().backward()
    assert sum(each.flops for each in costs.work if each.phase != "views") == counter.get_total_flops() > 0
    of_encoder = sum(counter.get_flop_counts()["Soda.encoder"].values())
    assert sum(each.flops for each in costs.work if each.layer.startswith("encoder")) == of_encoder > 0


def test_bytes_and_saved_memory_of_a_block_by_hand() -> None:
    n, c, d, side, groups = 3, 8, 16, 4, 4
    with torch.device("meta"):
        block = ResidualBlock(c, d, time_dim=5, section_dim=2, num_groups=groups)
        x, time, section = torch.empty(n, c, side, side, requires_grad=True), torch.empty(n, 5), torch.empty(n, 2)

    def run() -> Image:
        return block(x, block.time_modulation(time), block.section_modulation(section))

    with Layers(block) as layers, _Counter(layers) as counter:
        y = formed(run())
        counter.phase = "backward"
        y.backward(torch.empty_like(y))

    def moved(layer: str, phase: str) -> int:
        return sum(each.num_bytes for each in counter.work if (each.layer, each.phase) == (layer, phase)) // 4

    image, out, statistics, modulations = n * c * side**2, n * d * side**2, 2 * n * groups, 4 * n * d
    assert moved("norm1", "forward") == image + 2 * c + image + statistics
    assert moved("norm2", "forward") == out + modulations + 2 * d + out + statistics
    for layer, weights in (("conv1", 9 * c * d), ("shortcut", c * d)):
        assert moved(layer, "forward") == image + weights + d + out
        assert moved(layer, "backward") == out + image + weights + image + weights + d
    # The gradient and all that the forward read or measured; a gradient for each input.
    read, written = out + out + modulations + 2 * d + statistics, out + modulations + 2 * d
    assert moved("norm2", "backward") == read + written
    saved = list_saved(block, lambda: formed(run()))
    sizes = {layer: sum(each.own_bytes for each in saved if each.layer == layer) // 4 for layer in block._modules}
    assert sizes == {
        "norm1": image + statistics, "conv1": image, "norm2": out + statistics + modulations, "conv2": out,
        "shortcut": 0, "time_proj": time.numel(), "z_proj": section.numel(),
    }  # fmt: skip


def test_backward_ops_belong_to_their_modules(digits: StepCosts) -> None:
    for layer in ("encoder.layer1.0.conv1", "denoiser.up.0.block.conv2", "denoiser.down.0.block.norm1"):
        forward, backward = (
            [each for each in digits.work if (each.layer, each.phase) == (layer, phase)]
            for phase in ("forward", "backward")
        )
        assert len(forward) == 1 and forward[0].kind in {each.kind for each in backward}
        assert sum(each.flops for each in backward) == 2 * forward[0].flops


def test_the_floor_takes_the_larger_of_two_times(digits: StepCosts) -> None:
    fast = Ceilings(copy_bytes_per_s=1e30, matmul_flops_per_s=1e12)
    assert digits.floor_us(fast) == pytest.approx(digits.flops / 1e6)
    slow = Ceilings(copy_bytes_per_s=1e9, matmul_flops_per_s=1e30)
    assert digits.floor_us(slow) == pytest.approx(digits.num_bytes / 1e3)
    assert digits.floor_us(H200) > digits.floor_us(GPUS["h200"].ceilings("bf16"))


def test_a_run_is_held_against_its_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(tiny_run(tmp_path / "run")).train()
    capsys.readouterr()
    Info(model=str(tmp_path / "run"), step=RooflineOptions(roofline=True, gpu="a100", dtype="fp32"))()
    text = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(row["images_per_second"] for row in rows[1:] if "images_per_second" in row)
    assert f"measured: {rates[len(rates) // 2]:,.1f} images/s" in text and "measured over floor" in text
    assert "a training step of 16 images in fp32" in text and "A100 SXM 80 GB (TF32, NVIDIA" in text


def results(path: Path, **fields: Any) -> Path:
    row = {
        "op": "train_step", "provider": "ours", "status": "ok", "case": {"set": "digits", "N": 64, "dtype": "fp32"},
        "stats": {"p50": 32e3}, "env": {"device": "a CPU"}, "ceilings": {"copy_gbps": 20, "matmul_fp32_tflops": 0.1},
    } | fields  # fmt: skip
    path.write_text(json.dumps(row | {"stats": {"p50": 1.0}}) + "\n" + json.dumps(row) + "\n")
    return path


def test_results_and_measured_ceilings(tmp_path: Path) -> None:
    path = str(results(tmp_path / "e2e.jsonl"))
    text = describe_roofline("digits", DIGITS, None, RooflineOptions(measured=path, ceilings=path, dtype="fp32"))
    assert "a training step of 64 images in fp32" in text and "floors on measured on a CPU" in text
    assert f"measured: 2,000.0 images/s, 32.00 ms a step ({path}, fp32 on a CPU)" in text
    costs = count_step(DIGITS, batch_size=64, dtype="fp32")
    floor = costs.floor_us(Ceilings(copy_bytes_per_s=20e9, matmul_flops_per_s=0.1e12))
    assert f"{32e3 / floor:,.2f}" in text.partition("measured over floor")[2].splitlines()[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"provider": "eager"}, "has no training step of digits by ours; write it with python -m benchmarks run"),
        ({"case": {"set": "cifar10", "N": 4}}, "has no training step of digits by ours; it has those of cifar10"),
    ],
    ids=["other-provider", "other-preset"],
)
def test_results_of_something_else(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_measured(results(tmp_path / "e2e.jsonl", **fields), "digits")


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size is 0; it must be positive"):
        count_step(DIGITS, batch_size=0, dtype="bf16")
    with pytest.raises(ValueError, match=r"takes a preset \(digits, .*\) or a run's folder; nothing is neither"):
        Info(model="nothing", step=RooflineOptions(roofline=True))()
    ceilings = str(results(tmp_path / "e2e.jsonl"))
    with pytest.raises(ValueError, match="no row with measured ceilings for bf16; give another file or --dtype"):
        describe_roofline("digits", DIGITS, None, RooflineOptions(ceilings=ceilings))
    with pytest.raises(FileNotFoundError, match=r"there is no file .*metrics\.jsonl"):
        describe_roofline("digits", DIGITS, None, RooflineOptions(measured=str(tmp_path)))


def test_shared_memory_is_counted_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    saved = list_saved(model, lambda: model(torch.zeros(2, 4)))
    assert [(each.layer, each.shares_with, each.own_bytes) for each in saved] == [
        ("0", None, 32), ("1", None, 32), ("2", "1", 0)
    ]  # fmt: skip
