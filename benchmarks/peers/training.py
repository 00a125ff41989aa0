"""A training step of a `UNet2DModel` on this CPU, with the kernels in it and without, in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import timers
from benchmarks.end_to_end.suite import keep_memory
from benchmarks.peers.counting import LAYOUTS
from benchmarks.peers.models import SMALL_UNETS, small_unet
from benchmarks.tables import table

WAYS = {f"{who}, {layout}": (who == "optimized", layout) for who in ("plain", "optimized") for layout in LAYOUTS}


def step_of(model_name: str, optimized: bool, layout: str, batch: int) -> timers.Step:
    """Return a training step: forward, squared error, backward, AdamW."""
    torch.manual_seed(0)
    model, (sample, timestep) = small_unet(model_name, batch, LAYOUTS[layout])
    if optimized:
        from soda_kernels.integrations.diffusers import optimize

        optimize(model)
    noise = torch.randn_like(sample)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (model(sample, timestep, return_dict=False)[0] - noise).square().mean().backward()
        optimizer.step()

    return step


def training_rows(batch: int, seconds: float, say: Callable[[str], None] = lambda _text: None) -> list[dict[str, Any]]:
    """Time each model's steps in turn, all models in so many seconds: a row each, with its ratio to the faster plain's.

    The first plain way runs a second time, under another name: its ratio to itself is what the machine alone does.
    """
    keep_memory()
    rows = []
    for model_name in SMALL_UNETS:
        say(f"timing {len(WAYS) + 1} training steps of {model_name} in turn for {seconds / len(SMALL_UNETS):.0f} s")
        rows += _rows_of(model_name, batch, seconds / len(SMALL_UNETS))
    return rows


def _rows_of(model_name: str, batch: int, seconds: float) -> list[dict[str, Any]]:
    steps = {name: step_of(model_name, *way, batch) for name, way in WAYS.items()}
    steps["plain, contiguous, again"] = step_of(model_name, False, "contiguous", batch)
    warm_up = min(4.0, seconds / 4)
    times = timers.wall(
        steps, device=torch.device("cpu"), budget_s=seconds - warm_up, min_rounds=3, warm_up_s=warm_up
    )  # fmt: skip
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    best = min((name for name in WAYS if not WAYS[name][0]), key=lambda name: medians[name])
    return [
        {"model": model_name, "way": name, "batch": batch, "stats": timers.summarize(taken), "to": best,
         "paired": timers.pair(taken, times[best])}
        for name, taken in times.items()
    ]  # fmt: skip


def training_table(rows: list[dict[str, Any]]) -> str:
    """Write the rows as a table; the ratio is the median over rounds."""
    return table(("model", "training step", "ms", "ratio to the faster plain one", "20% to 80%"), (
        (row["model"], row["way"], f"{row['stats']['p50'] / 1e3:.1f}", f"{row['paired']['p50']:.3f}",
         f"{row['paired']['p20']:.3f} to {row['paired']['p80']:.3f}")
        for row in rows
    ))  # fmt: skip
