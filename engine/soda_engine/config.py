"""Every setting of a run, as frozen keyword-only dataclasses: typed, printed, saved beside the weights, replayable.

A field whose value the paper gives says so; a field marked "ours" is a choice of this project where the paper's value
could not be read (arXiv 2311.17901; no code was published).
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The ResNet that turns a source view into z."""

    arch: Literal["resnet18", "resnet50"] = "resnet18"
    """Depth. Paper: ResNet-50 at scale, ResNet-18 for small images."""
    in_channels: int = 3
    """Channels of the images."""
    width: int = 64
    """Channels of the first stage; 64 is the standard ResNet (and what pretrained weights need)."""
    stem: Literal["small", "imagenet"] = "small"
    """small: 3x3 stride 1, no max-pool (paper, for images up to 64 px); imagenet: 7x7 stride 2 and max-pool."""
    image_size: int = 32
    """Side of the source view in pixels; independent of the denoiser's."""


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """The ADM-style U-Net that z guides."""

    in_channels: int = 3
    """Channels of the images."""
    image_size: int = 32
    """Side of the target view in pixels; divisible by 2 ** (levels - 1)."""
    channels: int = 128
    """Channels of the first level."""
    multipliers: tuple[int, ...] = (1, 2, 2)
    """Channel multiplier of each resolution level, finest first."""
    blocks: int = 2
    """Residual blocks a level in the down path (the up path has one more)."""
    attention_resolutions: tuple[int, ...] = (16, 8)
    """Sides of the feature maps, in pixels, that get self-attention."""
    head_dim: int = 64
    """Channels of an attention head."""
    num_groups: int = 32
    """Groups of every group norm; must divide every channel count."""
    dropout: float = 0.1
    """Rate in every residual block. Paper: 0.1."""
    resample_in_block: bool = True
    """Resample inside a residual block (ADM's resblock up/down) instead of by a strided convolution."""
    residual_scale: float = 2**-0.5
    """Factor on each residual sum. Paper: 1/sqrt(2)."""
    cross_attention: bool = False
    """Also attend to the sections of z wherever there is self-attention (the paper's second form of conditioning)."""


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """The bottleneck z, its sections, and how they are masked in training."""

    dim: int = 128
    """Length of z. Ours: 2048 at ImageNet scale, 128 to 512 for small images."""
    pairing: Literal["level", "block"] = "level"
    """level: one section a resolution level and one for the middle; block: one a residual block of the down path and
    one for the middle. Sections have equal sizes and the middle takes the remainder. Ours."""
    drop_all: float = 0.12
    """Probability that the whole of z is zeroed for a sample in training. Ours; 0.12 was seen by one reader."""
    drop_section: float = 0.12
    """Otherwise, probability that each section is zeroed. Ours."""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The noise schedule and what the denoiser predicts."""

    schedule: Literal["inverted_cosine", "cosine", "linear"] = "inverted_cosine"
    """How the noise grows with the step. Paper: inverted cosine."""
    num_steps: int = 1000
    """Steps of the schedule. Paper: 1000."""
    target: Literal["eps", "v", "x0"] = "eps"
    """What the denoiser predicts. Paper: eps, the noise."""
    loss_weight: Literal["uniform", "min_snr"] = "uniform"
    """Weight of each step's loss. Paper: uniform. min_snr: min(snr, 5) on the x0 error (Hang et al. 2023), an option of
    ours."""


@dataclass(frozen=True, kw_only=True)
class SodaConfig:
    """The whole model: all that is needed to build `soda_engine.Soda` again."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Where images and labels lie in the source that `TrainConfig.data` names."""

    image_column: str | None = None
    """Column of the images; None finds the only image column, or one named image, img, jpg, png, ..."""
    label_column: str | None = None
    """Column of the labels; None finds label, labels, cls, fine_label, ...; a set without labels cannot be probed."""
    train_split: str = "train"
    """Split to pretrain on."""
    test_split: str | None = None
    """None: the first of test, validation and val, one with labels if any; else a seeded tenth held out from train."""
    image_size: int = 32
    """Side in pixels at which images are stored for a batch: shorter side resized, then centre-cropped."""
    channels: Literal[1, 3] = 3
    """1: grey, 3: RGB; images of the other kind are converted."""
    workers: int = 2
    """Loader processes; 0 loads in the training process."""
    memory_mib: int = 512
    """Keep decoded images in memory where all of a split fit in so much; 0 decodes them every time. CIFAR-10 needs
    147 MiB."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The random augmentation that makes one view. Every field's default is the identity."""

    crop_probability: float = 0.0
    """How often an image gets a random resized crop. Paper: 0.95."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random resized crop as a share of the image. Paper: (0.08, 1)."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop."""
    flip_probability: float = 0.0
    """How often an image is mirrored left to right."""
    randaugment_probability: float = 0.0
    """How often an image gets RandAugment. Paper: 0.65."""
    randaugment_ops: int = 2
    """Operations drawn an image (RandAugment's N)."""
    randaugment_magnitude: int = 9
    """Strength from 0 to 30 (RandAugment's M)."""
    noise_std: float = 0.0
    """Gaussian noise added in [-1, 1] units. Paper: 0.10 for source views."""


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How a source and a target view are made of one image."""

    source: PipelineConfig = field(default_factory=PipelineConfig)
    target: PipelineConfig = field(default_factory=PipelineConfig)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its schedule, and the weights' moving average."""

    lr: float = 1e-4
    """The denoiser's rate. Paper: 1e-4."""
    encoder_lr_multiplier: float = 2.0
    """The encoder's rate over the denoiser's. Paper: 2."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of its two moments. Paper: (0.9, 0.95)."""
    weight_decay: float = 0.05
    """AdamW's. Paper: 0.05; never on norms and biases."""
    warmup_images: int = 256_000
    """Images over which the rate rises linearly from 0. Its length is ours."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or cosine to zero at `total_images`."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient. Paper: 1.0."""
    ema_decay: float = 0.9999
    """Decay a step of the weights' moving average. Paper: 0.9999. In the first steps it is
    min(ema_decay, (1 + step) / (10 + step))."""


@dataclass(frozen=True, kw_only=True)
class CadenceConfig:
    """How often things happen, in images seen; 0 turns one off."""

    log_images: int = 10_000
    """A line of the log."""
    checkpoint_images: int = 500_000
    """A checkpoint."""
    sample_images: int = 1_000_000
    """A picture of reconstructions."""
    probe_images: int = 2_500_000
    """A probe of z."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A pretraining run. The same command with the same --out resumes it."""

    data: str = "digits"
    """digits (ships with scikit-learn); a folder of parquet files, images or WebDataset tars; a Hugging Face name."""
    out: str = "runs/soda"
    """The run's folder: checkpoints, logs, pictures."""
    total_images: int = 10_000_000
    """Images to train on, counted with repetition."""
    max_minutes: float | None = None
    """Stop, after saving, when this much time has passed in this call."""
    batch_size: int = 256
    """Images a step, over all processes."""
    accumulate: int = 1
    """Split each step into so many backward passes."""
    seed: int = 0
    """Key of every random draw: weights, order, views, noise, masks, dropout."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda."""
    threads: int | None = None
    """PyTorch's threads on a CPU; one a core if not given. A model of small tensors gains little from a second, and
    loses much of it where another program takes that core."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU, fp32 on a CPU."""
    channels_last: bool = True
    """Keep images and features channels-last in memory."""
    kernels: Literal["auto", "reference"] = "auto"
    """auto: the fastest kernel for the device; reference: plain PyTorch. They differ in speed alone."""
    checkpoint_activations: Literal["none", "norms", "blocks"] = "none"
    """What the denoiser's backward computes again instead of keeping it: norms' results, or all but the inputs of
    blocks. Less memory, more time, the same results to the bit."""
    compile: Literal["none", "default", "graphs"] = "none"
    """Compile the model with torch.compile, which takes minutes at the start; graphs: as CUDA graphs too, which need a
    GPU and one backward pass a step. The kernels stay the same."""
    max_bad_steps: int = 5
    """Steps in a row with a NaN or infinite loss after which the run stops; such steps are skipped and counted."""
    tensorboard: bool = True
    """Also log to TensorBoard."""
    profile: bool = False
    """Name phases and kernel calls as NVTX ranges, and trace steps 6 to 10 of this call into OUT/profile."""
    dry_run: bool = False
    """Print the resolved settings and the model's size, and stop."""
    model: SodaConfig = field(default_factory=SodaConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    cadence: CadenceConfig = field(default_factory=CadenceConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a config into plain dicts, lists and scalars, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
    """Build a config of class `cls` from `to_dict`'s output.

    Raises:
        ValueError: a key is no field of `cls`, or a value has the wrong type; the message names it.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__} is {values!r}; it must be an object of named fields")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {unknown[0]!r}; its fields are {sorted(hints)}")
    return cls(**{name: _decode(hints[name], value, f"{cls.__name__}.{name}") for name, value in values.items()})


def _decode(hint: Any, value: Any, where: str) -> Any:
    """Turn a JSON value into what `hint` says, or raise a ValueError that names `where`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r}; it must be an object of named fields")
        return from_dict(typing.cast(type, hint), value)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _decode(next(a for a in args if a is not types.NoneType), value, where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} is {value!r}; it must be one of {list(args)}")
        return value
    if origin is tuple:
        length = None if args[-1] is Ellipsis else len(args)
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            raise ValueError(f"{where} is {value!r}; it must be a list" + (f" of {length}" if length else ""))
        return tuple(_decode(args[0], v, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where} is {value!r}; it must be of type {hint.__name__}")
    return value
