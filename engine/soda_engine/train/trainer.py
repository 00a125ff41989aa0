"""The trainer: one class with the state of a run, a `train` and a `step` that each fit one screen."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from soda_engine.config import TrainConfig
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
from soda_engine.train.compiling import begin_pass, compile_model
from soda_engine.train.ema import Ema
from soda_engine.train.interruption import noted_interruption
from soda_engine.train.logging import RunLog
from soda_engine.train.milestones import draw_first_images, probe_latents
from soda_engine.train.optim import (
    Statistics,
    build_optimizer,
    clip_and_step,
    learning_rate_factor,
    set_learning_rate,
)
from soda_engine.train.profiling import span, traced
from soda_engine.train.settings import OtherRunError, alone_in, check_same_run, check_settings, save_settings
from soda_kernels import use_backend

MAX_SKIPPED_LINES = 20

# Steps between two reads of what a GPU measured, where no log line comes first.
_MOST_UNREAD = 100


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class _Unread:
    """A step whose loss and gradient norms are still on the device; None where no step could be taken."""

    images: int
    step: int
    lr: float
    measured: Tensor | None  # [3]: loss, norms of the encoder's and of the denoiser's gradient


class Trainer:
    """A pretraining run, resumed from its folder if it has a checkpoint.

    A step never waits for the device. Whether it was finite is decided there; its loss is read every `read_every`
    steps, at each line of the log and before a checkpoint.

    Args:
        config: every setting of the run.

    Attributes:
        model: the weights in training. ema: their moving average. progress: how far the run is, as far as it was read.
        parallel: what a step calls for its losses: the model, wrapped where there are several processes.
        interrupted: whether the last `train` ended because the user asked it to.
        read_every: how many steps may stay unread; 1 on a CPU, where reading is free.

    Raises:
        ValueError, FileNotFoundError: a setting is wrong, data are missing, or `config.out` holds another run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.run = config, Path(config.out)
        self.processes = processes = distributed.start(config.device)
        check_settings(config, processes.world_size)
        check_same_run(self.run, config)
        self.train_set = open_dataset(config.data, config.dataset, "train", seed=config.seed)
        self.test_set: ImageDataset | None = None
        if config.cadence.sample_images or config.cadence.probe_images:
            self.test_set = open_dataset(config.data, config.dataset, "test", seed=config.seed)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = Soda(config.model).to(device=processes.device)
        self.model.to(memory_format=layout)  # type: ignore[call-overload]
        self.model.denoiser.checkpoint_activations(config.checkpoint_activations)
        self.ema = Ema(self.model, config.optim.ema_decay)
        distributed.synchronize_batch_norms(self.model, processes)
        self.optimizer = build_optimizer(self.model, config.optim)
        self._statistics = Statistics(self.model)
        self._weights = [list(part.parameters()) for part in (self.model.encoder, self.model.denoiser)]
        self.progress = self._resume()
        self.ema.num_updates.fill_(self.progress.step - self.progress.skipped_steps)
        compile_model(self.model, config.compile, processes.device)
        self.parallel = distributed.parallelize(self.model, processes)
        self.layout = layout
        # Shapes never change in training, so cuDNN may time its algorithms once.
        torch.backends.cudnn.benchmark = processes.device.type == "cuda"
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and processes.device.type == "cuda")
        self.read_every = 1 if processes.device.type == "cpu" else _MOST_UNREAD
        self._unread: list[_Unread] = []
        self._metrics: dict[str, float] = {}  # of the last step that was read
        self._bad_steps_in_a_row = 0
        self.interrupted = False

    def train(self) -> Progress:
        """Train until the images, the time or the user's patience runs out; then save.

        Raises:
            TrainingStopped: the loss was not finite for too many steps in a row.
        """
        with alone_in(self.run) if self.processes.is_main else contextlib.nullcontext():
            self._begin()
            return self._train()

    def _train(self) -> Progress:
        """Take steps and pass milestones until it is time to stop."""
        config, progress = self.config, self.progress
        log = RunLog(
            self.run, images=progress.images, total_images=config.total_images, tensorboard=config.tensorboard,
            enabled=self.processes.is_main,
        )  # fmt: skip
        start, window = time.monotonic(), (progress.images, progress.seconds)
        out_of_time = self.interrupted = False
        trace = traced(self.run / "profile", log.say, enabled=config.profile and self.processes.is_main)
        with (
            noted_interruption() as interruption, use_backend(config.kernels), contextlib.closing(log),
            trace as end_step,
        ):  # fmt: skip
            if 0 < progress.images < config.total_images:
                log.say(f"resuming {self.run} at {progress.images:,} images")
            batches = self._batches()
            while progress.images < config.total_images:
                before, tick = progress.images, time.monotonic()
                with span("data"):
                    batch = next(batches)
                self.step(batch, log)
                progress.seconds += time.monotonic() - tick
                due = self._passed(before, config.cadence.log_images)
                if due or len(self._unread) >= self.read_every:
                    self.read(log)
                log.advance(config.batch_size, **({"loss": f"{self._metrics['loss']:.4f}"} if self._metrics else {}))
                if due:
                    rate = (progress.images - window[0]) / (progress.seconds - window[1])
                    window = progress.images, progress.seconds
                    log.write("train", progress.images, self._window() | self._metrics | {"images_per_second": rate})
                    progress.window_loss, progress.window_steps = 0.0, 0
                minutes = (time.monotonic() - start) / 60
                self.interrupted, out_of_time = self.processes.any(
                    interruption.is_set(), config.max_minutes is not None and minutes >= config.max_minutes
                )
                if self.interrupted or out_of_time:  # at once: a probe may take minutes, and patience may not
                    break
                self._milestones(before, log)
                end_step()
            self.read(log)
            if progress.step and progress.skipped_steps == progress.step:
                raise TrainingStopped(f"none of {progress.step} steps could be taken; see the lines above for why")
            finished = progress.images >= config.total_images
            if finished and self._metrics and progress.window_steps:
                log.write("train", progress.images, self._window() | self._metrics)
            saved = self.save()
            log.say(
                f"{progress.images:,} images seen: {self.run} is complete" if finished else
                f"{'interrupted' if self.interrupted else 'stopped'} at {progress.images:,} images, saved as {saved}; "
                "the same command goes on from there"
            )  # fmt: skip
        return progress

    def step(self, batch: Batch, log: RunLog | None = None) -> None:
        """Take one optimizer step on this process's share of a global batch, unless its loss is not finite.

        Launches the work and returns; what came of it is for `read`.
        """
        config, progress = self.config, self.progress
        too_small, skipping = self.processes.any(len(batch) < config.accumulate, bool(batch.skipped))
        num_skipped = self._count_skipped(batch, log) if skipping else 0
        factor = learning_rate_factor(progress.images + config.batch_size, config.total_images, config.optim)
        measured = None
        if not too_small:  # else nearly every image of a process is unreadable: none can take the step
            set_learning_rate(self.optimizer, factor)
            statistics = self._statistics.copy()
            loss = self._backward(batch, config.batch_size - num_skipped)
            with span("optimizer"):
                norms = [
                    torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
                    for weights in self._weights
                ]
                measured = torch.stack((loss, *norms))
                skip = 1 - measured.isfinite().all().float()
                clip_and_step(self.optimizer, torch.hypot(*norms), config.optim.grad_clip, skip)
                self._statistics.undo(statistics, skip)
                self.optimizer.zero_grad(set_to_none=True)
            with span("ema"):
                self.ema.update(self.model, skip)
        progress.images += config.batch_size
        progress.step += 1
        self._unread.append(_Unread(progress.images, progress.step, config.optim.lr * factor, measured))

    def read(self, log: RunLog | None = None) -> dict[str, float]:
        """Fetch what the steps since the last read measured, in one transfer, and count it.

        Returns:
            Of the last step: loss (over the global batch), lr, and the gradient norms of encoder and denoiser.

        Raises:
            TrainingStopped: `max_bad_steps` steps in a row were not finite.
        """
        unread, self._unread = self._unread, []
        progress, longest = self.progress, 0
        measured = [step.measured for step in unread if step.measured is not None]
        rows: Iterator[list[float]] = iter(())
        if measured:
            start = time.monotonic()
            rows = iter(torch.stack(measured).tolist())
            progress.seconds += time.monotonic() - start  # which a GPU still needed for the steps
        for step in unread:
            if step.measured is None:
                self._metrics = {"loss": math.nan}
                progress.skipped_steps += 1
                continue
            loss, encoder_norm, denoiser_norm = next(rows)
            self._metrics = {
                "loss": loss, "lr": step.lr, "grad_norm_encoder": encoder_norm, "grad_norm_denoiser": denoiser_norm,
            }  # fmt: skip
            if all(math.isfinite(value) for value in (loss, encoder_norm, denoiser_norm)):
                self._bad_steps_in_a_row = 0
                progress.window_loss += loss
                progress.window_steps += 1
                continue
            progress.skipped_steps += 1
            self._bad_steps_in_a_row += 1
            longest = max(longest, self._bad_steps_in_a_row)
            if log is not None:
                log.say(
                    f"step {step.step} skipped: loss {loss}, gradient norms {encoder_norm} and {denoiser_norm}"
                )
        if longest >= self.config.max_bad_steps:
            self._stop(longest, log)
        return self._metrics

    def save(self, *, keep: int | None = None) -> Path:
        """Write a checkpoint now, from the main process, keep the newest `keep`, and return its folder."""
        self.read()
        path = self.run / "checkpoints" / f"{self.progress.images:012d}"
        try:
            if self.processes.is_main:
                with span("checkpoint"):
                    path = save_checkpoint(
                        self.run, self.model, self.ema.model, self.optimizer, self.progress,
                        keep=self.config.cadence.keep_checkpoints if keep is None else keep,
                    )  # fmt: skip
        finally:
            self.processes.barrier()
        return path

    def _backward(self, batch: Batch, num_images: int) -> Tensor:
        """Accumulate the gradients of the mean loss over the global batch's `num_images`, and return that loss."""
        config, device = self.config, self.processes.device
        # Data parallelism averages gradients over the processes, so each scales its sum by their number.
        scale = self.processes.world_size / num_images
        total = torch.zeros((), device=device)
        parts = batch.split(config.accumulate)
        for index, part in enumerate(parts):
            with span("views"):
                source, target = self._views(part)
            sample_ids = part.sample_ids.to(device, non_blocking=True)
            with distributed.synchronizing(self.parallel, enabled=index == len(parts) - 1):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                    seed, step = begin_pass(config.seed, self.progress.step, config.compile, device)
                    losses = self.parallel(source, target, seed=seed, sample_ids=sample_ids, step=step)
                loss = losses.sum() * scale
                with span("backward"):
                    loss.backward()
            total += loss.detach()
        return self.processes.sum(total) / self.processes.world_size

    def _views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Draw the source and the target view of each image, on the device and in the model's layout."""
        model, views = self.config.model, self.config.views
        key: dict[str, Any] = {"seed": self.config.seed, "sample_ids": batch.sample_ids, "epochs": batch.epochs}
        images = batch.images.to(self.processes.device, non_blocking=True)
        source = make_view(images, views.source, model.encoder.image_size, role="source", **key)
        target = make_view(images, views.target, model.denoiser.image_size, role="target", **key)
        return source.contiguous(memory_format=self.layout), target.contiguous(memory_format=self.layout)

    def _milestones(self, before: int, log: RunLog) -> None:
        """Save, draw and probe where a multiple of their cadence was passed."""
        cadence, progress = self.config.cadence, self.progress
        if self._passed(before, cadence.checkpoint_images):
            self.read(log)
            try:
                self.save()
            except OSError as error:  # the next one may find space
                log.say(str(error))
        if not self.processes.is_main or self.test_set is None:
            return
        images = progress.images
        try:
            if self._passed(before, cadence.sample_images):
                path = self.run / "samples" / f"{images:012d}.png"
                draw_first_images(self.ema.model, self.test_set, path, images_seen=images)
                log.write("samples", images, {"path": str(path.relative_to(self.run))})
            if self._passed(before, cadence.probe_images):
                accuracies = probe_latents(self.ema.model, self.train_set, self.test_set)
                log.write("probe", images, accuracies)
                log.say(f"probe at {images:,} images: " + ", ".join(f"{k} {v:.4f}" for k, v in accuracies.items()))
        except (ValueError, OSError) as error:  # data without labels, a full disk: no reason to end a run
            log.say(f"no picture or probe at {images:,} images: {error}")

    def _passed(self, before: int, every: int) -> bool:
        """Tell whether the last step passed a multiple of `every` images; never for 0."""
        return every > 0 and self.progress.images // every > before // every

    def _window(self) -> dict[str, Any]:
        """Return the mean loss since the last log line, the running counts and the peak memory."""
        progress, device = self.progress, self.processes.device
        memory = {"peak_memory_mib": torch.cuda.max_memory_allocated(device) / 2**20} if device.type == "cuda" else {}
        mean = progress.window_loss / progress.window_steps if progress.window_steps else float("nan")
        return {
            "step": progress.step, "window_loss": mean, "seconds": progress.seconds,
            "skipped_steps": progress.skipped_steps, "skipped_images": progress.skipped_images, **memory,
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

    def _count_skipped(self, batch: Batch, log: RunLog | None) -> int:
        """Count and name the unreadable images of the global batch; every process must call it."""
        names, progress = self.processes.gather(batch.skipped), self.progress
        for name in names:
            progress.skipped_images += 1
            if log is not None:
                log.write("skipped_image", progress.images, {"name": name})
                if progress.skipped_images <= MAX_SKIPPED_LINES:
                    log.say(f"skipped an unreadable image: {name}")
                elif progress.skipped_images == MAX_SKIPPED_LINES + 1:
                    log.say("more unreadable images: from here on they are named in metrics.jsonl alone")
        return len(names)

    def _stop(self, bad_steps: int, log: RunLog | None) -> NoReturn:
        """Save the weights that are there, and give up."""
        before = list_checkpoints(self.run)
        saved = self.save(keep=len(before) + 1)  # what was good before must stay
        raise TrainingStopped(
            f"the loss was not finite for {bad_steps} steps in a row, the last at {self.progress.images:,} images; "
            f"the weights without them are saved as {saved}"
            + (f", and earlier ones are in {before[-1]}: delete the newer to go back" if before else "")
            + "; try --precision fp32, or a lower --optim.lr with another --out"
        )

    def _resume(self) -> Progress:
        """Load the newest checkpoint that every process can load, or start anew. Writes nothing."""
        self._damaged: list[tuple[Path, str]] = []
        for folder in reversed(list_checkpoints(self.run)):
            progress, problem = None, "another process cannot load it"
            try:
                progress = load_checkpoint(folder, self.model, self.ema.model, self.optimizer)
            except ValueError as error:
                problem = str(error)
            (failed,) = self.processes.any(progress is None)
            if progress is None or failed:
                self._damaged.append((folder, problem))
            elif progress.dataset_images != len(self.train_set):
                raise OtherRunError(
                    f"{self.run} was trained on {progress.dataset_images:,} images, and {self.config.data!r} holds "
                    f"{len(self.train_set):,}; give the same data to resume it, or another --out"
                )
            else:
                return progress
        if self._damaged:
            raise ValueError(
                f"no checkpoint of {self.run} can be resumed (the newest: {self._damaged[0][1]}); its weights may "
                "still load for use; give another --out to start anew"
            )
        return Progress(dataset_images=len(self.train_set))

    def _begin(self) -> None:
        """Put the run's folder in order, from the main process: settings, leftovers, damaged checkpoints."""
        if self.processes.is_main:
            save_settings(self.run, self.config)
            remove_unfinished(self.run)
            for folder, problem in self._damaged:
                print(f"{problem}; set aside, going on from the one before", file=sys.stderr)
                set_aside(folder)
        self._damaged = []
