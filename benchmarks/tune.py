"""The command `tune`: times the candidates for a launch config and keeps the fastest in the package's table."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks import timers
from benchmarks.families import TritonFamily
from benchmarks.records import describe_environment
from benchmarks.steps import Problem, Step
from benchmarks.tune_log import Log
from soda_kernels import _tuning

_ROUNDS = 10

Measure = Callable[[Any, Sequence[Step]], float]
Save = Callable[[str, str, dict[str, dict[str, Any]], dict[str, Any]], Path]


def measure_on_gpu(config: Any, steps: Sequence[Step]) -> float:
    """Return the median time of a config in microseconds, replayed over several input sets.

    Not yet run on a GPU.

    Args:
        steps: calls that run the config, each on inputs of its own.

    Raises:
        ValueError: a second run gives other bits, which no op of this project does.
    """
    first = [result.clone() for result in tree_leaves(steps[0]())]
    if not all(map(torch.equal, first, tree_leaves(steps[0]()))):
        raise ValueError("a second run gives other bits")
    times = timers.graph({"candidate": steps}, min_rounds=_ROUNDS)
    return statistics.median(times["candidate"])


def made_up(config: Any, _steps: Sequence[Step]) -> float:
    """Return no measurement, but what rehearses one: the same for equal configs, in microseconds."""
    return 10.0 + zlib.crc32(repr(config).encode()) % 1000 / 100


def tune_family(
    family: TritonFamily, cases: Sequence[Any], device: torch.device, *, measure: Measure = measure_on_gpu,
    save: Save = _tuning.save_table, log: Log | None = None,
) -> Iterator[str]:  # fmt: skip
    """Time every candidate of every case, forward and backward, saving each winner at once, and yield what was found.

    Not yet run on a GPU.

    Args:
        measure: as `measure_on_gpu`.
        save: as `soda_kernels._tuning.save_table`.
        log: keeps every time; what it holds already is not measured again, but saved.
    """
    log = log or Log(None, describe_environment(device))
    seen = set()
    on_gpu = device.type == "cuda"
    arch = _tuning.architecture(device) if on_gpu else device.type
    for case in cases:
        for mode in (mode for mode in ("fwd", "bwd") if mode in case.modes):
            described = family.describe(family.problem(case, "meta"), mode)
            if described is None or described.key in seen:  # no choice, or another batch that shares its entry
                continue
            seen.add(described.key)
            subject = {"family": family.name, "arch": arch, "key": described.key}
            time = functools.partial(log.time, subject, measure)
            times, refused = _times(family, case, mode, device, described, time)
            if not times:
                yield f"{described.key}: no candidate ran; the first said: {refused[0]}"
                continue
            best = min(times, key=lambda config: times[config])
            log.keep_best(subject, best, times[best])
            save(family.name, arch, {described.key: dataclasses.asdict(best)}, log.environment)
            default = times.get(family.heuristic(described, _tuning.num_multiprocessors(device)))
            gain = "" if default is None else f", {default / times[best]:.2f}x the heuristic's"
            failed = f"; {len(refused)} refused to run: {refused[0]}" if refused else ""
            yield f"{described.key}: {best} {times[best]:.1f} us of {len(times)}{gain}{failed}"


def _times(
    family: TritonFamily, case: Any, mode: str, device: torch.device, described: Any,
    time: Callable[[Any, Callable[[], Sequence[Step]]], float | str],
) -> tuple[dict[Any, float], list[str]]:  # fmt: skip
    """Return the time of each candidate that runs, and what the others said."""

    @functools.cache
    def problems() -> list[Problem]:
        count = 1
        if device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            count = timers.num_input_sets(family.floor_bytes(case, mode), l2_bytes)
        return [family.problem(case, device, seed=seed) for seed in range(count)]

    times, refused = {}, []
    for config in family.candidates(described):
        found = time(config, lambda config=config: [family.step(problem, mode, config) for problem in problems()])
        if isinstance(found, str):
            refused.append(f"{config}: {found}")
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises where the failure has taken the process's GPU with it
        else:
            times[config] = found
    return times, refused
