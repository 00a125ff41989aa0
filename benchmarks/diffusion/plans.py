"""The kernel launches of noise-schedule sampling, planned without being run."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.diffusion.cases import DiffusionCase
from benchmarks.diffusion.problems import (
    CFG_SCALE,
    INDEX,
    NEXT_INDEX,
    PREVIOUS_INDEX,
    DiffusionProblem,
    diffusion_problem,
)
from benchmarks.steps import Step
from soda_kernels._launch import Plan
from soda_kernels._philox import STREAMS
from soda_kernels.diffusion.config import Problem


def diffusion_plan(case: DiffusionCase, mode: str, device: torch.device | str, *, config: Any = None) -> Any:
    """Plan the forward ("fwd") or backward ("bwd") of a case.

    Args:
        device: "meta" plans without memory; "cpu" makes a plan for the interpreter.
        config: a launch config, instead of the one that the heuristic or a tuned table gives.
    """
    return plan_problem(diffusion_problem(case, device), mode, config=config)


def plan_problem(problem: DiffusionProblem, mode: str, *, config: Any = None) -> Any:
    """Plan the forward or backward of a problem."""
    call = problem.asked
    if call.op != "noising_and_loss":
        return _PLANS[call.op](problem, mode, config)
    parts = ["denoising_loss"] if mode == "bwd" else ["add_noise", "denoising_loss"]
    plans = [_PLANS[part](problem, mode, config) for part in parts]
    return Plan(
        launches=tuple(launch for plan in plans for launch in plan.launches),
        outputs=tuple(output for plan in plans for output in plan.outputs), config=plans[0].config,
    )  # fmt: skip


def describe_problem(problem: DiffusionProblem, mode: str) -> Problem | None:
    """Describe a problem as the choice of its tile sees it, or return None where there is no choice."""
    return plan_problem(problem, mode).problem


def problem_step(problem: DiffusionProblem, mode: str, config: Any) -> Step:
    """Return the call that runs one config on a problem."""
    return plan_problem(problem, mode, config=config).run


def _key(problem: DiffusionProblem) -> tuple[torch.Tensor, ...]:
    return problem.seed, problem.sample_ids, problem.step


def _plan_philox(problem: DiffusionProblem, mode: str, config: Any) -> Any:
    from soda_kernels.diffusion import triton_impl  # needs Triton

    x = problem.x
    return triton_impl.plan_philox(
        *_key(problem), x[0].numel(), STREAMS["noise"], x.dtype, normal=True, config=config
    )  # fmt: skip


def _plan_add_noise(problem: DiffusionProblem, mode: str, config: Any) -> Any:
    from soda_kernels.diffusion import triton_impl

    call, schedule = problem.asked, problem.schedule
    return triton_impl.plan_add_noise(
        problem.x, None if call.sampling else problem.step_index, schedule.alpha, schedule.sigma, *_key(problem),
        call.sampling or "uniform", 0, len(problem.x) if call.sampling == "stratified" else 1,
        problem.prediction.dtype, config=config,
    )  # fmt: skip


def _plan_loss(problem: DiffusionProblem, mode: str, config: Any) -> Any:
    from soda_kernels.diffusion import triton_impl

    call, schedule = problem.asked, problem.schedule
    arguments = (
        problem.prediction, problem.x, problem.step_index, schedule.alpha, schedule.sigma, problem.weights,
        *_key(problem), call.target,
    )  # fmt: skip
    if mode == "fwd":
        return triton_impl.plan_denoising_loss(*arguments, call.saves, config=config)
    if call.saves:
        return triton_impl.plan_scale_samples(problem.prediction, problem.dloss, config=config)
    return triton_impl.plan_denoising_loss_backward(problem.dloss, *arguments, config=config)


def _plan_sampler_step(problem: DiffusionProblem, mode: str, config: Any) -> Any:
    from soda_kernels.diffusion import triton_impl

    call, schedule = problem.asked, problem.schedule
    # Of one tensor, as the engine's loop hands them.
    index, next_index, previous_index = torch.tensor(
        [INDEX, NEXT_INDEX, PREVIOUS_INDEX], device=problem.x.device
    ).unbind()
    return triton_impl.plan_sampler_step(
        problem.x, problem.prediction, problem.uncond, schedule.alpha, schedule.sigma, schedule.logsnr, index,
        next_index, call.method, call.target, CFG_SCALE if call.guided else 1.0, call.eta, call.clip_x0, call.rescale,
        problem.previous_x0, previous_index if call.second_order else None, *(_key(problem)[:2] if call.draws else
        (None, None)), config=config,
    )  # fmt: skip


_PLANS = {
    "philox_normal": _plan_philox,
    "add_noise": _plan_add_noise,
    "denoising_loss": _plan_loss,
    "sampler_step": _plan_sampler_step,
}
