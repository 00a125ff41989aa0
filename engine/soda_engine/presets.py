"""Presets: complete settings as Python values.

Sources, labelled as in the project's notes on the paper (arXiv 2311.17901): [A] the authors' own words, [B] readers of
the paper, [O] ours, where the paper's value could not be read.

| field | digits | cifar10 | imagenet64 | imagenet128 | source |
|---|---|---|---|---|---|
| encoder | ResNet-18, width 16 | ResNet-18 | ResNet-50 | ResNet-50 | [B] 18 small, 50 at scale; width 16 [O] |
| stem | 3x3 | 3x3 | 3x3 | 7x7 | [B] 3x3 up to 64 px |
| source, target px | 8, 8 | 32, 32 | 64, 64 | 224, 128 | [B] independent; the sizes [O] |
| length of z | 64 | 128 | 2048 | 2048 | [O] |
| sections | by level | by level | by level | by level | [A] m + 1 of them; what pairs [O] |
| masking | 0.12, 0.12 | 0.12, 0.12 | 0.12, 0.12 | 0.12, 0.12 | [O]; 0.12 was seen by one reader |
| denoiser channels | 32 x (1, 2) | 128 x (1, 2, 2) | 192 x (1, 2, 3, 4) | 256 x (1, 1, 2, 3, 4) | ADM's [O] |
| dropout | 0 | 0.1 | 0.1 | 0.1 | [B] 0.1; 0 for a run of minutes [O] |
| schedule, target | inverted cosine, eps | the same | the same | the same | [B] |
| views | light | classification | classification | classification | [B]; light [O] |
| rates, clip | x10, x20, 1.0 | 1e-4, 2e-4, 1.0 | the same | the same | [B]; digits [O] |
| EMA | 0.999 | 0.9999 | 0.9999 | 0.9999 | [B]; digits [O] |
| warm-up, then | 5k images, cosine | 256k, constant | 10M, constant | 10M, constant | [B]; lengths [O] |
| epochs | ~100 | 800 | 800 | 800 | [B] 800 for ImageNet; others [O] |
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
