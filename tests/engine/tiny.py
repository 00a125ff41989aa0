"""The smallest settings that still have every part: a model of some ten thousand parameters, runs of some steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from soda_engine.config import (
    CadenceConfig,
    DatasetConfig,
    DenoiserConfig,
    EncoderConfig,
    LatentConfig,
    OptimConfig,
    SodaConfig,
    TrainConfig,
)
from soda_engine.data.views import views_preset


def tiny_model(**denoiser: Any) -> SodaConfig:
    """Settings of a model for 8x8 grey images, with fields of its denoiser replaced."""
    base = DenoiserConfig(
        in_channels=1, image_size=8, channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,), head_dim=8,
        num_groups=4, dropout=0.1,
    )  # fmt: skip
    return SodaConfig(
        encoder=EncoderConfig(in_channels=1, width=4, image_size=8),
        denoiser=dataclasses.replace(base, **denoiser),
        latent=LatentConfig(dim=12),
    )


def tiny_run(out: Path, **fields: Any) -> TrainConfig:
    """Settings of a run on the digits that logs every step and does nothing else on its way."""
    base = TrainConfig(
        data="digits", out=str(out), total_images=96, batch_size=16, tensorboard=False, device="cpu",
        model=tiny_model(),
        dataset=DatasetConfig(image_size=8, channels=1, workers=0),
        views=views_preset("light"),
        optim=OptimConfig(lr=2e-3, warmup_images=32),
        cadence=CadenceConfig(log_images=16, checkpoint_images=0, sample_images=0, probe_images=0),
    )  # fmt: skip
    return dataclasses.replace(base, **fields)
