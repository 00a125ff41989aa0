"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class Ema(Generic[Model]):
    """Keeps a second model whose parameters follow the first's.

    The decay of step i (from 0) is min(decay, (1 + i) / (10 + i)), so that a short run does not average in its start.

    Args:
        model: what to follow; `self.model` starts as its copy, in evaluation mode and without gradients.
        decay: the largest decay, in [0, 1).
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards `model`; buffers, such as a batch norm's statistics, are copied."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = list(self.model.parameters())
        parameters: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, parameters, 1 - decay)
        buffers = list(self.model.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(model.buffers()))
