"""The tuner, rehearsed with a timer that makes its times up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.families import ATTENTION, TRITON_FAMILIES, TritonFamily
from benchmarks.steps import Step
from benchmarks.tune import Measure, measure_on_gpu, tune_family
from soda_kernels.attention import reference, sdpa
from soda_kernels.attention.config import PYTORCH_VARIANTS, AttentionConfig, Problem, candidates, heuristic

Saved = list[tuple[str, str, dict[str, dict[str, Any]], dict[str, Any]]]

# The first whose fields a config has is its family's.
BEST: dict[str, dict[str, Any]] = {
    "group_norm": {"variant": "split", "slab": 16},
    "attention": {"block_m": 32, "block_n": 16},
    "diffusion": {"num_warps": 2},
}
# In all layouts, and in the last one. What draws no noise is one problem in both layouts of diffusion.
PROBLEMS_OF = {"group_norm": (4, 2), "attention": (4, 2), "diffusion": (36, 22)}
both = pytest.mark.parametrize("family", TRITON_FAMILIES.values(), ids=lambda family: family.name)


def run(family: TritonFamily, measure: Measure) -> tuple[list[str], Saved]:
    """Tune the tiny cases: what is printed, and what is saved."""
    saved: Saved = []

    def save(*arguments: Any) -> Path:
        saved.append(arguments)
        return Path("table.json")

    cases = family.cases(["tiny", "tiny"], family.layouts, "bf16")
    return list(tune_family(family, cases, torch.device("cpu"), measure=measure, save=save)), saved


def made_up(config: Any, steps: Sequence[Step]) -> float:
    """Give the best config of a family 5 us, and every other one more."""
    assert len(steps) == 1 and callable(steps[0])
    best = next(best for best in BEST.values() if best.keys() <= vars(config).keys())
    return 5.0 if best.items() <= vars(config).items() else 10.0 + config.num_warps


@both
def test_the_fastest_is_saved_for_each_problem_at_once(family: TritonFamily) -> None:
    lines, saved = run(family, made_up)
    assert len(lines) == len(saved) == PROBLEMS_OF[family.name][0]
    keys = [key for _, _, configs, _ in saved for key in configs]
    assert len(set(keys)) == len(keys)
    for name, arch, configs, provenance in saved:
        assert (name, arch) == (family.name, "cpu")
        (config,) = configs.values()
        assert BEST[family.name].items() <= config.items()
        assert {"device", "torch", "triton", "git", "utc"} <= provenance.keys()
    assert all("5.0 us" in line and "x the heuristic's" in line for line in lines)


@both
def test_a_candidate_that_does_not_run_is_counted_and_said(family: TritonFamily) -> None:
    def measure(config: Any, steps: Sequence[Step]) -> float:
        if not BEST[family.name].items() <= vars(config).items():
            raise RuntimeError("out of resource: shared memory")
        return made_up(config, steps)

    lines, saved = run(family, measure)
    assert len(saved) == PROBLEMS_OF[family.name][0]
    assert all("refused to run" in line and "out of resource" in line for line in lines)


@both
def test_nothing_is_saved_where_nothing_ran(family: TritonFamily) -> None:
    def measure(_config: Any, _steps: Sequence[Step]) -> float:
        raise RuntimeError("no device")

    lines, saved = run(family, measure)
    assert not saved
    assert len(lines) == PROBLEMS_OF[family.name][0]
    assert all("no candidate ran" in line and "no device" in line for line in lines)


@both
def test_a_step_runs_the_config_on_the_problem(family: TritonFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = (family.problem(case, "cpu") for case in family.cases(["tiny"], family.layouts, "fp32"))
    problem = next(each for each in problems if family.describe(each, "fwd") is not None)
    described = family.describe(problem, "fwd")
    config = family.heuristic(described, 132)
    planned: list[Any] = []

    def plan(problem: Any, mode: str, *, config: Any) -> Any:
        planned.append((problem, mode, config))
        return SimpleNamespace(run=lambda: ("ran",))

    monkeypatch.setattr(f"benchmarks.{family.name}.plans.plan_problem", plan)
    assert family.step(problem, "fwd", config)() == ("ran",)
    assert planned == [(problem, "fwd", config)]


@pytest.mark.parametrize("variant", PYTORCH_VARIANTS)
def test_a_step_of_pytorchs_kernels_has_the_results_of_the_op(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their stand-ins here are the reference: what is tested is who gets which tensor."""
    monkeypatch.setattr(sdpa, "forward", lambda *args: reference.forward(*args[:-1]))
    monkeypatch.setattr(sdpa, "backward", lambda *args: reference.backward(*args[:-1]))
    for case in ATTENTION.cases(["tiny"], ATTENTION.layouts, "fp32"):
        problem = ATTENTION.problem(case, "cpu", grad=True)
        config = AttentionConfig(variant=variant)
        expected = problem.call(ATTENTION.own)
        torch.testing.assert_close(ATTENTION.step(problem, "fwd", config)()[0], expected)
        inputs = tuple(problem.named_inputs.values())
        gradients = torch.autograd.grad(expected, inputs, problem.gradient)
        for gradient, own in zip(gradients, ATTENTION.step(problem, "bwd", config)(), strict=True):
            torch.testing.assert_close(own, gradient)


def test_a_config_that_gives_other_bits_the_next_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timers.graph", lambda steps, min_rounds: dict.fromkeys(steps, [3.0, 1.0, 2.0]))
    config = AttentionConfig(variant="flash")
    again = torch.ones(3)
    assert measure_on_gpu(config, [lambda: (again, [again])]) == 2.0
    with pytest.raises(ValueError, match="a second run gives other bits"):
        measure_on_gpu(config, [lambda: (again, [torch.rand(3)])])


PROBLEMS = [
    Problem(backward=backward, pairs=pairs, queries=queries, keys=keys, head_dim=head_dim, element_bytes=size)
    for backward in (False, True)
    for pairs in (3, 1024, 8192)
    for queries, keys in ((1, 257), (17, 17), (64, 64), (256, 256), (1024, 1024), (4096, 77))
    for head_dim in (1, 40, 64, 128, 160, 256)
    for size in (2, 4)
]


def test_candidates_for_attention_are_valid_and_have_the_heuristics_choice() -> None:
    for problem in PROBLEMS:
        configs = list(candidates(problem))
        assert len(set(configs)) == len(configs) > 4, problem
        assert heuristic(problem) in configs, problem
        for config in configs:
            assert is_valid(config, problem), (problem, config)


def is_valid(config: AttentionConfig, problem: Problem) -> bool:
    """What the kernels ask for: tiles that a product can be made of, a whole row where it is said to be whole."""
    if config.variant in PYTORCH_VARIANTS:
        return problem.element_bytes == 2 and problem.head_dim % 8 == 0 and max(problem.queries, problem.keys) > 256
    if config.descriptors and (problem.element_bytes != 2 or config.variant not in ("online", "two_kernels")):
        return False
    tiles = all(block >= 16 and block & (block - 1) == 0 for block in (config.block_m, config.block_n))
    if problem.backward:
        return tiles and config.pairs == 1 and (
            config.variant == "one_kernel" or (config.variant, config.blocks) == ("two_kernels", 1)
        )  # fmt: skip
    if config.variant == "online":
        return tiles and config.pairs == config.blocks == 1
    blocks = -(-problem.queries // config.block_m)
    in_turn = config.pairs == 1 or config.blocks >= blocks
    return tiles and config.variant == "whole_row" and config.block_n >= problem.keys and in_turn


@pytest.mark.gpu
@both
def test_a_gpu_is_tuned(family: TritonFamily) -> None:
    keys: list[str] = []

    def save(_family: str, _arch: str, configs: dict[str, Any], _provenance: dict[str, Any]) -> Path:
        keys.extend(configs)
        return Path("table.json")

    cases = family.cases(["tiny"], family.layouts[-1:], "bf16")
    lines = list(tune_family(family, cases, torch.device("cuda"), save=save))
    assert len(keys) == len(lines) == PROBLEMS_OF[family.name][1]
