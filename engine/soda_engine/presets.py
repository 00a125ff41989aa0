"""Presets: complete settings as Python values. Where a value comes from is said in `config.py`, field by field.

| preset | encoder | source | denoiser | target | z | views | ours (not the paper's) |
|---|---|---|---|---|---|---|---|
| digits | ResNet-18, width 16 | 16 px | 32 channels | 16 px | 64 | light | every size and rate, views |
| cifar10 | ResNet-18 | 32 px | 128 channels | 32 px | 128 | classification | channels, z |
| imagenet64 | ResNet-50 | 64 px | 192 channels | 64 px | 2048 | classification | channels, z |
| imagenet128 | ResNet-50 | 224 px | 256 channels | 128 px | 2048 | classification | channels, z |

All have the paper's inverted-cosine schedule, eps prediction, AdamW and two rates; the encoders for at most 64 px have
its 3x3 stem.
"""

from __future__ import annotations

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

PRESETS: dict[str, TrainConfig] = {
    "digits": TrainConfig(
        data="digits",
        out="runs/digits",
        total_images=300_000,
        batch_size=128,
        model=SodaConfig(
            encoder=EncoderConfig(in_channels=1, width=16, image_size=16),
            denoiser=DenoiserConfig(
                in_channels=1, image_size=16, channels=32, multipliers=(1, 2), blocks=1, attention_resolutions=(8,),
                head_dim=32, num_groups=8, dropout=0.0,
            ),
            latent=LatentConfig(dim=64),
        ),
        dataset=DatasetConfig(image_size=16, channels=1, workers=0),
        views=views_preset("light"),
        optim=OptimConfig(lr=1e-3, warmup_images=10_000, schedule="cosine", ema_decay=0.999),
        cadence=CadenceConfig(
            log_images=2_560, checkpoint_images=50_000, sample_images=100_000, probe_images=100_000
        ),
    ),
    "cifar10": TrainConfig(
        data="uoft-cs/cifar10",
        out="runs/cifar10",
        total_images=40_000_000,  # 800 epochs
        batch_size=256,
        model=SodaConfig(
            encoder=EncoderConfig(image_size=32),
            denoiser=DenoiserConfig(image_size=32, channels=128, multipliers=(1, 2, 2), attention_resolutions=(16, 8)),
            latent=LatentConfig(dim=128),
        ),
        dataset=DatasetConfig(image_size=32),
        views=views_preset("classification"),
    ),
    "imagenet64": TrainConfig(
        data="ILSVRC/imagenet-1k",
        out="runs/imagenet64",
        total_images=1_024_000_000,  # 800 epochs
        batch_size=1024,
        model=SodaConfig(
            encoder=EncoderConfig(arch="resnet50", image_size=64),
            denoiser=DenoiserConfig(
                image_size=64, channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention_resolutions=(32, 16, 8)
            ),
            latent=LatentConfig(dim=2048),
        ),
        dataset=DatasetConfig(image_size=80, test_split="validation", workers=8),
        views=views_preset("classification"),
        optim=OptimConfig(warmup_images=10_240_000),
        cadence=CadenceConfig(
            log_images=102_400, checkpoint_images=2_560_000, sample_images=12_800_000, probe_images=64_000_000
        ),
    ),
    "imagenet128": TrainConfig(
        data="ILSVRC/imagenet-1k",
        out="runs/imagenet128",
        total_images=1_024_000_000,  # 800 epochs
        batch_size=1024,
        model=SodaConfig(
            encoder=EncoderConfig(arch="resnet50", stem="imagenet", image_size=224),
            denoiser=DenoiserConfig(
                image_size=128, channels=256, multipliers=(1, 1, 2, 3, 4), attention_resolutions=(32, 16, 8)
            ),
            latent=LatentConfig(dim=2048),
        ),
        dataset=DatasetConfig(image_size=256, test_split="validation", workers=8),
        views=views_preset("classification"),
        optim=OptimConfig(warmup_images=10_240_000),
        cadence=CadenceConfig(
            log_images=102_400, checkpoint_images=2_560_000, sample_images=12_800_000, probe_images=64_000_000
        ),
    ),
}
