"""Training under a budget: both paths, interrupted and resumed, with rows that a report can read."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import train_cifar10
from benchmarks.checkout import ROOT
from benchmarks.result_files import read_results
from benchmarks.resuming import read_lines
from benchmarks.training.budget import PATHS, Budget, Pretraining, budget_config
from soda_engine.presets import PRESETS
from soda_engine.train.checkpoint import Progress
from soda_engine.train.trainer import Trainer
from tests.engine.tiny import tiny_run

TINY = dataclasses.replace(tiny_run(Path("unused")), batch_size=16, total_images=10_000)


@pytest.fixture(autouse=True)
def tiny_preset() -> Any:
    with patch.dict(PRESETS, {"tiny": TINY}):
        yield


def run(out: Path, *more: str) -> int:
    arguments = ["--data", "digits", "--preset", "tiny", "--device", "cpu", "--out", str(out), "--probe-images", "120",
                 "--probe-epochs", "2", *more]  # fmt: skip
    return train_cifar10.main(arguments)


def interrupted_at(step: int, number: int) -> Any:
    """Have this process sent a signal while a trainer is in the given step."""
    take_step = Trainer.step

    def step_and_interrupt(self: Trainer, *args: Any) -> None:
        if self.progress.step == step:
            os.kill(os.getpid(), number)
        take_step(self, *args)

    return patch.object(Trainer, "step", step_and_interrupt)


def test_both_paths_are_interrupted_and_go_on_to_the_end(tmp_path: Path, capsys: Any) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    limits = ("--max-images", "96", "--budget-minutes", "60")
    assert run(whole, *limits) == 0
    with interrupted_at(2, signal.SIGTERM):  # each path in its third step, the reference after ours was evaluated
        assert run(cut, *limits) == 130
        assert run(cut, *limits) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    assert [len(read_lines(cut / f"{path}.jsonl")) for path in ("ours", "reference")] == [1, 0]
    assert run(cut, *limits) == 0
    for path in ("ours", "reference"):
        (expected,), (row,) = (read_results(out / f"{path}.jsonl").rows for out in (whole, cut))
        assert (row["suite"], row["op"], row["provider"], row["status"]) == ("train", "cifar10", path, "ok")
        assert row["images"] == 96 and row["train_seconds"] > 0 and row["evaluation_seconds"] > 0
        assert row["images_per_s"] == pytest.approx(96 / row["train_seconds"])
        for name in ("linear_probe", "knn", "loss"):  # the draws of both are functions of seed and step
            assert row[name] == expected[name]
        assert 0.1 < row["knn"] <= 1
    assert (cut / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    before = (cut / "ours.jsonl").read_bytes()
    assert run(cut, *limits) == 0  # nothing is left to do
    assert (cut / "ours.jsonl").read_bytes() == before


def test_the_budget_is_cut_into_slices_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    asked = []

    def train(self: Trainer) -> None:  # a little less than was asked for, as the log takes its share
        asked.append(60 * self.config.max_minutes)
        self.progress.seconds += 0.995 * asked[-1]
        self.progress.images += 16

    def train_for(minutes: float) -> list[float]:
        more = ("--path", "ours", "--eval-every-minutes", "2", "--budget-minutes", str(minutes))
        with patch.object(Trainer, "train", train), patch.object(Trainer, "_resume", lambda self: progress):
            assert run(tmp_path, *more) == 0
        return [row["train_seconds"] for row in read_lines(tmp_path / "ours.jsonl")]

    progress = Progress()
    assert train_for(5) == pytest.approx([120, 240, 300], rel=0.01)
    assert asked == pytest.approx([120, 120, 60], rel=0.02)
    assert train_for(8) == pytest.approx([120, 240, 300, 360, 480], rel=0.01)  # on the grid again
    assert len(asked) == 5


def test_evaluations_of_steps_that_were_lost_are_dropped(tmp_path: Path) -> None:
    assert run(tmp_path, "--path", "ours", "--max-images", "32", "--budget-minutes", "60") == 0
    with (tmp_path / "ours.jsonl").open("a") as file:
        file.write(json.dumps(read_lines(tmp_path / "ours.jsonl")[0] | {"images": 48}) + "\n" + '{"suite": "tr')
    assert run(tmp_path, "--path", "ours", "--max-images", "64", "--budget-minutes", "60") == 0
    assert [row["images"] for row in read_lines(tmp_path / "ours.jsonl")] == [32, 64]


class _Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ours: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "soda_kernels":
            self.ours.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_of_the_reference_path_uses_no_kernel_of_ours_but_for_views(tmp_path: Path) -> None:
    used, budget = {}, Budget(minutes=1, every_minutes=1, probe_images=10)
    for path in train_cifar10.PATHS:
        config = dataclasses.replace(TINY, out=str(tmp_path / path))
        trainer = Pretraining(path, "tiny", config, budget, tmp_path / f"{path}.jsonl").trainer
        with _Ops() as ops:
            trainer.step(next(trainer._batches()))
        assert trainer.read()["grad_norm_encoder"] >= 0
        used[path] = ops.ours
    assert {name for name in used["reference"] if not name.startswith("philox")} == set()
    assert any("norm" in name for name in used["ours"]), used["ours"]


def test_the_command_names_the_paths_there_are() -> None:
    assert train_cifar10.PATHS == PATHS  # it can say so without importing PyTorch


def test_a_warm_up_is_a_share_of_the_budget() -> None:
    def warm_up(minutes: float, preset: str) -> int:
        budget = Budget(minutes=minutes, every_minutes=1, probe_images=10)
        config = budget_config(preset, budget, data=None, out=Path("out"), device="cpu", seed=0, max_images=None)
        assert config.cadence.probe_images == config.cadence.sample_images == 0
        return config.optim.warmup_images

    assert warm_up(10, "cifar10-small") == 4_500 and warm_up(0.01, "cifar10-small") == 128
    assert warm_up(1000, "cifar10-small") == PRESETS["cifar10-small"].optim.warmup_images
    assert warm_up(1, "digits") == PRESETS["digits"].optim.warmup_images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget-minutes", "0"], "--budget-minutes is 0; it must be above 0"),
        (["--preset", "none"], "--preset is 'none'; accepted are digits"),
        (["--data", "absent.parquet"], "data source 'absent.parquet' does not exist"),
        (["--path", "theirs"], "argument --path: invalid choice: 'theirs'"),
        (["--draw", "absent.jsonl"], "there is no evaluation to draw"),
    ],
    ids=["budget", "preset", "data", "path", "draw"],
)
def test_wrong_input_gets_one_line(tmp_path: Path, capsys: Any, arguments: list[str], message: str) -> None:
    try:
        code = run(tmp_path, *arguments)
    except SystemExit as error:
        code = int(str(error.code))
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and message in line


def test_it_is_called_by_its_path_too() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "train_cifar10.py"), "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert "wall-clock budget" in found.stdout and "--eval-every-minutes" in found.stdout
