"""Rows of results made up for tests: what a run writes, with times that are given or drawn."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import timers
from benchmarks.records import new_row
from benchmarks.result_files import ResultFile

ENV = {
    "device": "Test CPU", "threads": 2, "torch": "2.13.0", "git": "abc123", "dirty": False,
    "utc": "2026-01-01T00:00:00", "driver": None,
}  # fmt: skip
CEILINGS = {"copy_gbps": 30.0, "matmul_fp32_tflops": 0.2}


def made_row(provider: str, us: float | None, **changed: Any) -> dict[str, Any]:
    """Return a row of one provider, timed if a time is given; its case has a size, as those of a sweep have."""
    case_id = changed.pop("case", "a")
    env = ENV | changed.pop("env", {})
    stats = dict.fromkeys(("p50", "p20", "p80", "min", "n", "aa_spread"))
    if us is not None:
        stats = {"p50": us, "p20": 0.95 * us, "p80": 1.1 * us, "min": 0.9 * us, "n": 50, "aa_spread": 0.05}
    known = {
        "suite": "norm", "op": "norm", "mode": "fwd", "timer": "wall", "status": "ok", "stats": stats,
        "bytes_min": 1000 * (1 + ord(case_id[0])), "flops": 10**6, "ceilings": CEILINGS,
    }  # fmt: skip
    case = {"id": case_id, "layout": "nchw", "dtype": "fp32"}
    return new_row(**{**known, "provider": provider, "case": case, "env": env, **changed})


def made_file(rows: Sequence[dict[str, Any]], folder: str = "test-cpu") -> ResultFile:
    """Return a file that was not read from anywhere."""
    return ResultFile(path=Path(folder, "rows.jsonl"), rows=list(rows))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as `run --json` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Machine:
    """A machine with noise like that of the two cores on which `benchmarks.trials` was run.

    Times of a run are off by a factor of the whole run and by one of each provider and case, as a process gets its
    memory, the baseline's by more: by half of the half-width of ratios within a run. There a load that changes slowly
    makes all of a round slower, and each call has noise of its own.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def run(self, *, slower: float = 0.0, cases: str = "abcdefgh", slow_cases: str = "", drift: float | None = None,
            rounds: int = 120) -> ResultFile:  # fmt: skip
        """Time ours, which is this much slower in some cases, beside the baseline."""
        draw = self.random.gauss
        machine = math.exp(draw(0, 0.015)) if drift is None else drift
        rows = []
        for case in cases:
            factors = {"ours": math.exp(draw(0, 0.015)), "eager": math.exp(draw(0, 0.03))}
            if case in (slow_cases or cases):
                factors["ours"] *= 1 + slower
            factors["again"] = factors["eager"]
            times: dict[str, list[float]] = {name: [] for name in factors}
            load = 0.0
            for _ in range(rounds):
                load = 0.95 * load + draw(0, 0.02)
                for name, factor in factors.items():
                    us = (30.0 if name == "ours" else 100.0) * (1 + ord(case) - ord("a"))
                    times[name].append(us * machine * factor * math.exp(load + draw(0, 0.06)))
            spread = timers.spread(times["eager"], times["again"])
            paired = {"to": "eager", **timers.pair(times["ours"], times["eager"], times["again"])}
            for name in ("ours", "eager"):
                stats = timers.summarize(times[name]) | {"aa_spread": spread}
                rows.append(made_row(name, None, case=case, stats=stats, paired=paired if name == "ours" else None))
        return made_file(rows)
