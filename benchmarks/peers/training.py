"""A training step of a `UNet2DModel` on this CPU, with the kernels in it and without, in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import timers
from benchmarks.end_to_end.suite import keep_memory
from benchmarks.peers.counting import LAYOUTS
from benchmarks.peers.models import small_unet
from benchmarks.tables import table

WAYS = {f"{who}, {layout}": (who == "optimized", layout) for who in ("plain", "optimized") for layout in LAYOUTS}


def step_of(optimized: bool, layout: str, batch: int) -> timers.Step:
    """Return a training step: forward, squared error, backward, AdamW."""
    torch.manual_seed(0)
    model, (sample, timestep) = small_unet(batch, LAYOUTS[layout])
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
    """Time the steps in turn for so many seconds in all: a row each, with its ratio to the faster plain one's.

    The first plain way runs a second time, under another name: its ratio to itself is what the machine alone does.
    """
    keep_memory()
    say(f"timing {len(WAYS) + 1} training steps in turn for {seconds:g} s")
    steps = {name: step_of(*way, batch) for name, way in WAYS.items()}
    steps["plain, contiguous, again"] = step_of(False, "contiguous", batch)
    times = timers.wall(
        steps, device=torch.device("cpu"), budget_s=seconds, min_rounds=5, warm_up_s=min(5.0, seconds / 4)
    )
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    best = min((name for name in WAYS if not WAYS[name][0]), key=lambda name: medians[name])
    return [
        {"way": name, "batch": batch, "stats": timers.summarize(taken), "to": best,
         "paired": timers.pair(taken, times[best])}
        for name, taken in times.items()
    ]  # fmt: skip


def training_table(rows: list[dict[str, Any]]) -> str:
    """Write the rows as a table; the ratio is the median over rounds."""
    return table(("training step", "ms", "ratio to the faster plain one", "20% to 80%"), (
        (row["way"], f"{row['stats']['p50'] / 1e3:.1f}", f"{row['paired']['p50']:.3f}",
         f"{row['paired']['p20']:.3f} to {row['paired']['p80']:.3f}")
        for row in rows
    ))  # fmt: skip
