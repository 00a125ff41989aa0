"""Checkpoints: folders that appear whole or not at all, hold no pickles, and resume a run to the bit.

    run/config.json                       every setting of the run
    run/checkpoints/000001280000/         named by images seen
        model.safetensors                 the weights, with the model's config in the metadata
        ema.safetensors                   their moving average, likewise
        optimizer.safetensors             AdamW's moments, by parameter name
        state.json                        images seen, steps, skipped steps and images

No random state is stored: every draw is a function of (seed, sample id, step).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from soda_engine.models.soda import WEIGHTS_NAME, Soda, load_weights, save_weights
from soda_engine.records import write_json

EMA_NAME = "ema.safetensors"
_OPTIMIZER_NAME = "optimizer.safetensors"
_STATE_NAME = "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_UNFINISHED = ".unfinished-"


@dataclass(kw_only=True)
class Progress:
    """How far a run is; the window is what has happened since the last line of the log."""

    images: int = 0
    step: int = 0
    skipped_steps: int = 0
    skipped_images: int = 0
    seconds: float = 0.0
    window_loss: float = 0.0
    window_steps: int = 0
    dataset_images: int = 0


def save_checkpoint(
    run: Path, model: Soda, ema: Soda, optimizer: torch.optim.Optimizer, progress: Progress, *, keep: int
) -> Path:
    """Write a checkpoint beside its final place, move it there in one step, and remove all but the newest `keep`.

    A crash at any moment leaves the checkpoints there were.

    Raises:
        OSError: the disk is full or cannot be written; nothing unfinished stays behind.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{progress.images:012d}"
    if final.exists():  # a run is a function of its settings: the same images seen, the same checkpoint
        return final
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    try:
        save_weights(model, unfinished / WEIGHTS_NAME)
        save_weights(ema, unfinished / EMA_NAME)
        save_file(_optimizer_tensors(model, optimizer), unfinished / _OPTIMIZER_NAME)
        write_json(unfinished / _STATE_NAME, asdict(progress))
        for path in unfinished.iterdir():
            path.chmod(0o644)
            _flush(path)
        unfinished.chmod(0o755)
        _flush(unfinished)
        os.replace(unfinished, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(
            f"no checkpoint could be written to {folder}: {error}; earlier ones are whole: free space, and give the "
            "same command again"
        ) from error
    _flush(folder)
    for old in list_checkpoints(run)[: -max(1, keep)]:
        doomed = folder / f"{_UNFINISHED}{old.name}"  # a half-deleted one must not look finished
        os.replace(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return final


def list_checkpoints(run: Path) -> list[Path]:
    """Return a run's finished checkpoints, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("[0-9]*") if path.is_dir())


def set_aside(folder: Path) -> None:
    """Hide a damaged checkpoint from `list_checkpoints`, so that its place is free again, without deleting it."""
    os.replace(folder, folder.with_name(f".damaged-{folder.name}-{time.time_ns()}"))


def remove_unfinished(run: Path) -> None:
    """Delete what an interrupted save left."""
    for path in (run / "checkpoints").glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(folder: Path, model: Soda, ema: Soda, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore everything that `save_checkpoint` wrote.

    Raises:
        ValueError: a file is missing, damaged, or of another model; the message names it.
    """
    try:
        model.load_state_dict(load_file(folder / WEIGHTS_NAME))
        ema.load_state_dict(load_file(folder / EMA_NAME))
        moments = load_file(folder / _OPTIMIZER_NAME)
        state = json.loads((folder / _STATE_NAME).read_text())
        if any(not isinstance(state[field.name], int | float) for field in fields(Progress)):
            raise ValueError(f"{_STATE_NAME} holds something else than numbers")
        for name, parameter in model.named_parameters():
            state_of = {key: moments[f"{key}/{name}"] for key in _MOMENTS}
            # In the parameter's own layout, as AdamW made them.
            optimizer.state[parameter] = {
                "step": moments[f"step/{name}"].to(parameter.device),
                **{key: torch.empty_like(parameter).copy_(value) for key, value in state_of.items()},
            }
        return Progress(**{field.name: state[field.name] for field in fields(Progress)})
    except torch.OutOfMemoryError:
        raise
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"checkpoint {folder} cannot be loaded: {reason}") from error


def load(path: str | Path, *, ema: bool = True, device: str = "cpu") -> Soda:
    """Load a trained model for use.

    Args:
        path: a run's folder (its newest checkpoint is taken), a checkpoint's folder, a folder written by
            `save_pretrained`, or the name of a model on the Hugging Face hub.
        ema: take the moving average of the weights; no effect on a folder that has one set of weights.
        device: where to put the model.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: there is no model at that path.
        ValueError: the weights are damaged; in a run's folder, those of every checkpoint (else a warning tells which
            was passed over).
    """
    folder = Path(path)
    if not folder.exists():
        looks_like_hub_name = str(path).count("/") == 1 and not str(path).startswith((".", "runs/"))
        if looks_like_hub_name:
            try:
                return Soda.from_pretrained(str(path), map_location=device)
            except OSError as error:
                reason = str(error).splitlines()[0]
                raise FileNotFoundError(f"no model at {path}, here or on the hub: {reason}") from error
        raise FileNotFoundError(f"no model at {path}: it is no folder")
    checkpoints = list_checkpoints(folder)
    for checkpoint in reversed(checkpoints):
        try:
            return load_weights(checkpoint / (EMA_NAME if ema else WEIGHTS_NAME)).to(device)
        except (FileNotFoundError, ValueError) as error:
            if checkpoint == checkpoints[0]:
                raise ValueError(f"no checkpoint of {path} can be loaded: {error}") from error
            warnings.warn(f"{error}; loading the checkpoint before it", stacklevel=2)
    name = EMA_NAME if ema and (folder / EMA_NAME).is_file() else WEIGHTS_NAME
    if not (folder / name).is_file():
        raise FileNotFoundError(f"no model at {path}: it holds neither checkpoints nor {WEIGHTS_NAME}")
    return load_weights(folder / name).to(device)


def _optimizer_tensors(model: Soda, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name AdamW's state by parameter; a parameter that was never stepped has zeros."""
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter) or {
            "step": torch.tensor(0.0),
            **{key: torch.zeros_like(parameter) for key in _MOMENTS},
        }
        for key in ("step", *_MOMENTS):
            tensors[f"{key}/{name}"] = state[key].detach().contiguous()
    return tensors


def _flush(path: Path) -> None:
    """Push a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
