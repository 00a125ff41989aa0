"""A training step around the reference path, as one writes it with `torch.optim` and `torch._foreach` alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.end_to_end.plain import Draws, PlainSoda
from soda_engine.config import TrainConfig
from soda_engine.data.loaders import Batch
from soda_engine.data.views import make_view
from soda_engine.models.soda import Soda
from soda_engine.train.optim import split_by_decay


class PlainTrainer:
    """The engine's objective, optimizer and average in PyTorch alone: AdamW over its four groups, clip, EMA.

    Views come from the engine's own function, in the time of both: they are data, and no part of what is compared.

    Args:
        model: the weights in training, on their device and in their dtype; it is put into the layout.
        layout: of weights and images.
        bf16: autocast.
        optimizer: options of `torch.optim.AdamW`: which of its implementations runs.
    """

    def __init__(
        self, model: Soda, config: TrainConfig, layout: torch.memory_format, *, bf16: bool = False, **optimizer: bool
    ) -> None:
        model.train().to(memory_format=layout)
        self.config, self.layout, self.bf16, self.model = config, layout, bf16, PlainSoda(model)
        self.losses: Callable[[Tensor, Tensor, Draws], Tensor] = self.model
        parameters = list(self.model.parameters())
        self.device, self.dtype = parameters[0].device, parameters[0].dtype
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": params, "weight_decay": decay, "lr": config.optim.lr * multiplier}
                for module, multiplier in (
                    (model.encoder, config.optim.encoder_lr_multiplier), (model.denoiser, 1.0)
                )
                for params, decay in zip(split_by_decay(module), (config.optim.weight_decay, 0.0), strict=True)
            ],
            betas=config.optim.betas, **optimizer,
        )  # fmt: skip
        self.parameters, self.averages = parameters, list(self.average.parameters())
        self.buffers = list(zip(self.average.buffers(), model.buffers(), strict=True))
        self.num_updates = 0

    def step(self, batch: Batch, draws: Callable[[Tensor], Draws] | None = None) -> Tensor:
        """Take one step and return the loss of each sample.

        Args:
            draws: from target views to what is drawn, if not new noise.
        """
        source, target = self.views(batch)
        drawn = (draws or self.model.draw)(target)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self.losses(source, target, drawn)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.follow()
        return losses.detach()

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average towards the weights, by the engine's rate, and copy the buffers."""
        weight = max(9 / (self.num_updates + 10), 1 - self.config.optim.ema_decay)
        torch._foreach_lerp_(self.averages, self.parameters, weight)
        for average, buffer in self.buffers:
            average.copy_(buffer)
        self.num_updates += 1

    def views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Draw the source and the target view of each image."""
        model, views = self.config.model, self.config.views
        key = {"seed": self.config.seed, "sample_ids": batch.sample_ids, "epochs": batch.epochs}
        images = batch.images.to(self.device, non_blocking=True)
        source = make_view(images, views.source, model.encoder.image_size, role="source", **key)
        target = make_view(images, views.target, model.denoiser.image_size, role="target", **key)
        return tuple(x.to(self.dtype, memory_format=self.layout) for x in (source, target))
