"""`--profile`: phases and kernel calls as named ranges, and a trace of a few steps in the run's folder.

The phases of a training step are data, views, encode, denoise, loss, backward, optimizer and ema, then checkpoint;
sampling consists of denoise and the kernel sampler_step. Nothing of it changes a result.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from soda_kernels import span, use_ranges

__all__ = ["TRACED_STEPS", "WARM_UP_STEPS", "span", "traced"]

# The first steps compile kernels, let libraries choose theirs and make the optimizer's state.
WARM_UP_STEPS = 5
TRACED_STEPS = 5

_TABLE_ROWS = 40


@contextlib.contextmanager
def traced(
    folder: Path, say: Callable[[str], object], *, enabled: bool = True, warm_up: int = WARM_UP_STEPS
) -> Iterator[Callable[[], None]]:
    """Name ranges, and trace `TRACED_STEPS` steps after `warm_up` others.

    Writes trace.json, which ui.perfetto.dev and chrome://tracing open, and operators.txt, a table of the ops and ranges
    that took longest. What an interrupted run has traced by then is written too.

    Args:
        folder: for the two files; those of an earlier trace are replaced.
        say: told in one line where they are, or why there are none.
        enabled: False makes it do nothing.
        warm_up: at least 1.

    Yields:
        What to call after each step.

    Raises:
        OSError: the folder cannot be written to.
    """
    if not enabled:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines at each start and stop
    steps, written = 0, False

    def write(profiled: profile) -> None:
        nonlocal written
        written = steps > warm_up  # else the profiler was ready, and no step came
        if not written:
            return
        profiled.export_chrome_trace(str(folder / "trace.json"))
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiled.key_averages().table(sort_by=by, row_limit=_TABLE_ROWS, max_name_column_width=60)
        (folder / "operators.txt").write_text(table + "\n")
        say(f"traced {min(steps - warm_up, TRACED_STEPS)} steps: {folder / 'trace.json'}, {folder / 'operators.txt'}")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    window = schedule(wait=warm_up - 1, warmup=1, active=TRACED_STEPS, repeat=1)
    with use_ranges():
        with profile(activities=activities, schedule=window, on_trace_ready=write) as profiled:

            def end_step() -> None:
                nonlocal steps
                steps += 1
                profiled.step()

            yield end_step
        if not written:
            say(f"no trace: the run ended after {steps} steps, and tracing begins after {warm_up}")
