"""A whole sampling loop with a denoiser of this project's: launched step by step, and replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import timers
from benchmarks.accuracy import relative_error
from benchmarks.cases import DTYPES
from benchmarks.families import LOOPS
from benchmarks.providers import BASELINE
from benchmarks.records import describe_environment, new_row
from benchmarks.tables import table
from soda_engine.diffusion.guidance import guided
from soda_engine.diffusion.samplers import sample
from soda_engine.models.soda import Soda
from soda_engine.presets import PRESETS

OP, GRAPHED = "sampling_loop", "graphed"
_AGAIN = "eager, again"
_MOST_DIFFERENCE = 1e-5
"""Of images by the two, relative: a library may choose another algorithm for a step that is captured."""


@dataclass(frozen=True, kw_only=True)
class LoopCase:
    """A preset's denoiser, untrained, and a number of images and steps."""

    shape_set: str
    preset: str
    batch: int
    num_steps: int
    method: str = "ddim"
    cfg_scale: float = 1.5

    @property
    def id(self) -> str:
        """In words: `cifar/64 images 50 ddim steps`."""
        return f"{self.shape_set}/{self.batch} images {self.num_steps} {self.method} steps"

    def to_dict(self, dtype: str) -> dict[str, Any]:
        """What identifies the case in a row of results."""
        return {"id": self.id, "set": self.shape_set, "N": self.batch, "layout": "nchw", "dtype": dtype}


LOOP_CASES = {
    "cifar": (
        LoopCase(shape_set="cifar", preset="cifar10", batch=16, num_steps=50),
        LoopCase(shape_set="cifar", preset="cifar10", batch=256, num_steps=50),
        LoopCase(shape_set="cifar", preset="cifar10", batch=16, num_steps=20, method="dpmpp_2m"),
    ),
    "soda-64": (LoopCase(shape_set="soda-64", preset="imagenet64", batch=16, num_steps=50),),
    "tiny": (
        LoopCase(shape_set="tiny", preset="digits", batch=4, num_steps=5),
        LoopCase(shape_set="tiny", preset="digits", batch=4, num_steps=5, method="ddpm"),
    ),
}


def loop_cases(shape_sets: Sequence[str] | None, device: torch.device) -> list[LoopCase]:
    """List the loops of some shape sets; if not given, of those that the device can bear.

    Raises:
        ValueError: a shape set has none.
    """
    usual = ("cifar", "soda-64") if device.type == "cuda" else ("tiny",)
    for name in shape_sets or ():
        if name not in LOOP_CASES:
            raise ValueError(f"{name} is no shape set of {LOOPS}, which has {', '.join(LOOP_CASES)}")
    return [case for name in shape_sets or usual for case in LOOP_CASES[name]]


def loop_rows(
    cases: Sequence[LoopCase], device: torch.device, dtype: str, *, budget_s: float, min_rounds: int
) -> Iterator[list[dict[str, Any]]]:
    """Time every loop both ways, in turn, and yield the rows of one; a graph's capture is part of its time.

    Args:
        dtype: of weights and images.
    """
    env = describe_environment(device)
    for case in cases:
        run = _loop(case, device, DTYPES[dtype])
        row = new_row(
            suite=LOOPS, op=OP, mode="fwd", timer="wall", env=env, case=case.to_dict(dtype),
            config={"preset": case.preset, "num_steps": case.num_steps, "method": case.method,
                    "cfg_scale": case.cfg_scale},
        )  # fmt: skip
        steps: dict[str, Callable[[], Tensor]] = {BASELINE: partial(run, graphed=False)}
        expected = steps[BASELINE]()
        rows = {BASELINE: row | {"provider": BASELINE, "status": "ok"}}
        rows[GRAPHED] = row | {"provider": GRAPHED} | _graphed(run, steps, expected)
        steps[_AGAIN] = steps[BASELINE]
        times = timers.wall(steps, device=device, budget_s=budget_s, min_rounds=min_rounds)
        spread = timers.spread(times[BASELINE], times[_AGAIN])
        for name in rows.keys() & times.keys():
            rows[name]["stats"] = timers.summarize(times[name]) | {"aa_spread": spread}
            if name != BASELINE:
                beside = timers.pair(times[name], times[BASELINE], times[_AGAIN])
                rows[name]["paired"] = {"to": BASELINE, **beside}
        yield list(rows.values())


def _graphed(
    run: Callable[..., Tensor], steps: dict[str, Callable[[], Tensor]], expected: Tensor
) -> dict[str, Any]:
    """Check the graphed loop, add it to the steps if it is right, and return what its row says of that."""
    if expected.device.type != "cuda":
        return {"status": "unavailable", "reason": "CUDA graphs need a GPU"}
    first, again = run(graphed=True), run(graphed=True)
    error = relative_error(first, expected)
    passes = error <= _MOST_DIFFERENCE
    check = {
        "rel_l2": error, "ratio_to_torch": None, "worst": "images", "pass": passes,
        "bitwise_rerun": torch.equal(first, again),
    }  # fmt: skip
    if not passes:
        return {"check": check, "status": "invalid", "reason": f"its images are off from eager's by {error:.3g}"}
    steps[GRAPHED] = partial(run, graphed=True)
    return {"check": check, "status": "ok"}


def _loop(case: LoopCase, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return the loop as a function of `graphed`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Soda(PRESETS[case.preset].model).eval().to(device, dtype)
        shape = model.config.denoiser
        x_T = torch.randn(case.batch, shape.in_channels, shape.image_size, shape.image_size).to(device, dtype)
        z = torch.randn(case.batch, model.config.latent.dim).to(device, dtype)
    every, none = torch.ones(1, model.num_sections, device=device), torch.zeros(1, model.num_sections, device=device)
    denoise = guided(model.denoiser_for(case.num_steps), z, every, none, case.cfg_scale)
    return partial(
        sample, denoise, x_T, model.schedule, num_steps=case.num_steps, method=case.method,
        target=model.config.diffusion.target, cfg_scale=case.cfg_scale, seed=1,
        sample_ids=torch.arange(case.batch, device=device),
    )  # fmt: skip


def loop_table(rows: Sequence[dict[str, Any]]) -> str:
    """Write a line for each loop, and why a way of it was not timed."""
    lines = []
    for case_id in dict.fromkeys(row["case"]["id"] for row in rows):
        found = {row["provider"]: row for row in rows if row["case"]["id"] == case_id}
        eager, graphed = (found[name]["stats"]["p50"] for name in (BASELINE, GRAPHED))
        spread = found[BASELINE]["stats"]["aa_spread"]
        lines.append([
            case_id, *("-" if time is None else f"{time / 1e3:,.1f}" for time in (eager, graphed)),
            "-" if graphed is None else f"{eager / graphed:.2f}x", "-" if spread is None else f"{spread:.1%}",
            found[BASELINE]["reason"] or found[GRAPHED]["reason"] or "",
        ])  # fmt: skip
    header = ["case", "eager", "graphed", "vs eager", "A/A", "not timed"]
    return f"{OP}, {rows[0]['case']['dtype']}, timer wall, median ms of a loop\n{table(header, lines)}"
