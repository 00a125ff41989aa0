"""Two processes under torchrun train as one does at the same global batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from soda_engine.train.checkpoint import load

SETTINGS = [
    "train", "digits", "--total-images", "96", "--batch-size", "16", "--device", "cpu", "--no-tensorboard",
    "--cadence.log-images", "16", "--dataset.image-size", "8", "--model.encoder.image-size", "8",
    "--model.encoder.width", "4", "--model.denoiser.image-size", "8", "--model.denoiser.channels", "8",
    "--model.denoiser.head-dim", "8", "--model.denoiser.num-groups", "4", "--model.denoiser.attention-resolutions", "4",
    "--model.denoiser.dropout", "0.1", "--model.latent.dim", "12", "--optim.warmup-images", "32",
]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(out: Path, launcher: list[str]) -> list[dict[str, float]]:
    command = [sys.executable, *launcher, "-m", "soda_engine.cli", *SETTINGS, "--out", str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    one, two = run(tmp_path / "one", []), run(tmp_path / "two", TORCHRUN)
    assert len(one) == len(two) == 6
    for expected, got in zip(one, two, strict=True):
        for name in ("loss", "grad_norm_encoder", "grad_norm_denoiser"):
            assert got[name] == pytest.approx(expected[name], rel=2e-4), (name, expected["images"])
    # Adam's first steps turn rounding in tiny gradients into full steps: weights agree to a few learning rates.
    expected_weights, weights = load(tmp_path / "one").state_dict(), load(tmp_path / "two").state_dict()
    assert expected_weights.keys() == weights.keys()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=3e-3, msg=name)
