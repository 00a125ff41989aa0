"""What every `autograd.Function` of the package shares: its gradients have no derivatives of their own, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Tell whether autograd follows a call with these tensors, backward or forward (which then says it cannot)."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:  # a generator's steps would take longer than the rest of a small image's checks
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def first_derivative_only(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Decorate a Function's backward, so that differentiating its result raises.

    `torch.autograd.function.once_differentiable` ties the error to no input: `torch.autograd.grad` of a sum with other
    terms would skip it, and leave the second derivative out in silence.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *output_gradients: Tensor) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *output_gradients)
        with torch.no_grad():
            gradients = backward(ctx, *output_gradients)
        inputs = [t for t in (*ctx.saved_tensors, *output_gradients) if t is not None and t.requires_grad]
        return _NoDerivative.apply(len(gradients), *gradients, *inputs)

    return run


class _NoDerivative(torch.autograd.Function):
    """Hand the gradients on, as depending on the inputs in a way that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, num_gradients: int, *gradients_and_inputs: Any) -> tuple[Any, ...]:
        return gradients_and_inputs[:num_gradients]

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> NoReturn:
        raise RuntimeError("the ops of soda_kernels have no second derivative")
