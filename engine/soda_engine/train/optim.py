"""AdamW over parameter groups, its step on the device alone, and the learning rate as a function of images seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from soda_engine.config import OptimConfig
from soda_engine.models.soda import Soda


def build_optimizer(model: Soda, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW with the encoder's own rate, and no weight decay on norms, biases and embeddings.

    Every group carries `base_lr`, which `set_learning_rate` scales.
    """
    groups = []
    for module, multiplier in ((model.encoder, config.encoder_lr_multiplier), (model.denoiser, 1.0)):
        decayed, plain = split_by_decay(module)
        for parameters, decay in ((decayed, config.weight_decay), (plain, 0.0)):
            base_lr = config.lr * multiplier
            groups.append({"params": parameters, "weight_decay": decay, "lr": base_lr, "base_lr": base_lr})
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=config.betas, fused=True)


def split_by_decay(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split trainable parameters into those that decay (weights of convolutions and linear layers) and the rest."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_weight = isinstance(owner, nn.Linear | nn.modules.conv._ConvNd) and name == "weight"
                (decayed if is_weight else plain).append(parameter)
    return decayed, plain


def learning_rate_factor(images: int, total_images: int, config: OptimConfig) -> float:
    """Return the share of the base rate after so many images: a linear warm-up, then constant or cosine to zero."""
    if images < config.warmup_images:
        return images / config.warmup_images
    if config.schedule == "constant":
        return 1.0
    progress = (images - config.warmup_images) / max(1, total_images - config.warmup_images)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's rate to `factor` times its base rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def clip_and_step(optimizer: torch.optim.AdamW, norm: Tensor, max_norm: float, skip: Tensor) -> None:
    """Take a fused AdamW step with gradients scaled to a norm of at most `max_norm`, unless `skip` is 1.

    Both are PyTorch's own, made for its gradient scaler: the fused kernel divides gradients by a scale as it reads
    them, so that clipping is no pass of its own, and leaves everything as it is where the scaler found an infinity.

    Args:
        norm: 0-d, of the whole gradient. skip: 0-d fp32, 0 or 1, on the same device.
    """
    # The reciprocal of the factor that torch.nn.utils.clip_grad_norm_ multiplies by.
    optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp_(min=1.0)  # type: ignore[attr-defined]
    optimizer.found_inf = skip  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


class Statistics:
    """A model's buffers, such as batch norms' statistics, kept as one vector a dtype so that a step can be undone.

    Args:
        model: its buffers must stay the same tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        # Listed once: walking a model's modules took 7 ms of a 140 ms step of the digits preset.
        self._groups: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            self._groups.setdefault(buffer.dtype, []).append(buffer)

    def copy(self) -> list[Tensor]:
        """Return all values, a vector a dtype."""
        return [torch.cat([buffer.flatten() for buffer in group]) for group in self._groups.values()]

    def undo(self, values: list[Tensor], skip: Tensor) -> None:
        """Put `copy`'s values back where `skip`, 0-d, is not 0; no host waits to learn it."""
        for group, before, now in zip(self._groups.values(), values, self.copy(), strict=True):
            chosen = torch.where(skip != 0, before, now).split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [part.view(buffer.shape) for part, buffer in zip(chosen, group, strict=True)])
