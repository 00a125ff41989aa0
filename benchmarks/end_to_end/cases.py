"""The models, batches and lengths that are timed from end to end, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.providers import BASELINE, OURS
from soda_engine.config import CadenceConfig, DenoiserConfig, EncoderConfig, LatentConfig, SodaConfig, TrainConfig
from soda_engine.presets import PRESETS

SUITE = "e2e"
OPS = ("train_step", "sample", "encode")
LOSS_CURVE = "loss_curve"
DTYPES = ("fp32", "bf16")
COMPILE, OWN_COMPILED = "compile", "ours-compiled"
PROVIDERS = (OURS, BASELINE, COMPILE, OWN_COMPILED)


@dataclass(frozen=True, kw_only=True)
class EndToEndCase:
    """A run's settings, and how much of each op a device can bear."""

    name: str
    config: TrainConfig
    batch: int
    """Images of a training step."""
    sampled: int
    """Images made at a time."""
    num_steps: int
    """Denoiser calls for them."""
    encoded: int
    """Images encoded at a time."""
    curve_steps: int = 0
    """Training steps of the loss curves; 0 has none."""

    def num_images(self, op: str) -> int:
        """Return how many images one call of an op takes."""
        return {"train_step": self.batch, "sample": self.sampled, "encode": self.encoded}[op]

    def to_dict(self, op: str, dtype: str) -> dict[str, Any]:
        """As it stands in a row of results."""
        denoiser, encoder = self.config.model.denoiser, self.config.model.encoder
        of_op = {"num_steps": self.num_steps, "method": "ddim"} if op == "sample" else {}
        image = encoder if op == "encode" else denoiser
        return {
            "id": f"{self.name}/{self.num_images(op)}", "set": self.name, "N": self.num_images(op),
            "C": image.in_channels, "H": image.image_size, "W": image.image_size, "dtype": dtype, **of_op,
        }  # fmt: skip

    def run_config(self, out: str, device: str, dtype: str) -> TrainConfig:
        """Return settings for the trainer: nothing but steps, at the full learning rate from the first one on.

        Its data set is the digits, at this model's size: batches are handed to its steps.
        """
        optim = dataclasses.replace(self.config.optim, warmup_images=0, schedule="constant")
        return dataclasses.replace(
            self.config, data="digits", out=out, batch_size=self.batch, device=device, precision=dtype, threads=None,
            tensorboard=False, optim=optim,
            cadence=CadenceConfig(log_images=0, checkpoint_images=0, sample_images=0, probe_images=0),
        )  # fmt: skip


def _preset(name: str, **fields: Any) -> EndToEndCase:
    return EndToEndCase(name=name, config=PRESETS[name], **fields)


_UNET_32 = dataclasses.replace(
    PRESETS["cifar10-small"],
    model=SodaConfig(
        encoder=EncoderConfig(width=32, image_size=32),
        denoiser=DenoiserConfig(
            image_size=32, channels=32, multipliers=(1, 2, 2), blocks=1, attention_resolutions=(16, 8), head_dim=32,
            num_groups=8, dropout=0.1,
        ),
        latent=LatentConfig(dim=128),
    ),
)  # fmt: skip

_TINY = dataclasses.replace(
    PRESETS["digits"],
    model=SodaConfig(
        encoder=EncoderConfig(in_channels=1, width=8, image_size=8),
        denoiser=DenoiserConfig(
            in_channels=1, image_size=8, channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,),
            head_dim=8, num_groups=4, dropout=0.0,
        ),
        latent=LatentConfig(dim=12),
    ),
)  # fmt: skip

CPU_CASES = {
    case.name: case
    for case in (
        _preset("digits", batch=128, sampled=64, num_steps=10, encoded=256, curve_steps=60),
        _preset("cifar10-small", batch=128, sampled=64, num_steps=10, encoded=256),
        EndToEndCase(name="unet-32", config=_UNET_32, batch=32, sampled=16, num_steps=10, encoded=64),
        _preset("cifar10", batch=4, sampled=2, num_steps=4, encoded=32),
        EndToEndCase(name="tiny", config=_TINY, batch=8, sampled=4, num_steps=3, encoded=8, curve_steps=5),
    )
}
"""Those that two cores can time; `tiny` is there to rehearse."""

CUDA_CASES = {
    case.name: case
    for case in (
        _preset("cifar10", batch=256, sampled=256, num_steps=50, encoded=1024, curve_steps=200),
        _preset("imagenet64", batch=1024, sampled=64, num_steps=50, encoded=1024),
        CPU_CASES["tiny"],
    )
}
"""Those of a GPU: presets at their batch."""

CASE_NAMES = tuple(dict.fromkeys((*CPU_CASES, *CUDA_CASES)))


def choose_cases(names: Sequence[str] | None, device_type: str) -> list[EndToEndCase]:
    """List the cases of some names; if not given, all but the one that rehearses.

    Raises:
        ValueError: a name is none of the device's.
    """
    there = CUDA_CASES if device_type == "cuda" else CPU_CASES
    for name in names or ():
        if name not in there:
            raise ValueError(f"{name} is no case of {SUITE} on {device_type}, which has {', '.join(there)}")
    return [there[name] for name in names or there if names or name != "tiny"]
