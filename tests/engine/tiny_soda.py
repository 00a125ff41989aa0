"""A model of the tiny settings for colour images, and one in which z matters although nothing was trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from soda_engine import Soda
from soda_engine.config import DiffusionConfig, LatentConfig, SodaConfig
from tests.engine.tiny import tiny_model as tiny_settings


def tiny_config(*, dropout: float = 0.0, **diffusion: Any) -> SodaConfig:
    """Return settings for 8x8 colour images, with three sections of 4, 4 and 5 numbers."""
    base = tiny_settings(in_channels=3, dropout=dropout)
    return dataclasses.replace(
        base,
        encoder=dataclasses.replace(base.encoder, in_channels=3),
        latent=LatentConfig(dim=13),
        diffusion=DiffusionConfig(**diffusion),
    )


def tiny_soda(config: SodaConfig | None = None, *, random: bool = True) -> Soda:
    """Build a model in evaluation mode; `random` replaces what is zero-initialised, so that z matters."""
    torch.manual_seed(0)
    model = Soda(tiny_config() if config is None else config).eval()
    if random:
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.1)
    return model
