"""Pretraining under a budget of wall-clock time, with probes of z on the way: one JSON line each.

The trainer, its checkpoints and the probes are the engine's. The reference path puts the model written in PyTorch alone
(`benchmarks.end_to_end.plain`) in the place of the engine's loss, with noise of `torch.randn`; data, views, optimizer
and moving average are the same code for both.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.end_to_end.loss_curve import REFERENCE
from benchmarks.end_to_end.plain import PlainSoda
from benchmarks.providers import OURS
from benchmarks.records import append_row, describe_environment, new_row
from benchmarks.resuming import read_lines
from soda_engine.config import TrainConfig
from soda_engine.data.datasets import open_dataset
from soda_engine.evaluation.features import encode_dataset
from soda_engine.evaluation.probes import knn_probe, linear_probe
from soda_engine.models.soda import Soda
from soda_engine.presets import PRESETS
from soda_engine.train.logging import keep_records
from soda_engine.train.milestones import thinned
from soda_engine.train.trainer import Trainer

SUITE, OP = "train", "cifar10"
PATHS = (OURS, REFERENCE)
EXPECTED_IMAGES_PER_S = {"cifar10-light": 12_000, "cifar10": 4_500, "cifar10-small": 150}
"""For the length of the warm-up. Of the first two nothing was measured: a third of what an H200 does at its ceilings
by `benchmarks.training.phases`, 35,000 and 11,000, and somewhat more for the larger denoiser, which waits less for
memory. Of the last: two cores of an EPYC."""
_WARM_UP_SHARE = 0.05
_NEARLY = 0.99  # of a slice of training: a further call for the rest would only write another checkpoint

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to train, and when and on how much to probe."""

    minutes: float
    """Of training: loading, steps and waiting for them. Evaluations and checkpoints do not count."""
    every_minutes: float
    """Of training between two evaluations."""
    probe_images: int
    """Of train and of test, at most, that an evaluation reads."""
    probe_epochs: int = 50
    """Of the linear probe."""


def budget_config(
    preset: str, budget: Budget, *, data: str | None, out: Path, device: str, seed: int, max_images: int | None
) -> TrainConfig:
    """Return a preset's settings for so many minutes.

    A twentieth of the images that are expected warm up, if the preset does not say fewer. The rate stays constant
    afterwards, since nobody knows beforehand how many images a budget buys; the moving average, whose decay in step i
    is at most (1 + i) / (10 + i), is over the last ninth of the steps and takes the part of a falling rate. So
    `ema_decay` itself binds from 90,000 steps on alone, and stays the paper's.
    """
    config = PRESETS[preset]
    warm_up = config.optim.warmup_images
    if preset in EXPECTED_IMAGES_PER_S:
        expected = EXPECTED_IMAGES_PER_S[preset] * 60 * budget.minutes
        warm_up = min(warm_up, max(config.batch_size, round(_WARM_UP_SHARE * expected)))
    return dataclasses.replace(
        config, data=data or config.data, out=str(out), device=device, seed=seed, tensorboard=False,
        total_images=max_images or config.total_images,
        optim=dataclasses.replace(config.optim, warmup_images=warm_up),
        # Pictures and the trainer's own probes would only take time that is not counted.
        cadence=dataclasses.replace(config.cadence, sample_images=0, probe_images=0),
    )  # fmt: skip


class PlainLosses(nn.Module):
    """The losses of a training step in PyTorch alone, called as the trainer calls a `Soda`.

    Args:
        model: whose weights it trains.
    """

    def __init__(self, model: Soda) -> None:
        super().__init__()
        self.plain = PlainSoda(model)

    def forward(self, source: Tensor, target: Tensor, *, seed: int, sample_ids: Tensor, step: int) -> Tensor:
        # By the step, so that an interrupted run draws what a whole one does; sample ids have no part in it.
        torch.manual_seed(((seed << 32) + step) % 2**64)
        return self.plain(source, target, self.plain.draw(target))


class Pretraining:
    """One path's run in a folder of its own, and the file of its evaluations beside it.

    Args:
        path: "ours" or "reference".
        preset: its name, for the rows.
        config: the run; its `out` is the folder.
        rows: the file of evaluations.

    Attributes:
        found: the evaluations there are, as rows.

    Raises:
        ValueError, FileNotFoundError: as the trainer.
    """

    def __init__(self, path: str, preset: str, config: TrainConfig, budget: Budget, rows: Path) -> None:
        self.path, self.preset, self.budget, self._file = path, preset, budget, rows
        self.trainer = Trainer(config)
        if path == REFERENCE:
            self.trainer.parallel = PlainLosses(self.trainer.model)
        self._test_set = open_dataset(config.data, config.dataset, "test", seed=config.seed)
        # Those of steps that a killed run has to take again would come twice.
        keep_records(rows, self.trainer.progress.images)
        self.found = read_lines(rows)

    @property
    def finished(self) -> bool:
        """Whether the budget is used up, or the images have been seen, and the end has been evaluated."""
        progress, evaluated = self.trainer.progress, self.found[-1]["images"] if self.found else 0
        used_up = progress.seconds >= 60 * self.budget.minutes - (1 - _NEARLY) * 60 * self.budget.every_minutes
        return (used_up or self._complete) and evaluated == progress.images

    @property
    def _complete(self) -> bool:
        return self.trainer.progress.images >= self.trainer.config.total_images

    def advance(self) -> bool:
        """Train to the next evaluation, make it, and append its row.

        Returns:
            False where the user interrupted; the run is saved then, and a `Pretraining` of the same folder goes on.
        """
        trainer, progress, every = self.trainer, self.trainer.progress, 60 * self.budget.every_minutes
        before = self.found[-1]["train_seconds"] if self.found else 0.0
        due = min(60 * self.budget.minutes, every * (round(before / every) + 1))
        while progress.seconds < due - (1 - _NEARLY) * every and not self._complete:
            trainer.config = dataclasses.replace(trainer.config, max_minutes=(due - progress.seconds) / 60)
            trainer.train()
            if trainer.interrupted:
                return False
        self._evaluate()
        return True

    def _evaluate(self) -> None:
        """Probe the moving average of the weights."""
        trainer, progress, budget = self.trainer, self.trainer.progress, self.budget
        config, device = trainer.config, trainer.processes.device
        start = time.monotonic()
        train, test = (
            encode_dataset(trainer.ema.model, thinned(part, budget.probe_images), device=device)
            for part in (trainer.train_set, self._test_set)
        )
        linear = linear_probe(train, test, epochs=budget.probe_epochs, seed=config.seed, device=device)
        knn = knn_probe(train, test, k=min(20, len(train)), device=device)
        seconds = time.monotonic() - start
        case = {
            "id": f"{self.preset}/{config.batch_size}", "set": self.preset, "N": config.batch_size,
            "S": config.model.encoder.image_size, "C": config.dataset.channels,
            "dtype": "bf16" if trainer.bf16 else "fp32", "budget_minutes": budget.minutes, "seed": config.seed,
            "train_images": len(trainer.train_set), "probe_train_images": len(train), "probe_test_images": len(test),
        }  # fmt: skip
        row = new_row(
            suite=SUITE, op=OP, case=case, provider=self.path, mode="fwd+bwd", timer="wall", status="ok",
            variant="channels_last" if config.channels_last else "nchw",
            config={"lr": config.optim.lr, "warmup_images": config.optim.warmup_images, "linear_lr": linear.lr},
            env=describe_environment(device),
        ) | {
            "train_seconds": progress.seconds,
            "evaluation_seconds": seconds + (self.found[-1]["evaluation_seconds"] if self.found else 0.0),
            "images": progress.images, "images_per_s": progress.images / progress.seconds,
            "linear_probe": linear.accuracy, "knn": knn.accuracy, "loss": self._loss(),
        }  # fmt: skip
        append_row(self._file, row)
        self.found.append(row)

    def _loss(self) -> float | None:
        """Return the mean loss of the last line of the run's log; None where it has none yet."""
        lines = read_lines(Path(self.trainer.config.out) / "metrics.jsonl")
        losses = [line["window_loss"] for line in lines if line["kind"] == "train"]
        return losses[-1] if losses else None
