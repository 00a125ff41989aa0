"""The suite `e2e`: every contender checked against fp64, then timed in turn with the others."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import timers
from benchmarks.accuracy import check_step, relative_error
from benchmarks.end_to_end.cases import LOSS_CURVE, SUITE, EndToEndCase
from benchmarks.end_to_end.loss_curve import curve_rows
from benchmarks.end_to_end.problems import EndToEndProblem, make_problem
from benchmarks.end_to_end.providers import PLAIN, RESULTS, Built, Contender, contenders, no_bf16
from benchmarks.providers import BASELINE
from benchmarks.records import describe_ceilings, describe_environment, new_row
from benchmarks.roofline import Ceilings, measure_ceilings
from benchmarks.suite import Pace

_AGAIN = "the better eager, again"
MODES = {"train_step": "fwd+bwd", "sample": "fwd", "encode": "fwd", LOSS_CURVE: "fwd+bwd"}
_MALLOPT = {-1: 2**31 - 1, -4: 0}
"""glibc's M_TRIM_THRESHOLD, the largest, and M_MMAP_MAX, none (malloc.h)."""

Row = dict[str, Any]


def end_to_end_rows(
    cases: Sequence[EndToEndCase], ops: Sequence[str], device: torch.device, dtype: str, pace: Pace,
    say: Callable[[str], None] = lambda _text: None, chosen: Callable[[str, str], list[Contender]] = contenders,
    wanted: Callable[[EndToEndCase, str], bool] = lambda _case, _op: True,
) -> Iterator[list[Row]]:  # fmt: skip
    """Check and time every op of every case, yielding the rows of one as soon as they are there.

    Args:
        dtype: of products and convolutions; weights, images and the optimizer are fp32.
        say: is told what is being done.
        chosen: lists who runs an op.
        wanted: tells whether an op of a case is to be measured.
    """
    if device.type == "cpu":
        keep_memory()
    env, ceilings = describe_environment(device), measure_ceilings(device, quick=pace.quick_ceilings)
    constants = {"suite": SUITE, "timer": "wall", "env": env, "ceilings": describe_ceilings(ceilings)}
    for case in cases:
        wanted_ops = [op for op in case_ops(case, ops, dtype) if wanted(case, op)]
        if not wanted_ops:
            continue
        problem = make_problem(case, device, dtype)
        try:
            for op in wanted_ops:
                if op != LOSS_CURVE:
                    yield _measure(problem, op, chosen(op, dtype), pace, ceilings, constants, say)
                    continue
                say(f"{case.name} loss curves")
                yield curve_rows(problem, case.curve_steps, {"suite": SUITE, "env": env})
        finally:
            shutil.rmtree(problem.folder)


def case_ops(case: EndToEndCase, ops: Sequence[str], dtype: str) -> list[str]:
    """Return some ops of a case, and its loss curves where it has them: they come with training steps in fp32."""
    has_curve = case.curve_steps and "train_step" in ops and dtype == "fp32"
    return [*ops, *([LOSS_CURVE] if has_curve else [])]


def _measure(
    problem: EndToEndProblem, op: str, ways: Sequence[Contender], pace: Pace, ceilings: Ceilings,
    constants: dict[str, Any], say: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    """Return the rows of one op of a case, one for each contender."""
    case, device = problem.case, problem.device
    ready: dict[str, Built] = {}
    rows: dict[str, Row] = {}
    yardsticks = Yardsticks(problem, op)
    flops = yardsticks.flops()
    for way in ways:
        say(f"{case.name} {op}: checking {way.name}")
        row = new_row(
            **constants, op=op, mode=MODES[op], provider=way.provider, variant=way.variant, flops=flops,
            bound="compute", case=case.to_dict(op, way.dtype),
        ) | {"images_per_s": None, "mfu": None}  # fmt: skip
        rows[way.name] = row | prepare(way, problem, op, yardsticks, ready)
    times = _time(ready, ways, device, pace, lambda name: say(f"{case.name} {op}: timing {name}"))
    for name, built in ready.items():
        row = rows[name]
        row["stats"] = timers.summarize(times[name]) | {"aa_spread": _spread(times)}
        if row["provider"] != BASELINE and _AGAIN in times:
            row["paired"] = {"to": BASELINE, **timers.pair(times[name], times[_AGAIN])}
        row["memory"] = row["memory"] | {"peak_mib": peak_mib(built.call, device)}
        seconds = row["stats"]["p50"] / 1e6
        row["config"] = built.config
        row["mfu"] = flops / seconds / ceilings.matmul_flops_per_s
        row["images_per_s"], row["pct_ceiling"] = case.num_images(op) / seconds, 100 * row["mfu"]
    return list(rows.values())


class Yardsticks:
    """What an op's results are compared with: the reference path's in fp64, and its own error in a dtype."""

    def __init__(self, problem: EndToEndProblem, op: str) -> None:
        self._problem, self._plain, self._by_dtype = problem, PLAIN[op], {}
        self.exact = self._plain(problem, "nchw", dtype=torch.float64).observe()
        # A gradient jumps where a ReLU's input crosses 0. Of millions of inputs some are so close to it that rounding
        # decides, and how many do is chance; how far that moves gradients is seen in fp64, from moved weights.
        moved = problem.with_moved_encoder() if op == "train_step" else None
        self._moved = moved and self._plain(moved, "nchw", dtype=torch.float64).observe()

    def of(self, dtype: str) -> list[Tensor]:
        """Return results with the error that one in a dtype may have: eager, contiguous, or what ReLUs account for."""
        if dtype not in self._by_dtype:
            found = self._plain(dataclasses.replace(self._problem, dtype=dtype), "nchw").observe()
            self._by_dtype[dtype] = [
                max(each, key=lambda result: relative_error(result, exact)).to(each[0].dtype)
                for exact, *each in zip(self.exact, found, self._moved or found, strict=True)
            ]
        return self._by_dtype[dtype]

    def flops(self) -> int:
        """Count the operations of products, convolutions and attention in one call."""
        with FlopCounterMode(display=False) as counter:
            self._plain(self._problem, "nchw").call()
        return counter.get_total_flops()


def prepare(
    way: Contender, problem: EndToEndProblem, op: str, yardsticks: Yardsticks, ready: dict[str, Built]
) -> dict[str, Any]:
    """Build a contender, hold it against fp64, and return what its row says of that.

    Args:
        ready: is given the contender by its name if it passes.
    """
    reason = no_bf16(problem.device) if way.dtype == "bf16" else None
    if reason is not None:
        return {"status": "unavailable", "reason": reason}
    try:
        built = way.build(dataclasses.replace(problem, dtype=way.dtype))
        check = check_step(
            built.observe, RESULTS[op], yardsticks.of(way.dtype), yardsticks.exact, poison=False,
            most_times_torch=way.most_times_torch,
        )  # fmt: skip
    except Exception as error:  # whatever a library raises becomes its row
        reason = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        return {"status": "failed", "reason": reason}
    if check.problems:
        return {"status": "invalid", "reason": "; ".join(check.problems), "check": check.to_dict()}
    ready[way.name] = built
    return {"status": "ok", "check": check.to_dict()}


def _time(
    ready: dict[str, Built], ways: Sequence[Contender], device: torch.device, pace: Pace,
    say: Callable[[str], None],
) -> dict[str, list[float]]:  # fmt: skip
    """Time all that passed in turn, the better of the eager layouts twice."""
    steps: dict[str, Callable[[], Any]] = {}
    for name, built in ready.items():
        say(name)
        built.call()  # compiles, and makes the optimizer's state
        steps[name] = built.call
    eager = [way.name for way in ways if way.provider == BASELINE and way.name in steps]
    if eager:
        first = timers.wall({name: steps[name] for name in eager}, device=device, budget_s=0.0, min_rounds=1)
        steps[_AGAIN] = steps[min(eager, key=lambda name: first[name])]
    say("all in turn")
    return timers.wall(steps, device=device, budget_s=pace.budget_s, min_rounds=pace.min_rounds)


def _spread(times: dict[str, list[float]]) -> float | None:
    """Return the spread of the eager layout that was timed twice."""
    if _AGAIN not in times:
        return None
    again = times[_AGAIN]
    return min(timers.spread(times[name], again) for name in times if name.startswith(BASELINE))


def keep_memory() -> None:
    """Let the C library keep what is freed, in the whole process; nothing where it is not glibc.

    Freed memory goes back to the system when it happens to lie at the heap's end, and then the next step waits for
    fresh pages: the same step took 557 or 772 ms by what had run before in its process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _MALLOPT.items():
            mallopt(option, value)


def peak_mib(call: Callable[[], Any], device: torch.device) -> float:
    """Return the most memory that PyTorch's allocator held during a call, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines at each start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20
