"""Timing steps of several providers side by side.

Every timer takes the providers' steps together and goes round them, so that a machine that slows down or warms up does
so for all; times are in microseconds a call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Step = Callable[[], Any]

SHORTEST_SAMPLE_US = 1_000.0
"""Calls are repeated until a sample takes this long: the clock and its call cost 0.1 us."""
NUM_COPIES = 20
"""Copies of a step in one CUDA graph, which hide the graph's own launch."""


def wall(
    steps: Mapping[str, Step], *, device: torch.device, budget_s: float, min_rounds: int, max_rounds: int = 1000,
    warm_up_s: float = 0.0,
) -> dict[str, list[float]]:  # fmt: skip
    """Time back-to-back calls with the wall clock, the dispatcher included.

    Args:
        steps: by provider, already compiled.
        budget_s: seconds for all of them together; rounds beyond `min_rounds` are made while it lasts.
        warm_up_s: seconds of rounds before, which do not count. Memory that a check before has freed can be on its way
            back to a virtual machine's host for seconds, and every call that is handed it waits.
    """
    warm = time.perf_counter() + warm_up_s
    while time.perf_counter() < warm:
        for step in steps.values():
            step()
    repeats = {name: _repeats(step, device) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    end = time.perf_counter() + budget_s
    for index in range(max_rounds):
        if index >= min_rounds and time.perf_counter() > end:
            break
        # Who follows whom changes, since a call finds the caches as the one before left them.
        order = names if index % 2 == 0 else names[::-1]
        for name in order:
            times[name].append(_sample(steps[name], repeats[name], device))
    return times


def _sample(step: Step, repeats: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter_ns()
    for _ in range(repeats):
        step()
    _synchronize(device)
    return (time.perf_counter_ns() - start) / 1e3 / repeats


def _repeats(step: Step, device: torch.device) -> int:
    return max(1, round(SHORTEST_SAMPLE_US / _sample(step, 1, device)))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def graph(steps: Mapping[str, Sequence[Step]], *, min_rounds: int) -> dict[str, list[float]]:
    """Time replays of CUDA graphs, each of at least `NUM_COPIES` calls that rotate over the input sets.

    Not yet run on a GPU.

    Args:
        steps: by provider, one for each input set, whose tensors together exceed twice the L2, so that no call finds
            its own inputs there.
    """
    replays: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, sets in steps.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for step in sets:
                step()
        torch.cuda.current_stream().wait_stream(side)
        count = max(NUM_COPIES, len(sets))
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for index in range(count):
                sets[index % len(sets)]()
        replays[name] = (captured, count)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(min_rounds + 1):
        for name, (captured, count) in replays.items():
            elapsed = _between_events(captured.replay) / count
            if index:  # the first replay uploads the graph
                times[name].append(elapsed)
    return times


def cold(steps: Mapping[str, Step], *, device: torch.device, min_rounds: int) -> dict[str, list[float]]:
    """Time single calls with CUDA events, each after the L2 was overwritten.

    Not yet run on a GPU.
    """
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(min_rounds):
        for name, step in steps.items():
            flush.zero_()
            times[name].append(_between_events(step))
    return times


def _between_events(call: Step) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def num_input_sets(bytes_a_set: int, l2_bytes: int) -> int:
    """Return how many input sets together exceed twice the L2."""
    return 2 * l2_bytes // max(1, bytes_a_set) + 1


def summarize(times_us: Sequence[float]) -> dict[str, Any]:
    """Return the statistics of a row: median, 20% and 80% quantiles, least, and how many samples they are of."""
    if len(times_us) == 1:
        return {"p50": times_us[0], "p20": times_us[0], "p80": times_us[0], "min": times_us[0], "n": 1}
    quantiles = statistics.quantiles(times_us, n=10, method="inclusive")
    return {
        "p50": statistics.median(times_us), "p20": quantiles[1], "p80": quantiles[7], "min": min(times_us),
        "n": len(times_us),
    }  # fmt: skip


def pair(times_us: Sequence[float], *baselines_us: Sequence[float]) -> dict[str, Any]:
    """Return median and 20% and 80% quantiles of the ratio of a provider's time to the baseline's in the same round.

    What slows a machine down for a while slows down both, so that these ratios scatter less than the times do.

    Args:
        baselines_us: its times, all of them in every round; their geometric mean counts.
    """
    ratios = [
        time / statistics.geometric_mean(beside)
        for time, *beside in zip(times_us, *baselines_us, strict=True)
    ]  # fmt: skip
    found = summarize(ratios)
    return {key: found[key] for key in ("p50", "p20", "p80", "n")}


def spread(first_us: Sequence[float], second_us: Sequence[float]) -> float:
    """Return by how much two timings of one thing differ, relative to the smaller: below it a difference is noise."""
    a, b = statistics.median(first_us), statistics.median(second_us)
    return abs(a - b) / min(a, b)
