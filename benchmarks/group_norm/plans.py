"""The kernel launches of a group norm, planned without being run."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.group_norm.cases import NormCase
from benchmarks.group_norm.problems import EPS, NormProblem, norm_problem
from benchmarks.steps import Step
from soda_kernels.group_norm.config import Problem


def norm_plan(case: NormCase, mode: str, device: torch.device | str, *, config: Any = None) -> Any:
    """Plan the forward ("fwd") or backward ("bwd") of a case.

    Args:
        device: "meta" plans without memory; "cpu" makes a plan for the interpreter.
        config: a launch config, instead of the one that the heuristic or a tuned table gives.
    """
    return plan_problem(norm_problem(case, device), mode, config=config)


def plan_problem(problem: NormProblem, mode: str, *, config: Any = None) -> Any:
    """Plan the forward or backward of a problem."""
    from soda_kernels.group_norm import triton_impl  # needs Triton

    modulations = list(problem.modulations)
    if mode == "fwd":
        return triton_impl.plan_forward(
            problem.x, problem.skip, None, problem.weight, problem.bias, modulations, problem.num_groups, 1.0, EPS,
            True, 0.0, None, config=config,
        )  # fmt: skip
    # Of any value: what is planned, and the bytes it moves, depend on shapes alone.
    mean, rstd = (torch.ones(len(problem.x), problem.num_groups, device=problem.x.device) for _ in range(2))
    return triton_impl.plan_backward(
        problem.dy, None, problem.x, problem.skip, problem.weight, problem.bias, modulations, mean, rstd, 1.0, True,
        0.0, None, config=config,
    )  # fmt: skip


def describe_problem(problem: NormProblem, mode: str) -> Problem:
    """Describe a problem as the choice of its launch config sees it."""
    return Problem.of(problem.x, problem.skip, problem.num_groups, backward=mode == "bwd", dropout=False)


def problem_step(problem: NormProblem, mode: str, config: Any) -> Step:
    """Return the call that runs one config on a problem."""
    return plan_problem(problem, mode, config=config).run
