"""Features of a data set: one vector an image, with its label and its id, and the files they are kept in."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from tqdm import tqdm

from soda_engine.data.datasets import ImageDataset
from soda_engine.data.loaders import eval_loader

SUFFIXES = (".npz", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class Features:
    """One vector an image, in the data set's order.

    Raises:
        ValueError: the arrays disagree about the number of images, or `z` is not a matrix.
    """

    z: npt.NDArray[np.float32]
    """[N, d]"""
    labels: npt.NDArray[np.int64] | None
    """[N], −1 where one is unknown; None for a set without labels."""
    sample_ids: npt.NDArray[np.int64]
    """[N]; the id under which the data set knows the image."""
    skipped: tuple[str, ...] = ()
    """Names of the images that could not be read and so have no row."""

    def __post_init__(self) -> None:
        if self.z.ndim != 2:
            raise ValueError(f"z has shape {self.z.shape}; features are a matrix [images, dims]")
        for name, column in (("labels", self.labels), ("sample_ids", self.sample_ids)):
            if column is not None and column.shape != self.z.shape[:1]:
                raise ValueError(f"{name} has shape {column.shape}; z has {len(self.z)} rows and needs one each")

    def __len__(self) -> int:
        return len(self.z)


@torch.no_grad()
def encode_dataset(
    model: nn.Module | Callable[[Tensor], Tensor],
    dataset: ImageDataset,
    *,
    batch_size: int = 256,
    workers: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Features:
    """Encode every readable image of a data set, without augmentation and in order.

    Args:
        model: a `Soda` (its `encode` is used), or any callable that maps uint8 images [N, C, S, S] to vectors [N, d].
        dataset: what `open_dataset` returns.
        batch_size: images a call of the model.
        workers: loader processes; 0 loads in this one.
        device: where the images are sent; None: where the model's parameters are, else the CPU.
        progress: show a bar.

    Returns:
        The features; `skipped` names the images that could not be read.

    Raises:
        ValueError: no image could be read, or a feature is not finite.
    """
    encode: Callable[[Tensor], Tensor] = getattr(model, "encode", model)
    if device is None:
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        device = "cpu" if parameter is None else parameter.device
    z, labels, sample_ids, skipped = [], [], [], []
    with tqdm(total=len(dataset), unit="img", desc="encode", disable=not progress) as bar:
        for batch in eval_loader(dataset, batch_size=batch_size, workers=workers):
            skipped.extend(batch.skipped)
            if len(batch.images):
                z.append(encode(batch.images.to(device)).float().cpu())
                sample_ids.append(batch.sample_ids)
                if batch.labels is not None:
                    labels.append(batch.labels)
            bar.update(len(batch.images) + len(batch.skipped))
    if not z:
        raise ValueError(f"dataset has no readable image; {len(skipped)} were skipped, the first {skipped[:1]}")
    codes = torch.cat(z)
    broken = int((~torch.isfinite(codes).all(dim=1)).sum())
    if broken:
        raise ValueError(f"z of {broken} of {len(codes)} images is not finite; the model diverged: use an earlier one")
    return Features(
        z=codes.numpy(),
        labels=torch.cat(labels).numpy() if labels else None,
        sample_ids=torch.cat(sample_ids).numpy(),
        skipped=tuple(skipped),
    )


def pixel_features(
    dataset: ImageDataset, *, batch_size: int = 256, workers: int = 0, progress: bool = False
) -> Features:
    """Flatten every image to its pixels in [-1, 1], the baseline that a representation has to beat.

    Args:
        dataset: what `open_dataset` returns.
        batch_size: images read at a time.
        workers: loader processes; 0 loads in this one.
        progress: show a bar.

    Returns:
        Features of C * S * S dims.
    """

    def flatten(images: Tensor) -> Tensor:
        return images.flatten(1).float() / 127.5 - 1

    return encode_dataset(flatten, dataset, batch_size=batch_size, workers=workers, progress=progress)


def check_features_path(path: str | Path) -> Path:
    """Return `path` as a Path whose suffix `save_features` can write; to be called before hours of encoding.

    Raises:
        ValueError: the suffix is neither .npz nor .safetensors.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"features file {str(path)!r} ends in {path.suffix!r}; it must end in .npz or .safetensors")
    return path


def save_features(features: Features, path: str | Path) -> Path:
    """Write features to a .npz or a .safetensors file that appears whole or not at all.

    The arrays are `z`, `labels` (if there are any) and `sample_ids`; the names of skipped images go into `skipped`, an
    array of text in .npz and a JSON list in the metadata of .safetensors. Neither file holds pickled objects.

    Args:
        features: what to write.
        path: the file; folders that lack are made.

    Returns:
        The file's path.

    Raises:
        ValueError: the suffix is neither .npz nor .safetensors.
    """
    path = check_features_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, npt.NDArray[Any]] = {"z": features.z, "sample_ids": features.sample_ids}
    if features.labels is not None:
        arrays["labels"] = features.labels
    # In the same folder, since a rename is atomic within one file system only.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".npz":
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, skipped=np.array(features.skipped, dtype=np.str_), **arrays)
        else:
            contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            save_file(contiguous, temporary, metadata={"skipped": json.dumps(features.skipped)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_features(path: str | Path) -> Features:
    """Read what `save_features` wrote; nothing is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the suffix is neither .npz nor .safetensors, or the file holds something else than features.
    """
    path = check_features_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"features file {str(path)!r} does not exist")
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive.items())
            skipped = tuple(arrays.pop("skipped", np.array([], dtype=np.str_)).tolist())
        else:
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                skipped = tuple(json.loads((file.metadata() or {}).get("skipped", "[]")))
        return Features(
            z=arrays["z"].astype(np.float32, copy=False),
            labels=arrays["labels"].astype(np.int64, copy=False) if "labels" in arrays else None,
            sample_ids=arrays["sample_ids"].astype(np.int64, copy=False),
            skipped=skipped,
        )
    except KeyError as error:
        raise ValueError(f"features file {str(path)!r} has no array {error}; it needs z and sample_ids") from error
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise ValueError(f"features file {str(path)!r} cannot be read: {error}") from error
