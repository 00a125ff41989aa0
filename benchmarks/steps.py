"""The ways in which an op is run on the tensors of a case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Forward = Callable[..., Any]
Step = Callable[[], tuple[Tensor, ...]]


class Problem(Protocol):
    """The tensors of one case; each family has its own."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the results."""

    @property
    def named_inputs(self) -> dict[str, Tensor]:
        """What gradients are taken of, by name."""

    @property
    def gradient(self) -> Tensor:
        """What comes back to the last result: of its shape and dtype, on its device."""

    def call(self, forward: Forward) -> Tensor | tuple[Tensor, ...]:
        """Apply a function with the signature of this project's own."""

    def with_noise(self) -> Problem:
        """Return the problem with the noise that its key stands for, where there is some."""

    def double(self) -> Problem:
        """Return copies of every tensor in fp64, apart from this problem's graph."""


def make_step(forward: Forward, problem: Problem, mode: str) -> Step:
    """Return what is timed: a call that gives the results, the gradients of the last one, or both.

    "fwd" records no graph; "bwd" differentiates again and again a graph that is recorded here, once.
    """
    inputs = tuple(problem.named_inputs.values())
    if mode == "fwd":

        def step() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return _results(problem, forward)

    elif mode == "bwd":
        last = _results(problem, forward)[-1]

        def step() -> tuple[Tensor, ...]:
            return torch.autograd.grad(last, inputs, problem.gradient, retain_graph=True)

    else:

        def step() -> tuple[Tensor, ...]:
            results = _results(problem, forward)
            gradients = torch.autograd.grad(results[-1], inputs, problem.gradient)
            return (*(result.detach() for result in results), *gradients)

    return step


def _results(problem: Problem, forward: Forward) -> tuple[Tensor, ...]:
    results = problem.call(forward)
    return results if isinstance(results, tuple) else (results,)


def result_names(problem: Problem, mode: str) -> tuple[str, ...]:
    """Name what a step of this mode returns."""
    gradients = tuple(f"d{name}" for name in problem.named_inputs)
    return {"fwd": problem.outputs, "bwd": gradients, "fwd+bwd": (*problem.outputs, *gradients)}[mode]
