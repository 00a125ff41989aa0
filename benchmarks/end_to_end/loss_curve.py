"""Losses of the reference path and of this engine over the same images and the same noise, step by step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import relative_error
from benchmarks.end_to_end.cases import LOSS_CURVE
from benchmarks.end_to_end.plain import keyed_draws
from benchmarks.end_to_end.plain_training import PlainTrainer
from benchmarks.end_to_end.problems import LAYOUTS, EndToEndProblem
from benchmarks.providers import OURS
from benchmarks.records import new_row
from soda_engine.data.loaders import Batch, train_loader
from soda_engine.train.trainer import Trainer

REFERENCE = "reference"


def curve_rows(problem: EndToEndProblem, num_steps: int, constants: dict[str, Any]) -> list[dict[str, Any]]:
    """Train both for some steps from the same weights, and return a row with `losses` for each."""
    case, config = problem.case, problem.case.run_config(str(problem.folder / "curve"), problem.device.type, "fp32")
    trainer = Trainer(config)
    trainer.model.load_state_dict(problem.weights.state_dict())
    loader = train_loader(trainer.train_set, batch_size=case.batch, seed=config.seed)
    batches = [batch for batch, _ in zip(loader, range(num_steps), strict=False)]
    ours = []
    for batch in batches:
        trainer.step(batch)
        ours.append(trainer.read()["loss"])
    plain = {name: plain_losses(problem, layout, batches) for name, layout in LAYOUTS.items()}
    reference = plain["nchw"]
    # Rounding makes two runs of one thing part too: by how much is seen from the reference path in its other layout.
    error, own_error = (
        relative_error(torch.tensor(losses), torch.tensor(reference)) for losses in (ours, plain["channels_last"])
    )
    row = new_row(**constants, op=LOSS_CURVE, case=case.to_dict("train_step", "fp32"), mode="fwd+bwd", status="ok")
    check = {"rel_l2": error, "ratio_to_torch": error / own_error if own_error else None, "worst": "losses"}
    return [
        row | {"provider": OURS, "losses": ours, "check": row["check"] | check},
        row | {"provider": REFERENCE, "losses": reference},
    ]


def plain_losses(problem: EndToEndProblem, layout: torch.memory_format, batches: list[Batch]) -> list[float]:
    """Train the reference path with the engine's draws and return the loss of each step."""
    config = problem.case.run_config("", problem.device.type, "fp32")
    trainer = PlainTrainer(problem.model(), config, layout)

    def draws(batch: Batch, step: int, target: Tensor) -> Any:
        ids = batch.sample_ids.to(problem.device)
        return keyed_draws(trainer.model, target, seed=config.seed, sample_ids=ids, step=step)

    return [
        float(trainer.step(batch, partial(draws, batch, step)).mean()) for step, batch in enumerate(batches)
    ]
