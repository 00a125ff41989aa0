"""Presets: complete settings as Python values.

Sources, labelled as in the project's notes on the paper (arXiv 2311.17901): [A] the authors' own words, [B] readers of
the paper, [O] ours, where the paper's value could not be read.

| field | digits | cifar10-small | cifar10-light | cifar10 | imagenet64 | imagenet128 | source |
|---|---|---|---|---|---|---|---|
| encoder | ResNet-18 / 4 | ResNet-18 / 2 | ResNet-18 | ResNet-18 | ResNet-50 | ResNet-50 | [B] depths; widths [O] |
| stem | 3x3 | 3x3 | 3x3 | 3x3 | 3x3 | 7x7 | [B] 3x3 up to 64 px |
| source, target px | 8, 8 | 16, 16 | 32, 32 | 32, 32 | 64, 64 | 224, 128 | [B] independent; sizes [O] |
| length of z | 64 | 128 | 512 | 128 | 2048 | 2048 | [O] |
| sections | by level | by level | by level | by level | by level | by level | [A] m + 1 of them; what pairs [O] |
| masking, both rates | 0.12 | 0.12 | 0.12 | 0.12 | 0.12 | 0.12 | [O]; 0.12 was seen by one reader |
| channels x levels | 16 x 2 | 24 x 2 | 64 x 3 | 128 x 3 | 192 x 4 | 256 x 5 | ADM-style [B]; sizes [O] |
| blocks a level | 1 | 1 | 1 | 2 | 3 | 2 | ADM's [B]; 1 [O] |
| attention at px | 4 | 8 | 8 | 16, 8 | 32, 16, 8 | 32, 16, 8 | at low resolutions [B]; which [O] |
| head dim, groups | 16, 8 | 24, 8 | 64, 32 | 64, 32 | 64, 32 | 64, 32 | ADM's; small ones [O] |
| residuals | resampling blocks, sums / sqrt 2 | same | same | same | same | same | ADM's; [B] |
| dropout | 0 | 0 | 0 | 0.1 | 0.1 | 0.1 | [B] 0.1; 0 [O] |
| schedule | inverted cosine | same | same | same | same | same | [B] |
| target | v | v | v | eps | eps | eps | [B] eps; v [O] |
| views | light | crops, flips | classification | same | same | same | [B]; light; crops, flips to a plain target [O] |
| denoiser's rate | 3e-3 | 2e-3 | 1e-3 | 1e-4 | 1e-4 | 1e-4 | [B] 1e-4, encoder x2; others [O] |
| warm-up, images | 6k | 10k | 256k | 256k | 10M | 10M | [B]; lengths [O] |
| then | cosine | constant | constant | constant | constant | constant | [B] |
| batch size | 128 | 128 | 512 | 256 | 1024 | 1024 | [O] |
| epochs | 127 | until stopped | until stopped | 800 | 800 | 800 | [B] 800 for ImageNet; others [O] |

All have the paper's betas, weight decay, clip, EMA decay and two rates [B]. digits and cifar10-small are for minutes on
a CPU, cifar10-light for minutes on a GPU.
"""

from __future__ import annotations

from soda_engine.config import (
    CadenceConfig,
    DatasetConfig,
    DenoiserConfig,
    DiffusionConfig,
    EncoderConfig,
    LatentConfig,
    OptimConfig,
    PipelineConfig,
    SodaConfig,
    TrainConfig,
    ViewsConfig,
)
from soda_engine.data.views import views_preset

PRESETS: dict[str, TrainConfig] = {
    "digits": TrainConfig(
        data="digits",
        out="runs/digits",
        total_images=160_000,
        batch_size=128,
        # A like model at batch 32 made 330 images/s with two threads on two Xeon cores and 268 with one; where another
        # program held a core, 34 and 279.
        threads=1,
        model=SodaConfig(
            encoder=EncoderConfig(in_channels=1, width=16, image_size=8),
            denoiser=DenoiserConfig(
                in_channels=1, image_size=8, channels=16, multipliers=(1, 2), blocks=1, attention_resolutions=(4,),
                head_dim=16, num_groups=8, dropout=0.0,
            ),
            latent=LatentConfig(dim=64),
            # v learned faster here than eps: linear probe 0.952 against 0.915 after 15k images of a like model.
            diffusion=DiffusionConfig(target="v"),
        ),
        dataset=DatasetConfig(image_size=8, channels=1, workers=0),
        views=views_preset("light"),
        optim=OptimConfig(lr=3e-3, warmup_images=6_000, schedule="cosine"),
        cadence=CadenceConfig(
            log_images=3_200, checkpoint_images=40_000, sample_images=40_000, probe_images=40_000
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
    # The encoder of cifar10 with a denoiser of a sixth of its operations: what is wanted is z, and in ten minutes the
    # encoder should see as many images as a GPU can. Nothing of it has been tried on one.
    "cifar10-light": TrainConfig(
        data="uoft-cs/cifar10",
        out="runs/cifar10-light",
        total_images=40_000_000,
        # Twice cifar10's: its step would be so short that launches took a part of it.
        batch_size=512,
        model=SodaConfig(
            encoder=EncoderConfig(image_size=32),
            denoiser=DenoiserConfig(
                image_size=32, channels=64, multipliers=(1, 2, 2), blocks=1, attention_resolutions=(8,), dropout=0.0
            ),
            # As wide as the encoder's last stage, so that the projection to z loses nothing that a probe could use.
            latent=LatentConfig(dim=512),
            diffusion=DiffusionConfig(target="v"),  # for the reason given at digits
        ),
        dataset=DatasetConfig(image_size=32, workers=8),
        views=views_preset("classification"),
        # Between the 2e-3 that serves 24 channels at batch 128 and the paper's 1e-4 for models of months.
        optim=OptimConfig(lr=1e-3),
        cadence=CadenceConfig(
            log_images=102_400, checkpoint_images=1_024_000, sample_images=2_048_000, probe_images=2_048_000
        ),
    ),
    "cifar10-small": TrainConfig(
        data="uoft-cs/cifar10",
        out="runs/cifar10-small",
        total_images=1_000_000,
        batch_size=128,
        model=SodaConfig(
            encoder=EncoderConfig(width=32, image_size=16),
            denoiser=DenoiserConfig(
                image_size=16, channels=24, multipliers=(1, 2), blocks=1, attention_resolutions=(8,), head_dim=24,
                num_groups=8, dropout=0.0,
            ),
            latent=LatentConfig(dim=128),
            diffusion=DiffusionConfig(target="v"),
        ),
        dataset=DatasetConfig(image_size=32, workers=0),
        views=ViewsConfig(
            source=PipelineConfig(crop_probability=1.0, crop_scale=(0.3, 1.0), flip_probability=0.5, noise_std=0.1)
        ),
        optim=OptimConfig(lr=2e-3, warmup_images=10_000),
        cadence=CadenceConfig(
            log_images=6_400, checkpoint_images=32_000, sample_images=128_000, probe_images=0
        ),
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
        dataset=DatasetConfig(image_size=80, workers=8),
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
        dataset=DatasetConfig(image_size=256, workers=8),
        views=views_preset("classification"),
        optim=OptimConfig(warmup_images=10_240_000),
        cadence=CadenceConfig(
            log_images=102_400, checkpoint_images=2_560_000, sample_images=12_800_000, probe_images=64_000_000
        ),
    ),
}
