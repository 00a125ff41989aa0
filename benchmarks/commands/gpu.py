"""The command `gpu`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.checkout import CARRIED, ROOT, carried_commit
from benchmarks.commands.arguments import add_command, names
from benchmarks.gpu.chunks import interruptible, run_chunk
from benchmarks.gpu.preflight import environment_of_parts, examine, provide_library
from benchmarks.gpu.rounds import DONE, FAILED, SKIPPED, UNFINISHED, Round, alone_in, folder_name
from benchmarks.gpu.stages import STAGES, Part, list_parts

WORK_REMAINS = 3
MOST_FRUITLESS = 3
"""Chunks of a part that end before their time, or use it all, and add nothing to the results."""


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands, "gpu", run,
        "Do everything on a GPU machine, which may go away at any moment and needs no network: the GPU tests, the "
        "tuner, the suites norm, attention, diffusion, sampling and e2e, and trainings on CIFAR-10. Work is done in "
        "chunks, and results are kept as they come; the same command again goes on. Exits 0 when all is done, 1 when "
        f"all is done and something was wrong, {WORK_REMAINS} when work remains, 2 where the machine lacks something.",
    )  # fmt: skip
    parser.add_argument("--stages", type=names("stage", STAGES), default=STAGES, metavar="STAGES",
                        help=f"of {', '.join(STAGES)}; all if not given")  # fmt: skip
    parser.add_argument("--minutes", type=_minutes, metavar="M",
                        help="end this call in time, whatever remains; no limit if not given")  # fmt: skip
    parser.add_argument("--stage-minutes", type=_minutes, default=9.0, metavar="M",
                        help="the longest that one chunk takes; %(default)g if not given")  # fmt: skip
    parser.add_argument("--train-minutes", type=_minutes, default=10.0, metavar="M",
                        help="the budget of each training; %(default)g if not given")  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="DIR",
                        help="CIFAR-10 as parquet files; carried/cifar10 if it is there")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="where results and the state go; benchmarks/results/<device> if not given. Another folder "
                             "begins another round")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true",
                        help="every stage with tiny sizes on a CPU; results go to runs/gpu-rehearsal")  # fmt: skip


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no positive number of minutes")
    return value


def run(options: argparse.Namespace) -> int:
    """Look at the machine, then do one chunk after another."""
    begun = time.monotonic()
    left = _countdown(begun, options.minutes)
    commit = _commit()
    machine = examine(commit, rehearse=options.rehearse)
    print("\n".join(machine.lines), flush=True)
    if machine.short:
        raise ValueError("; ".join(machine.short))
    print(f"library     {provide_library(min(left(), 60 * options.stage_minutes))}", flush=True)
    usual = "runs/gpu-rehearsal" if options.rehearse else f"benchmarks/results/{folder_name(machine.device)}"
    folder = options.out or ROOT / usual
    data = options.data or (CARRIED / "cifar10" if (CARRIED / "cifar10").is_dir() else None)
    if data is not None and not data.is_dir():
        raise ValueError(f"--data is {data}, which is no folder")
    with alone_in(folder) as lock, interruptible():
        progress = Round(folder, commit, machine.device)
        parts = list_parts(progress.places, stages=options.stages, data=data, train_minutes=options.train_minutes,
                           rehearse=options.rehearse)  # fmt: skip
        for part in parts:
            progress.part(part.name)  # so that the file tells what has not begun
        try:
            for part in parts:
                _do(part, progress, left, options, lock)
        finally:
            names_of_parts = [part.name for part in parts]
            print(f"\n{progress.describe(names_of_parts)}\nresults in {folder}", flush=True)
    statuses = {progress.part(name)["status"] for name in names_of_parts}
    if UNFINISHED in statuses:
        print("work remains: the same command again goes on", flush=True)
        return WORK_REMAINS
    return 1 if any(progress.part(name)["code"] for name in names_of_parts) or FAILED in statuses else 0


def _do(part: Part, progress: Round, left: Callable[[], float], options: argparse.Namespace, lock: int) -> None:
    """Do a part, chunk by chunk, while there is time."""
    state = progress.part(part.name)
    if state["status"] in (DONE, FAILED):
        return
    if part.missing is not None:
        state |= {"status": SKIPPED, "reason": part.missing}
        progress.keep()
        print(f"\n== {part.name}: skipped: {part.missing} ==", flush=True)
        return
    state |= {"status": UNFINISHED, "reason": None}
    longest = 60 * options.stage_minutes
    # Less would go by before there is a result: Python, PyTorch and the case's kernels come first.
    least, grace = (2.0, 3.0) if options.rehearse else (60.0, 30.0)
    while state["status"] == UNFINISHED and (seconds := min(longest, left())) >= least + grace:
        print(f"\n== {part.name}, chunk {state['chunks'] + 1}, at most {seconds / 60:.1f} minutes ==", flush=True)
        state["chunks"] += 1
        progress.keep()
        size = progress.results_size()
        ended = run_chunk(
            [sys.executable, *part.arguments], environment=environment_of_parts(rehearse=options.rehearse),
            seconds=seconds, grace_s=grace, held=(lock,),
        )  # fmt: skip
        state["seconds"] += ended.seconds
        state["code"] = ended.code
        if ended.code in part.done and not (ended.was_cut and ended.code):
            state |= {"status": DONE, "reason": f"ended with {ended.code}" if ended.code else None}
        else:
            was_short = ended.was_cut and seconds < longest
            fruitless = progress.results_size() == size and not was_short
            state["fruitless"] = state["fruitless"] + 1 if fruitless else 0
            state["reason"] = "its time was up" if ended.was_cut else f"ended with {ended.code}"
            if state["fruitless"] == MOST_FRUITLESS:
                state |= {"status": FAILED, "reason": f"{MOST_FRUITLESS} chunks added nothing; {state['reason']}"}
        progress.keep()


def _countdown(begun: float, minutes: float | None) -> Callable[[], float]:
    """Return how many seconds are left of a number of minutes."""
    return lambda: float("inf") if minutes is None else begun + 60 * minutes - time.monotonic()


def _commit() -> str | None:
    import torch

    from soda_engine.environment import environment

    return environment(torch.device("cpu"))["git"] or carried_commit()
