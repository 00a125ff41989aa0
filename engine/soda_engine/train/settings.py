"""Checks of a run's settings: against one another, and against those it was started with."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soda_engine.config import TrainConfig, from_dict, to_dict
from soda_engine.records import write_json

CONFIG_NAME = "config.json"

# What may differ between a run and its resumption: the images, their order and every random draw stay the same.
# `data` may have moved; that it still holds as many images is checked by the trainer.
_FREE_FIELDS = {
    "data", "out", "total_images", "max_minutes", "device", "threads", "precision", "channels_last", "kernels",
    "checkpoint_activations", "compile", "max_bad_steps", "tensorboard", "profile", "dry_run", "cadence",
    "dataset.workers", "dataset.memory_mib",
}  # fmt: skip


class OtherRunError(ValueError):
    """The folder holds a run with other settings."""


def check_settings(config: TrainConfig, world_size: int) -> None:
    """Raise a ValueError where settings do not fit one another."""
    share = config.batch_size // world_size
    if config.batch_size < 1 or config.batch_size % world_size:
        raise ValueError(f"batch_size is {config.batch_size}; it must be a positive multiple of {world_size} processes")
    if not 1 <= config.accumulate <= share:
        raise ValueError(f"accumulate is {config.accumulate}; it must be from 1 to the {share} images a process takes")
    if config.compile == "graphs" and config.accumulate > 1:
        raise ValueError(f"accumulate is {config.accumulate}; with compile graphs it must be 1")
    if config.threads is not None and config.threads < 1:
        raise ValueError(f"threads is {config.threads}; it must be positive")
    for name, channels in (
        ("encoder", config.model.encoder.in_channels), ("denoiser", config.model.denoiser.in_channels)
    ):  # fmt: skip
        if channels != config.dataset.channels:
            raise ValueError(
                f"model.{name}.in_channels is {channels} and dataset.channels {config.dataset.channels}; "
                "they must be equal"
            )
    optim, cadence = config.optim, config.cadence
    for name, value, fits, wanted in (
        ("total_images", config.total_images, config.total_images >= 1, "positive"),
        ("max_minutes", config.max_minutes, config.max_minutes is None or config.max_minutes >= 0, "at least 0"),
        ("max_bad_steps", config.max_bad_steps, config.max_bad_steps >= 1, "positive"),
        ("optim.lr", optim.lr, 0 < optim.lr < math.inf, "positive"),
        ("optim.encoder_lr_multiplier", optim.encoder_lr_multiplier, optim.encoder_lr_multiplier >= 0, "at least 0"),
        ("optim.weight_decay", optim.weight_decay, optim.weight_decay >= 0, "at least 0"),
        ("optim.warmup_images", optim.warmup_images, optim.warmup_images >= 0, "at least 0"),
        ("optim.grad_clip", optim.grad_clip, optim.grad_clip > 0, "positive"),
        ("optim.ema_decay", optim.ema_decay, 0 <= optim.ema_decay < 1, "in [0, 1)"),
        ("cadence.keep_checkpoints", cadence.keep_checkpoints, cadence.keep_checkpoints >= 1, "positive"),
        *((f"cadence.{name}", value, value >= 0, "at least 0") for name, value in vars(cadence).items()),
    ):  # fmt: skip
        if not fits:
            raise ValueError(f"{name} is {value}; it must be {wanted}")


def check_same_run(run: Path, config: TrainConfig) -> None:
    """Raise an OtherRunError that names the first setting in which a started run and its resumption differ.

    Raises:
        ValueError: the run's config.json is damaged.
    """
    path = run / CONFIG_NAME
    if not path.exists():
        return
    try:
        old = _flatten(json.loads(path.read_text()))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}; give another --out, or restore the file") from error
    new = _flatten(to_dict(config))
    free = _FREE_FIELDS - ({"total_images"} if config.optim.schedule == "cosine" else set())
    for name in sorted(old.keys() | new.keys()):
        if not {name, name.split(".")[0]} & free and old.get(name) != new.get(name):
            raise OtherRunError(
                f"{run} was started with {name} = {old.get(name)!r}, not {new.get(name)!r}; "
                + ("a cosine schedule needs the length it began with; " if name == "total_images" else "")
                + "give the same settings to resume it, or another --out"
            )


def save_settings(run: Path, config: TrainConfig) -> None:
    """Write a run's config.json."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / CONFIG_NAME, to_dict(config))


def load_settings(run: Path) -> TrainConfig | None:
    """Read a run's config.json; None where there is none, or that of a saved model, which no run's settings are in.

    Raises:
        ValueError: it is damaged.
    """
    path = run / CONFIG_NAME
    try:
        values = json.loads(path.read_text()) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return from_dict(TrainConfig, values) if "dataset" in values else None


@contextlib.contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """Hold a run's folder for this process, until it ends however it ends.

    Raises:
        ValueError: another process trains in that folder.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process trains in {run}; wait for it, or give another --out") from None
        yield


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested dicts into one with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
