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
    "--cadence.sample-images", "0", "--cadence.probe-images", "0",
]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(out: Path, launcher: list[str], *more: str) -> list[dict[str, float]]:
    command = [sys.executable, *launcher, "-m", "soda_engine.cli", *SETTINGS, "--out", str(out), *more]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    one, two = run(tmp_path / "one", []), run(tmp_path / "two", TORCHRUN)
    assert len(one) == len(two) == 6
    for expected, got in zip(one, two, strict=True):
        # The first step sees the same weights; later ones amplify its rounding through Adam's division.
        rel = 2e-6 if expected["step"] == 1 else 2e-4
        for name in ("loss", "grad_norm_encoder", "grad_norm_denoiser"):
            assert got[name] == pytest.approx(expected[name], rel=rel, abs=1e-7), (name, expected["images"])
    # Adam's first steps turn rounding in tiny gradients into full steps: weights agree to a few learning rates.
    expected_weights, weights = load(tmp_path / "one").state_dict(), load(tmp_path / "two").state_dict()
    assert expected_weights.keys() == weights.keys()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.slow
def test_accumulation_and_a_resume_in_two_processes(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", TORCHRUN, "--accumulate", "3")
    run(tmp_path / "cut", TORCHRUN, "--accumulate", "3", "--max-minutes", "0")
    cut = run(tmp_path / "cut", TORCHRUN, "--accumulate", "3")
    assert [line["images"] for line in cut] == [line["images"] for line in whole]
    assert [line["loss"] for line in cut] == pytest.approx([line["loss"] for line in whole], rel=1e-4)
