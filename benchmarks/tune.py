"""The command `tune`: times the candidates for a launch config and keeps the fastest in the package's table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks import timers
from benchmarks.families import Family
from benchmarks.records import describe_environment
from benchmarks.steps import Problem, Step
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


def tune_family(
    family: Family, cases: Sequence[Any], device: torch.device, *, measure: Measure = measure_on_gpu,
    save: Save = _tuning.save_table,
) -> Iterator[str]:  # fmt: skip
    """Time every candidate of every case, forward and backward, saving each winner at once, and yield what was found.

    Not yet run on a GPU.

    Args:
        measure: as `measure_on_gpu`.
        save: as `soda_kernels._tuning.save_table`.
    """
    provenance, seen = describe_environment(device), set()
    on_gpu = device.type == "cuda"
    arch = _tuning.architecture(device) if on_gpu else device.type
    for case in cases:
        for mode in (mode for mode in ("fwd", "bwd") if mode in case.modes):
            described = family.describe(family.problem(case, "meta"), mode)
            if described is None or described.key in seen:  # no choice, or another batch that shares its entry
                continue
            seen.add(described.key)
            count = 1
            if on_gpu:
                l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
                count = timers.num_input_sets(family.floor_bytes(case, mode), l2_bytes)
            problems = [family.problem(case, device, seed=seed) for seed in range(count)]
            times, refused = _times(family, described, problems, mode, measure)
            if not times:
                yield f"{described.key}: no candidate ran; the first said: {refused[0]}"
                continue
            best = min(times, key=lambda config: times[config])
            save(family.name, arch, {described.key: dataclasses.asdict(best)}, provenance)
            default = times.get(family.heuristic(described, _tuning.num_multiprocessors(device)))
            gain = "" if default is None else f", {default / times[best]:.2f}x the heuristic's"
            failed = f"; {len(refused)} refused to run: {refused[0]}" if refused else ""
            yield f"{described.key}: {best} {times[best]:.1f} us of {len(times)}{gain}{failed}"


def _times(
    family: Family, described: Any, problems: Sequence[Problem], mode: str, measure: Measure
) -> tuple[dict[Any, float], list[str]]:
    """Return the time of each candidate that runs, and what the others said."""
    times, refused = {}, []
    for config in family.candidates(described):
        try:
            times[config] = measure(config, [family.step(problem, mode, config) for problem in problems])
        except Exception as error:  # one that asks for more than the GPU has raises what Triton's driver likes
            refused.append(f"{config}: {error}".splitlines()[0])
    return times, refused
