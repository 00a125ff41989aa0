"""The trainer: one class with the state of a run, a `train` and a `step` that each fit one screen."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soda_engine.config import TrainConfig, to_dict
from soda_engine.data.datasets import ImageDataset, open_dataset
from soda_engine.data.loaders import Batch, train_loader
from soda_engine.data.views import make_view
from soda_engine.models.soda import Soda
from soda_engine.train import distributed
from soda_engine.train.checkpoint import (
    Progress,
    list_checkpoints,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
    set_aside,
)
from soda_engine.train.ema import Ema
from soda_engine.train.logging import RunLog
from soda_engine.train.milestones import draw_reconstructions, probe_latents
from soda_engine.train.optim import build_optimizer, learning_rate_factor, set_learning_rate
from soda_kernels import use_backend

CONFIG_NAME = "config.json"

# What may differ between a run and its resumption: none of it changes what is learned from the same images.
_FREE_FIELDS = {
    "out", "total_images", "max_minutes", "device", "precision", "channels_last", "kernels", "max_bad_steps",
    "tensorboard", "dry_run", "cadence", "dataset.workers",
}  # fmt: skip


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


class Trainer:
    """A pretraining run, resumed from its folder if it has a checkpoint.

    Args:
        config: every setting of the run.

    Attributes:
        model: the weights in training. ema: their moving average. progress: how far the run is.

    Raises:
        ValueError, FileNotFoundError: a setting is wrong, data are missing, or `config.out` holds another run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.run = config, Path(config.out)
        self.processes = processes = distributed.start(config.device)
        self.train_set = open_dataset(config.data, config.dataset, "train", seed=config.seed)
        _check(config, processes.world_size)
        torch.manual_seed(config.seed)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = Soda(config.model).to(device=processes.device)
        self.model.to(memory_format=layout)  # type: ignore[call-overload]
        self.ema = Ema(self.model, config.optim.ema_decay)
        distributed.synchronize_batch_norms(self.model, processes)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.progress = self._resume()
        self.parallel = distributed.parallelize(self.model, processes)
        self.layout = layout
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and processes.device.type == "cuda")
        self._bad_steps_in_a_row = 0

    def train(self) -> Progress:
        """Train until the images, the time or the user's patience runs out; then save.

        Raises:
            TrainingStopped: the loss was not finite for too many steps in a row.
        """
        config, progress = self.config, self.progress
        log = RunLog(
            self.run, images=progress.images, total_images=config.total_images, tensorboard=config.tensorboard,
            enabled=self.processes.is_main,
        )  # fmt: skip
        start, window_start, window_images = time.monotonic(), time.monotonic(), progress.images
        with _interruption() as interrupted, use_backend(config.kernels), contextlib.closing(log):
            if progress.images:
                log.say(f"resuming {self.run} at {progress.images:,} images")
            batches = self._batches()
            while progress.images < config.total_images:
                before, tick = progress.images, time.monotonic()
                metrics = self.step(next(batches), log)
                progress.seconds += time.monotonic() - tick
                log.advance(config.batch_size, loss=f"{metrics['loss']:.4f}")
                if self._passed(before, config.cadence.log_images):
                    elapsed, window_start = time.monotonic() - window_start, time.monotonic()
                    rate = (progress.images - window_images) / elapsed
                    window_images = progress.images
                    log.write("train", progress.images, self._window() | metrics | {"images_per_second": rate})
                self._milestones(before, log)
                minutes = (time.monotonic() - start) / 60
                out_of_time = config.max_minutes is not None and minutes >= config.max_minutes
                if self.processes.any(interrupted.is_set() or out_of_time):
                    break
            saved = self.save()
            why = "interrupted" if interrupted.is_set() else "stopped"
            if progress.images < config.total_images:
                log.say(f"{why} at {progress.images:,} images, saved as {saved}; the same command goes on from there")
        return progress

    def step(self, batch: Batch, log: RunLog | None = None) -> dict[str, float]:
        """Take one optimizer step on this process's share of a global batch, unless its loss is not finite.

        Returns:
            loss (over the global batch), lr, and the gradient norms of encoder and denoiser.

        Raises:
            TrainingStopped: `max_bad_steps` steps in a row were not finite.
        """
        config, progress, model = self.config, self.progress, self.model
        self._count_skipped(batch, log)
        if self.processes.any(len(batch) == 0):  # every image unreadable: no process can take the step
            progress.images, progress.step = progress.images + config.batch_size, progress.step + 1
            return {"loss": float("nan")}
        factor = learning_rate_factor(progress.images + config.batch_size, config.total_images, config.optim)
        set_learning_rate(self.optimizer, factor)
        statistics = [buffer.clone() for buffer in model.buffers()]
        loss = self._backward(batch)
        encoder_norm, denoiser_norm = (
            torch.nn.utils.get_total_norm([p.grad for p in part.parameters() if p.grad is not None])
            for part in (model.encoder, model.denoiser)
        )
        total_norm = torch.hypot(encoder_norm, denoiser_norm)
        metrics = {
            "loss": float(loss), "lr": config.optim.lr * factor, "grad_norm_encoder": float(encoder_norm),
            "grad_norm_denoiser": float(denoiser_norm),
        }  # fmt: skip
        finite = math.isfinite(metrics["loss"]) and bool(torch.isfinite(total_norm))
        if finite:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.optim.grad_clip, total_norm)
            self.optimizer.step()
            self.ema.update(model, progress.step - progress.skipped_steps)
            progress.window_loss += metrics["loss"]
            progress.window_steps += 1
        else:  # leave no trace in the batch norms' statistics either
            torch._foreach_copy_(list(model.buffers()), statistics)
        self.optimizer.zero_grad(set_to_none=True)
        progress.images += config.batch_size
        progress.step += 1
        self._count_bad(finite, metrics, log)
        return metrics

    def save(self) -> Path:
        """Write a checkpoint now, from the main process, and return its folder."""
        path = self.run / "checkpoints" / f"{self.progress.images:012d}"
        if self.processes.is_main:
            path = save_checkpoint(
                self.run, self.model, self.ema.model, self.optimizer, self.progress,
                keep=self.config.cadence.keep_checkpoints,
            )  # fmt: skip
        self.processes.barrier()
        return path

    def _backward(self, batch: Batch) -> Tensor:
        """Accumulate the gradients of the global batch's mean loss, and return that loss."""
        config, device = self.config, self.processes.device
        share = config.batch_size // self.processes.world_size
        total = torch.zeros((), device=device)
        parts = batch.split(math.ceil(share / config.accumulate))
        for index, part in enumerate(parts):
            part = part.to(device)
            source, target = self._views(part)
            with distributed.synchronizing(self.parallel, enabled=index == len(parts) - 1):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                    losses = self.parallel(
                        source, target, seed=config.seed, sample_ids=part.sample_ids, step=self.progress.step
                    )
                loss = losses.sum() / share
                loss.backward()
            total += loss.detach()
        return self.processes.sum(total) / self.processes.world_size

    def _views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Draw the source and the target view of each image, in the model's layout."""
        model, views = self.config.model, self.config.views
        key: dict[str, Any] = {"seed": self.config.seed, "sample_ids": batch.sample_ids, "epochs": batch.epochs}
        source = make_view(batch.images, views.source, model.encoder.image_size, role="source", **key)
        target = make_view(batch.images, views.target, model.denoiser.image_size, role="target", **key)
        return source.contiguous(memory_format=self.layout), target.contiguous(memory_format=self.layout)

    def _milestones(self, before: int, log: RunLog) -> None:
        """Save, draw and probe where a multiple of their cadence was passed."""
        cadence, progress = self.config.cadence, self.progress
        if self._passed(before, cadence.checkpoint_images):
            self.save()
        if self.processes.is_main and self._passed(before, cadence.sample_images):
            path = self.run / "samples" / f"{progress.images:012d}.png"
            draw_reconstructions(self.ema.model, self._test_set(), path, images_seen=progress.images)
            log.write("samples", progress.images, {"path": str(path.relative_to(self.run))})
        if self.processes.is_main and self._passed(before, cadence.probe_images):
            self._probe(log)

    def _probe(self, log: RunLog) -> None:
        """Probe the average's z and log the accuracies; data that cannot be probed do not end a run."""
        images = self.progress.images
        try:
            accuracies = probe_latents(self.ema.model, self.train_set, self._test_set())
        except ValueError as error:
            log.say(f"no probe at {images:,} images: {error}")
            return
        log.write("probe", images, accuracies)
        log.say(f"probe at {images:,} images: " + ", ".join(f"{k} {v:.4f}" for k, v in accuracies.items()))

    def _passed(self, before: int, every: int) -> bool:
        """Tell whether the last step passed a multiple of `every` images; never for 0."""
        return every > 0 and self.progress.images // every > before // every

    def _window(self) -> dict[str, Any]:
        """Return the mean loss since the last log line and the running counts, and start a new window."""
        progress = self.progress
        mean = progress.window_loss / progress.window_steps if progress.window_steps else float("nan")
        progress.window_loss, progress.window_steps = 0.0, 0
        return {
            "step": progress.step, "window_loss": mean, "seconds": progress.seconds,
            "skipped_steps": progress.skipped_steps, "skipped_images": progress.skipped_images,
        }  # fmt: skip

    def _batches(self) -> Iterator[Batch]:
        config, processes = self.config, self.processes
        return iter(
            train_loader(
                self.train_set, batch_size=config.batch_size, seed=config.seed, start_image=self.progress.images,
                rank=processes.rank, world_size=processes.world_size, workers=config.dataset.workers,
                pin_memory=processes.device.type == "cuda",
            )  # fmt: skip
        )

    def _test_set(self) -> ImageDataset:
        return open_dataset(self.config.data, self.config.dataset, "test", seed=self.config.seed)

    def _count_skipped(self, batch: Batch, log: RunLog | None) -> None:
        self.progress.skipped_images += len(batch.skipped)
        if log is not None:
            for name in batch.skipped:
                log.say(f"skipped an unreadable image: {name}")
                log.write("skipped_image", self.progress.images, {"name": name})

    def _count_bad(self, finite: bool, metrics: dict[str, float], log: RunLog | None) -> None:
        """Count a step that was not finite, and stop after too many in a row."""
        if finite:
            self._bad_steps_in_a_row = 0
            return
        progress = self.progress
        progress.skipped_steps += 1
        self._bad_steps_in_a_row += 1
        if log is not None:
            log.say(f"step {progress.step} skipped: loss {metrics['loss']}, gradient norms "
                    f"{metrics['grad_norm_encoder']} and {metrics['grad_norm_denoiser']}")  # fmt: skip
        if self._bad_steps_in_a_row >= self.config.max_bad_steps:
            saved = list_checkpoints(self.run)
            raise TrainingStopped(
                f"the loss was not finite for {self._bad_steps_in_a_row} steps in a row, the last at "
                f"{progress.images:,} images; the last good checkpoint is "
                f"{saved[-1] if saved else 'none yet'}: lower --optim.lr or use --precision fp32"
            )

    def _resume(self) -> Progress:
        """Load the newest checkpoint that can be loaded, or write the settings of a new run."""
        path, settings = self.run / CONFIG_NAME, to_dict(self.config)
        checkpoints = list_checkpoints(self.run)
        if path.exists():
            _check_same_run(json.loads(path.read_text()), settings, self.run)
        if self.processes.is_main:
            self.run.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.run)
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(settings, indent=2) + "\n")
            os.replace(unfinished, path)
        self.processes.barrier()
        for folder in reversed(checkpoints):
            try:
                return load_checkpoint(folder, self.model, self.ema.model, self.optimizer)
            except ValueError as error:
                if folder == checkpoints[0]:
                    raise
                if self.processes.is_main:
                    print(f"{error}; set aside, trying the one before", file=sys.stderr)
                    set_aside(folder)
        return Progress()


def _check(config: TrainConfig, world_size: int) -> None:
    """Raise a ValueError where settings do not fit one another."""
    if config.batch_size < 1 or config.batch_size % world_size:
        raise ValueError(f"batch_size is {config.batch_size}; it must be a multiple of the {world_size} processes")
    if not 1 <= config.accumulate <= config.batch_size // world_size:
        raise ValueError(f"accumulate is {config.accumulate}; it must be from 1 to the images of a process and step")
    for name, channels in (
        ("encoder", config.model.encoder.in_channels), ("denoiser", config.model.denoiser.in_channels)
    ):  # fmt: skip
        if channels != config.dataset.channels:
            raise ValueError(f"model.{name}.in_channels is {channels} and dataset.channels {config.dataset.channels}")
    if config.total_images < 1:
        raise ValueError(f"total_images is {config.total_images}; it must be positive")


def _check_same_run(old: dict[str, Any], new: dict[str, Any], run: Path) -> None:
    """Raise a ValueError that names the first setting in which a run and its resumption differ."""
    old_flat, new_flat = _flatten(old), _flatten(new)
    for name in sorted(old_flat.keys() | new_flat.keys()):
        free = name in _FREE_FIELDS or name.split(".")[0] in _FREE_FIELDS
        if not free and old_flat.get(name) != new_flat.get(name):
            raise ValueError(
                f"{run} was started with {name} = {old_flat.get(name)!r}, not {new_flat.get(name)!r}; "
                "give the same settings to resume it, or another --out"
            )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested dicts into one with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


@contextlib.contextmanager
def _interruption() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event; the second acts as usual. Only in the main thread."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        event.set()
        for name, handler in previous.items():
            signal.signal(name, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
