"""The tuner, rehearsed with a timer that makes its times up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import norm_cases
from benchmarks.tune import tune_norm

Saved = list[tuple[str, str, dict[str, dict[str, Any]], dict[str, Any]]]


def run(measure: Any) -> tuple[list[str], Saved]:
    """Tune the tiny cases: what is printed, and what is saved."""
    saved: Saved = []

    def save(*arguments: Any) -> Path:
        saved.append(arguments)
        return Path("table.json")

    cases = norm_cases(["tiny", "tiny"], ["nchw", "nhwc"], "bf16")
    return list(tune_norm(cases, torch.device("cpu"), measure=measure, save=save)), saved


def made_up(plans: Sequence[Any]) -> float:
    (plan,) = plans
    return 5.0 if plan.config.variant == "split" and plan.config.slab == 16 else 10.0 + plan.config.slab


def test_the_fastest_is_saved_for_each_problem_at_once() -> None:
    lines, saved = run(made_up)
    assert len(lines) == len(saved) == 4  # two layouts, forward and backward
    keys = [key for _, _, configs, _ in saved for key in configs]
    assert len(set(keys)) == 4
    for family, arch, configs, provenance in saved:
        assert (family, arch) == ("group_norm", "cpu")
        (config,) = configs.values()
        assert (config["variant"], config["slab"]) == ("split", 16)
        assert {"device", "torch", "triton", "git", "utc"} <= provenance.keys()
    assert all("5.0 us" in line and "x the heuristic's" in line for line in lines)


def test_a_candidate_that_does_not_run_is_counted_and_said() -> None:
    def measure(plans: Sequence[Any]) -> float:
        if plans[0].config.variant != "split":
            raise RuntimeError("out of resource: shared memory")
        return made_up(plans)

    lines, saved = run(measure)
    assert len(saved) == 4
    assert all("refused to run" in line and "out of resource" in line for line in lines)


def test_nothing_is_saved_where_nothing_ran() -> None:
    def measure(plans: Sequence[Any]) -> float:
        raise RuntimeError("no device")

    lines, saved = run(measure)
    assert not saved
    assert len(lines) == 4 and all("no candidate ran" in line and "no device" in line for line in lines)


@pytest.mark.gpu
def test_a_gpu_is_tuned() -> None:
    keys: list[str] = []

    def save(_family: str, _arch: str, configs: dict[str, Any], _provenance: dict[str, Any]) -> Path:
        keys.extend(configs)
        return Path("table.json")

    lines = list(tune_norm(norm_cases(["tiny"], ["nhwc"], "bf16"), torch.device("cuda"), save=save))
    assert len(keys) == len(lines) == 2
