"""The kernel launches of attention, planned without being run."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.attention.cases import AttentionCase
from benchmarks.attention.problems import AttentionProblem, attention_problem
from benchmarks.steps import Step
from soda_kernels.attention import sdpa
from soda_kernels.attention.config import PYTORCH_VARIANTS, AttentionConfig, Problem


def attention_plan(case: AttentionCase, mode: str, device: torch.device | str, *, config: Any = None) -> Any:
    """Plan the forward ("fwd") or backward ("bwd") of a case.

    Args:
        device: "meta" plans without memory; "cpu" makes a plan for the interpreter.
        config: a launch config, instead of the one that the heuristic or a tuned table gives.
    """
    return plan_problem(attention_problem(case, device), mode, config=config)


def plan_problem(problem: AttentionProblem, mode: str, *, config: Any = None) -> Any:
    """Plan the forward or backward of a problem."""
    from soda_kernels.attention import triton_impl  # needs Triton

    q, k, v = problem.parts
    batch, queries, heads, head_dim = q.shape
    scale = head_dim**-0.5
    if mode == "fwd":
        return triton_impl.plan_forward(q, k, v, scale, config=config)
    # Of any value: what is planned, and the bytes it moves, depend on shapes alone.
    o, lse = torch.ones_like(problem.do), torch.ones(batch, heads, queries, device=q.device)
    if problem.packed is None:
        return triton_impl.plan_backward(problem.do, q, k, v, o, lse, scale, config=config)
    return triton_impl.plan_backward_qkvpacked(problem.do, problem.packed, o, lse, scale, config=config)


def problem_step(problem: AttentionProblem, mode: str, config: AttentionConfig) -> Step:
    """Return the call that runs one config on a problem: a plan of launches, or PyTorch's kernels."""
    if config.variant not in PYTORCH_VARIANTS:
        return plan_problem(problem, mode, config=config).run
    q, k, v = problem.parts
    scale = q.shape[-1] ** -0.5
    if mode == "fwd":
        return lambda: sdpa.forward(q, k, v, scale, config.variant)
    o, lse = sdpa.forward(q, k, v, scale, config.variant)
    if problem.packed is None:
        return lambda: sdpa.backward(problem.do, q, k, v, o, lse, scale, config.variant)
    # What autograd's packed gradient costs is theirs too.
    return lambda: (torch.stack(sdpa.backward(problem.do, q, k, v, o, lse, scale, config.variant), dim=2),)


def describe_problem(problem: AttentionProblem, mode: str) -> Problem:
    """Describe a problem as the choice of its launch config sees it."""
    backward = mode == "bwd"
    return Problem.of(*problem.parts, *([problem.do] if backward else []), backward=backward)
