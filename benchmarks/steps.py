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

    output: str
    """Name of the result."""

    @property
    def named_inputs(self) -> dict[str, Tensor]:
        """What gradients are taken of, by name."""

    @property
    def gradient(self) -> Tensor:
        """What comes back to the result: of its shape and dtype, on its device."""

    def call(self, forward: Forward) -> Tensor:
        """Apply a function with the signature of this project's own."""

    def double(self) -> Problem:
        """Return copies of every tensor in fp64, apart from this problem's graph."""


def make_step(forward: Forward, problem: Problem, mode: str) -> Step:
    """Return what is timed: a call that gives the result, the gradients, or both.

    "fwd" records no graph; "bwd" differentiates again and again a graph that is recorded here, once.
    """
    inputs = tuple(problem.named_inputs.values())
    if mode == "fwd":

        def step() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (problem.call(forward),)

    elif mode == "bwd":
        y = problem.call(forward)

        def step() -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, inputs, problem.gradient, retain_graph=True)

    else:

        def step() -> tuple[Tensor, ...]:
            result = problem.call(forward)
            return (result.detach(), *torch.autograd.grad(result, inputs, problem.gradient))

    return step


def result_names(problem: Problem, mode: str) -> tuple[str, ...]:
    """Name what a step of this mode returns."""
    gradients = tuple(f"d{name}" for name in problem.named_inputs)
    return {"fwd": (problem.output,), "bwd": gradients, "fwd+bwd": (problem.output, *gradients)}[mode]
