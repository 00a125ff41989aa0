"""AdamW over parameter groups, and the learning rate as a function of images seen."""

from __future__ import annotations

import math

import torch
from torch import nn

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
