"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class Ema(Generic[Model]):
    """Keeps a second model whose parameters follow the first's.

    The decay of update i (from 0) is min(decay, (1 + i) / (10 + i)), so that a short run does not average in its start.

    Args:
        model: what to follow; `self.model` starts as its copy, in evaluation mode and without gradients.
        decay: the largest decay, in [0, 1).

    Attributes:
        num_updates: 0-d fp32 on the model's device, since only the device knows which updates were skipped.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, model: nn.Module, skip: Tensor | None = None) -> None:
        """Move the average towards `model`; buffers, such as a batch norm's statistics, are copied.

        Args:
            model: what `self.model` was made from.
            skip: 0-d fp32 on the model's device; where it is 1 the average stays, and the update does not count.
        """
        weight = (9 / (self.num_updates + 10)).clamp_(min=1 - self.decay)
        self.num_updates += 1 if skip is None else 1 - skip
        # A step of gradient ascent, whose rate and whose skipping PyTorch can take from the device: the "gradient" is
        # the parameter and the weight decay 1, so that average -= weight * (average - parameter), in one pass.
        torch._fused_sgd_(
            list(self.model.parameters()), [parameter.detach() for parameter in model.parameters()], [],
            weight_decay=1.0, momentum=0.0, lr=weight, dampening=0.0, nesterov=False, maximize=True,
            is_first_step=True, grad_scale=None, found_inf=skip,
        )  # fmt: skip
        buffers = list(self.model.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(model.buffers()))
