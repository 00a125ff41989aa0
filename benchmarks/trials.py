"""How often `compare` is right on this machine: pairs of runs of one code, and runs with a slowdown planted in ours.

Each run is a process of its own, as runs that people compare are: what a process gets of memory and caches differs from
the next one's by more than rounds within one show. A run during which other programs took more than a tenth of the
processors is made again, before anything of it is compared. The same command again goes on where it was left.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import timers
from benchmarks.cases import CPU_SETS
from benchmarks.commands.arguments import Parser, result_file
from benchmarks.comparison import Comparison, Verdict, compare
from benchmarks.families import GROUP_NORM
from benchmarks.providers import BASELINE, OURS
from benchmarks.records import append_row, describe_environment
from benchmarks.report.contents import name_of
from benchmarks.result_files import ResultFile, read_results
from benchmarks.steps import Step
from benchmarks.suite import Pace, suite_rows
from benchmarks.tables import table
from soda_engine.records import write_json

NUM_CASES = 6
MODES = ("fwd", "fwd+bwd")
PACE = Pace(budget_s=0.6, min_rounds=7, warm_up_s=0.3, quick_ceilings=True)
MOST_ELSEWHERE = 0.1
"""Share of the processors' time that other programs may take during a run; a run with more is made again."""
MOST_TRIES = 5


def slowed(step: Step, slowdown: float) -> Step:
    """Return a step that takes this share longer than it does: it waits, busily, as long as that."""

    def run() -> Any:
        start = time.perf_counter_ns()
        results = step()
        end = start + (1 + slowdown) * (time.perf_counter_ns() - start)
        while time.perf_counter_ns() < end:
            pass
        return results

    return run


def busy_s() -> tuple[float, float]:
    """Return the seconds that all processors were busy or stolen since the start, and those of this process."""
    user, nice, system, _, _, irq, softirq, steal = (
        int(text) for text in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def measure(path: Path, slowdown: float) -> None:
    """Time the smallest cases of group norm, ours slowed, into a file that appears whole.

    Each row's environment says which share of the processors' time other programs took.
    """
    cpu = torch.device("cpu")
    cases = GROUP_NORM.cases(CPU_SETS, GROUP_NORM.layouts, "fp32", timed=True, on_cpu=True)
    cases = sorted(cases, key=lambda case: GROUP_NORM.floor_bytes(case, "fwd"))[:NUM_CASES]
    providers = [provider for provider in GROUP_NORM.providers if provider.name in (OURS, BASELINE)]
    wall: Callable[..., dict[str, list[float]]] = timers.wall

    def planted(steps: dict[str, Step], **options: Any) -> dict[str, list[float]]:
        return wall(steps | {OURS: slowed(steps[OURS], slowdown)} if slowdown else steps, **options)

    start, (all_before, own_before) = time.monotonic(), busy_s()
    with mock.patch.object(timers, "wall", planted):
        rows = [row for rows in suite_rows(GROUP_NORM, cases, MODES, cpu, PACE, providers) for row in rows]
    all_after, own_after = busy_s()
    elsewhere = (all_after - all_before) - (own_after - own_before)
    share = elsewhere / (time.monotonic() - start) / (os.cpu_count() or 1)
    unfinished = path.with_name(f".unfinished-{path.name}")
    unfinished.unlink(missing_ok=True)
    for row in rows:
        append_row(unfinished, row | {"env": row["env"] | {"busy_elsewhere": share}})
    unfinished.rename(path)


def calm_run(path: Path, slowdown: float) -> ResultFile:
    """Make a run in a process of its own unless it is there, and again while other programs disturb it."""
    for attempt in range(1, MOST_TRIES + 1):
        if not path.exists():
            print(f"{path.name}, try {attempt}", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "benchmarks.trials", "--once", str(path), "--slowdown", str(slowdown)]
            subprocess.run(command, check=True)
        file = read_results(path)
        if file.environment["busy_elsewhere"] <= MOST_ELSEWHERE:
            return file
        path.unlink()
    raise SystemExit(f"other programs took more than {MOST_ELSEWHERE:.0%} of the processors in {MOST_TRIES} runs")


def trial(folder: Path, index: int, slowdown: float) -> dict[str, Any]:
    """Make the three runs of one trial, and compare the second and the third with the first."""
    first, again, slow = (
        calm_run(folder / f"{index:02}-{name}.jsonl", planted)
        for name, planted in (("first", 0.0), ("again", 0.0), ("slowed", slowdown))
    )
    equal, planted_ones = compare([first], [again]), compare([first], [slow])
    return {
        "trial": index, "quiet": equal.is_quiet, "caught": planted_ones.is_regression,
        "busy_elsewhere": [file.environment["busy_elsewhere"] for file in (first, again, slow)],
        "usual_threshold": planted_ones.usual_threshold, "rows": len(planted_ones.changes),
        "rows_caught": len(planted_ones.slower),
        "equal": _numbers(equal), "slowed": _numbers(planted_ones),
    }  # fmt: skip


def _numbers(found: Comparison) -> list[dict[str, Any]]:
    """List what was found of each row, and last of all rows together."""
    named: list[tuple[str, Verdict]] = [(name_of(change.before), change) for change in found.changes]
    named += [(f"all rows of {each.provider}", each) for each in found.together]
    return [
        {"row": name, "time": each.time, "least": each.least, "relative": each.relative, "agreed": each.agreed,
         "threshold": each.threshold}
        for name, each in named
    ]  # fmt: skip


def nearest(trials: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the largest |agreed change| over its threshold of equal runs, and the least of a slowed run's largest."""
    equal, slow = (
        [max(abs(row["agreed"]) / row["threshold"] for row in trial[kind]) for trial in trials]
        for kind in ("equal", "slowed")
    )
    return max(equal), min(slow)


def main() -> None:
    """Run the trials, print what came of each, and keep it."""
    parser = Parser(description=__doc__.split("\n")[0], prog="python -m benchmarks.trials")
    parser.add_argument("--out", type=Path, help="a folder for the files of the runs")
    parser.add_argument("--trials", type=int, default=10, help="of three runs each, %(default)s if not given")
    parser.add_argument("--slowdown", type=float, default=0.2, help="share of our own time, %(default)s if not given")
    parser.add_argument("--json", type=result_file, help="write what came of them to this file")
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once is not None:
        measure(options.once, options.slowdown)
        return
    if options.out is None:
        parser.error("--out DIR is needed")
    options.out.mkdir(parents=True, exist_ok=True)
    found = [trial(options.out, index, options.slowdown) for index in range(1, options.trials + 1)]
    print(table(
        ("trial", "equal runs", "slowed run", "rows caught"),
        ((str(each["trial"]), "quiet" if each["quiet"] else "NOT quiet", "caught" if each["caught"] else "MISSED",
          f"{each['rows_caught']} of {each['rows']}") for each in found),
    ))  # fmt: skip
    quiet, caught = (sum(each[key] for each in found) for key in ("quiet", "caught"))
    most, least = nearest(found)
    print(f"quiet {quiet} of {len(found)}, caught {caught} of {len(found)}; of the threshold equal runs differed by "
          f"{most:.2f} at most, slowed ones by {least:.2f} at least")  # fmt: skip
    if options.json is not None:
        write_json(options.json, {
            "slowdown": options.slowdown, "quiet": quiet, "caught": caught, "of": len(found),
            "equal_over_threshold_at_most": most, "slowed_over_threshold_at_least": least, "trials": found,
            "env": describe_environment(torch.device("cpu")),
        })  # fmt: skip


if __name__ == "__main__":
    main()
