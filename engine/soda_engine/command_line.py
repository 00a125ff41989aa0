"""The commands of `soda-engine`, as one type from which tyro makes the parser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Union

import tyro

from soda_engine.commands import Directions, Encode, Interpolate, Mix, Probe, Reconstruct, Sample
from soda_engine.config import TrainConfig
from soda_engine.demo import Demo
from soda_engine.info import Info, describe
from soda_engine.presets import PRESETS
from soda_engine.train import distributed
from soda_engine.train.trainer import Trainer

DESCRIPTION = "Pretrain SODA models, and use them: sample, reconstruct, encode, probe, edit."



def _describe_preset(config: TrainConfig) -> str:
    encoder, denoiser = config.model.encoder, config.model.denoiser
    return (
        f"{config.data}: {encoder.arch} at {encoder.image_size} px, z of {config.model.latent.dim}, denoiser at "
        f"{denoiser.image_size} px; {config.total_images / 1e6:g}M images"
    )


# One subcommand a preset, whose flags are the fields of TrainConfig with the preset's values as defaults.
Preset: Any = Annotated[
    tyro.extras.subcommand_type_from_defaults(
        PRESETS, descriptions={name: _describe_preset(preset) for name, preset in PRESETS.items()}, prefix_names=False
    ),
    tyro.conf.arg(name=""),
]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Pretrain a model. The same command with the same --out resumes."""

    config: Preset

    def __call__(self) -> None:
        config: TrainConfig = self.config
        if config.dry_run:
            print(describe(config))
            return
        try:
            Trainer(config).train()
        finally:
            distributed.stop()


def _subcommand(name: str, command: type) -> Any:
    return Annotated[command, tyro.conf.subcommand(name=name)]


COMMANDS_BY_NAME: dict[str, type] = {
    "train": Train,
    "sample": Sample,
    "reconstruct": Reconstruct,
    "encode": Encode,
    "probe": Probe,
    "interpolate": Interpolate,
    "mix": Mix,
    "directions": Directions,
    "info": Info,
    "demo": Demo,
}
COMMANDS: Any = Union[tuple(_subcommand(name, command) for name, command in COMMANDS_BY_NAME.items())]  # noqa: UP007
