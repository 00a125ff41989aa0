"""A suite: one op by every provider, forward, backward and both."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import timers
from benchmarks.accuracy import Check, check_step
from benchmarks.families import Family, TritonFamily
from benchmarks.profiles import longest_kernel, write_trace
from benchmarks.providers import BASELINE, OURS, Provider, Refused
from benchmarks.records import describe_ceilings, describe_config, describe_environment, new_row
from benchmarks.roofline import Ceilings, measure_ceilings
from benchmarks.steps import Forward, Problem, Step, make_step, result_names
from soda_kernels import explain

_AGAIN = "eager, again"  # the baseline's second place in the rotation


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long a case is timed."""

    budget_s: float
    """Seconds for all providers of a case and mode together."""
    min_rounds: int
    warm_up_s: float = 0.0
    quick_ceilings: bool = False


PACES = {
    "full": Pace(budget_s=1.5, min_rounds=7, warm_up_s=3.0),
    "brief": Pace(budget_s=0.5, min_rounds=5, warm_up_s=0.5),
    "quick": Pace(budget_s=0.05, min_rounds=3, quick_ceilings=True),
}


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A provider that passed the gate, or was not let near it."""

    step: Step | None
    check: Check | None
    forward: Forward | None
    status: str
    reason: str | None = None
    names_kernel: bool = False


def suite_rows(
    family: Family, cases: Sequence[Any], modes: Sequence[str], device: torch.device, pace: Pace,
    providers: Sequence[Provider] | None = None, wanted: Callable[[Any, str], bool] = lambda _case, _mode: True,
    traces: Path | None = None,
) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
    """Check and time every case, yielding the rows of one case and mode as soon as they are there.

    Args:
        providers: the family's if not given.
        wanted: tells whether a case is to be measured in a mode.
        traces: a folder for a profiler trace of each case and mode, taken after its times.
    """
    constants = {"suite": family.suite, "env": describe_environment(device)}
    ceilings = measure_ceilings(device, quick=pace.quick_ceilings)
    for case in cases:
        wanted_modes = [mode for mode in case_modes(case, modes) if wanted(case, mode)]
        if not wanted_modes:
            continue
        gate = Gate(family, case, device)
        for mode in wanted_modes:
            ready = {provider.name: gate.prepare(provider, mode) for provider in providers or family.providers}
            rows = _measure(family, case, mode, gate.problem, ready, pace, ceilings, constants)
            if traces is not None:
                name = "-".join((case.id, case.layout, mode)).replace("/", "-")
                steps = {name: entry.step for name, entry in ready.items() if entry.step is not None}
                write_trace(steps, traces / f"{name}.json", device)
            yield rows


def case_modes(case: Any, modes: Sequence[str]) -> list[str]:
    """Return those of some modes that a case has."""
    return [mode for mode in modes if mode in case.modes]


class Gate:
    """A case's tensors, and what everyone's results on them are held against.

    Attributes:
        problem: what is timed.
    """

    def __init__(self, family: Family, case: Any, device: torch.device) -> None:
        self._family = family
        self.problem = family.problem(case, device, grad=True)
        self._by_key, self._handed = (_yardsticks(family, case, self.problem, handed) for handed in (False, True))

    def prepare(self, provider: Provider, mode: str) -> Ready:
        """Build a provider's step and hold its results against exact ones."""
        yardsticks = self._handed if provider.draws else self._by_key
        return _prepare(self._family, provider, self.problem, mode, yardsticks)


@dataclass(frozen=True, kw_only=True)
class _Yardsticks:
    """What results are compared with, by name."""

    problem: Problem
    """That a provider is checked on."""
    plain: dict[str, Tensor]
    """By PyTorch's own chain in the same dtype."""
    exact: dict[str, Tensor]
    """By that chain in fp64."""


def _yardsticks(family: Family, case: Any, problem: Problem, handed: bool) -> _Yardsticks:
    """Return what a case's results are compared with.

    Args:
        handed: the noise, if there is some, is rounded to the problem's dtype and handed to the provider, which would
            draw other noise; else it is drawn from the key, and is exact where the results are.
    """
    mode = case.modes[-1]
    noisy = problem.with_noise()
    wide = noisy.double() if handed else problem.double().with_noise()
    named = [
        dict(zip(result_names(each, mode), make_step(family.plain, each, mode)(), strict=True))
        for each in (noisy, wide)
    ]  # fmt: skip
    return _Yardsticks(problem=noisy if handed else problem, plain=named[0], exact=named[1])


def _measure(
    family: Family, case: Any, mode: str, problem: Problem, ready: dict[str, Ready], pace: Pace, ceilings: Ceilings,
    constants: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the rows of one case and mode: one for each provider and timer."""
    device = problem.gradient.device
    timed = {name: entry for name, entry in ready.items() if entry.status == "ok"}
    timings = _time(family, case, mode, timed, pace, device)
    rows = []
    for name, entry in ready.items():
        row = new_row(
            **constants, op=case.op, case=case.to_dict(), provider=name, mode=mode, status=entry.status,
            reason=entry.reason, bytes_min=family.floor_bytes(case, mode), flops=family.flops(case, mode),
            ceilings=describe_ceilings(ceilings),
        )  # fmt: skip
        row["bound"] = ceilings.bound(row["bytes_min"], row["flops"])
        if entry.check is not None:
            row["check"] = entry.check.to_dict()
        if name == OURS and entry.status != "unavailable":
            row["variant"], row["config"], row["launches"] = _choice(family, mode, problem)
        if entry.forward is not None and entry.step is not None:
            if entry.names_kernel:
                row["config"] = {"kernel": longest_kernel(entry.step, device)}
            row["memory"] = {
                "peak_mib": _peak_mib(entry.step, device),
                "saved_for_backward_mib": None if mode == "fwd" else saved_mib(entry.forward, problem),
            }
        for timer, times in timings.items():
            timed_row = row | {"timer": timer}
            if name in times:
                timed_row["stats"] = timers.summarize(times[name]) | {
                    "aa_spread": timers.spread(times[BASELINE], times[_AGAIN]) if BASELINE in times else None
                }
                if name != BASELINE and BASELINE in times:
                    beside = timers.pair(times[name], times[BASELINE], times[_AGAIN])
                    timed_row["paired"] = {"to": BASELINE, **beside}
                least = ceilings.least_us(row["bytes_min"], row["flops"])
                timed_row["pct_ceiling"] = 100 * least / timed_row["stats"]["p50"]
            rows.append(timed_row)
    return rows


def _prepare(family: Family, provider: Provider, problem: Problem, mode: str, yardsticks: _Yardsticks) -> Ready:
    reason = provider.unavailable(problem)
    if reason is not None:
        return Ready(step=None, check=None, forward=None, status="unavailable", reason=reason)
    try:
        with _compile_settings(provider, mode):
            forward = provider.build()
            step = make_step(forward, yardsticks.problem, mode)
            step()
            names = result_names(problem, mode)
            # torch.compile recompiles when the switch that poisons is turned.
            check = check_step(
                step, names, [yardsticks.plain[name] for name in names], [yardsticks.exact[name] for name in names],
                most_times_torch=provider.most_times_torch, poison=not provider.compiled,
            )  # fmt: skip
            if provider.draws:  # what is timed is checked too, as far as noise that nobody knows allows
                step = make_step(forward, problem, mode)
                found = family.complaints(problem, mode, step())
                check = dataclasses.replace(check, problems=(*check.problems, *found))
    except Refused as refusal:
        return Ready(step=None, check=None, forward=None, status="unavailable", reason=str(refusal))
    except Exception as error:  # whatever a library raises becomes its row
        reason = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        return Ready(step=None, check=None, forward=None, status="failed", reason=reason)
    if check.problems:
        return Ready(step=None, check=check, forward=None, status="invalid", reason="; ".join(check.problems))
    return Ready(step=step, check=check, forward=forward, status="ok", names_kernel=provider.names_kernel)


def _compile_settings(provider: Provider, mode: str) -> contextlib.AbstractContextManager[Any]:
    """Let a compiled graph be differentiated again and again where the mode does so."""
    settings = contextlib.ExitStack()
    if provider.compiled and mode == "bwd":
        import torch._functorch.config
        import torch._inductor.config

        # Else a backward writes its result over what the forward saved. The cache on disk does not tell such a
        # backward, which another mode or run may have left there, from one that does not (PyTorch 2.13): the second
        # call then differentiated its own result.
        settings.enter_context(torch._functorch.config.patch(donated_buffer=False))
        settings.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
    return settings


def _time(
    family: Family, case: Any, mode: str, ready: dict[str, Ready], pace: Pace, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    """Time the providers in turn, the baseline twice: by timer, by provider."""
    steps = {name: entry.step for name, entry in ready.items() if entry.step is not None}
    if BASELINE in steps:
        steps[_AGAIN] = steps[BASELINE]
    by_wall = timers.wall(
        steps, device=device, budget_s=pace.budget_s, min_rounds=pace.min_rounds, warm_up_s=pace.warm_up_s
    )
    if device.type != "cuda":
        return {"wall": by_wall}
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    count = timers.num_input_sets(family.floor_bytes(case, mode), l2_bytes)
    problems = [family.problem(case, device, seed=seed, grad=True) for seed in range(count)]
    sets = {
        name: [make_step(entry.forward, each, mode) for each in problems]
        for name, entry in ready.items()
        if entry.forward is not None
    }
    if BASELINE in sets:
        sets[_AGAIN] = sets[BASELINE]
    return {
        "graph": timers.graph(sets, min_rounds=pace.min_rounds),
        "cold": timers.cold(steps, device=device, min_rounds=pace.min_rounds),
        "wall": by_wall,
    }


def saved_mib(forward: Forward, problem: Problem) -> float:
    """Return the MiB that a forward call keeps for the backward, its inputs among them where they are kept."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        problem.call(forward)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20


def _peak_mib(step: Step, device: torch.device) -> float | None:
    """Return the most memory that PyTorch held during a step; a CPU's is not counted."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) / 2**20


def _choice(family: Family, mode: str, problem: Problem) -> tuple[str, dict[str, Any], int | None]:
    """Return what runs this project's op: the variant or the backend, its launch config, and how many kernels."""
    choice = explain(problem.call, family.own).choices[0]
    if choice.backend != "triton":
        return choice.backend, choice.config, None
    assert isinstance(family, TritonFamily)
    plans = [family.plan(problem, part) for part in ("fwd", "bwd") if part in mode]
    variant, config = describe_config(plans[0].config)
    return variant, config, sum(len(plan.launches) for plan in plans)
