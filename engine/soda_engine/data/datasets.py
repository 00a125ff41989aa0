"""Labelled images by index, from scikit-learn's digits or from anything that Hugging Face `datasets` reads.

Images are decoded when they are asked for, and those of a set that fits in memory stay there. One that cannot be
decoded is skipped and reported by name: a broken file among a million must not end a run.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from soda_engine.config import DatasetConfig
from soda_engine.data.decoding import decode_image, fit_image
from soda_engine.data.sources import Source, open_source

Split = Literal["train", "test"]


class ImageDataset(torch.utils.data.Dataset[Tensor]):
    """Images of one size by index, with what is known about them.

    Attributes:
        image_size, channels: every image is [channels, image_size, image_size] uint8.
        num_classes: number of classes, 0 without labels.
        class_names: name of each class, where the source has names.
    """

    def __init__(
        self, *, image_size: int, channels: int, labels: Tensor | None, num_classes: int, class_names: list[str] | None
    ) -> None:
        self.image_size = image_size
        self.channels = channels
        self.num_classes = num_classes
        self.class_names = class_names
        self._labels = labels

    def labels(self) -> Tensor | None:
        """Return the classes of all images, [len] int64 with -1 where one is unknown, or None. Decodes nothing."""
        return self._labels

    def name(self, index: int) -> str:
        """Say where an image comes from, for reports."""
        raise NotImplementedError

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[int], list[str]]:
        """Decode several images.

        Returns:
            [M, C, S, S] uint8, the images that could be decoded; their M places in `indices`; the names of the others.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index is {index}; the data set holds {len(self)} images")
        images, kept, skipped = self.read([index % len(self)])
        if not kept:
            raise ValueError(f"{skipped[0]} cannot be decoded")
        return images[0]


class TensorDataset(ImageDataset):
    """Images that lie decoded in memory.

    Args:
        images: [N, C, S, S] uint8.
        labels: [N] int64, or None.
        class_names: name of each class.
        name: what the images are called in reports.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        class_names: list[str] | None = None,
        name: str = "tensor",
    ) -> None:
        if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[2] != images.shape[3]:
            raise ValueError(f"images is {images.dtype} {tuple(images.shape)}; it must be uint8 [N, C, S, S]")
        if labels is not None and (labels.shape != images.shape[:1] or labels.dtype != torch.int64):
            raise ValueError(f"labels is {labels.dtype} {tuple(labels.shape)}; it must be int64 [{len(images)}]")
        known = 0 if labels is None or len(labels) == 0 else int(labels.max()) + 1
        super().__init__(
            image_size=images.shape[-1],
            channels=images.shape[1],
            labels=labels,
            num_classes=len(class_names) if class_names else known,
            class_names=class_names,
        )
        self._images = images
        self._name = name

    def name(self, index: int) -> str:
        return f"{self._name} image {index}"

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[int], list[str]]:
        images = self._images.index_select(0, torch.as_tensor(indices, dtype=torch.int64))
        return images, list(range(len(indices))), []

    def __len__(self) -> int:
        return len(self._images)


class EncodedDataset(ImageDataset):
    """Image files of a Hugging Face source, decoded when asked for."""

    def __init__(self, source: Source, *, image_size: int, channels: int) -> None:
        super().__init__(
            image_size=image_size,
            channels=channels,
            labels=source.labels,
            num_classes=source.num_classes,
            class_names=source.class_names,
        )
        self._source = source

    def name(self, index: int) -> str:
        return self._source.name(index)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[int], list[str]]:
        images, kept, skipped = [], [], []
        for place, file in enumerate(self._source.files(indices)):
            try:
                if file is None:
                    raise ValueError("the image is missing")
                images.append(decode_image(file, self.image_size, self.channels))
                kept.append(place)
            except Exception:  # on bad bytes Pillow's plugins raise nearly anything
                skipped.append(self.name(indices[place]))
        shape = (0, self.channels, self.image_size, self.image_size)
        return torch.stack(images) if images else torch.empty(shape, dtype=torch.uint8), kept, skipped

    def __len__(self) -> int:
        return len(self._source)


class KeptDataset(ImageDataset):
    """Another data set, each of whose images stays in memory from its first reading on.

    Decoding a JPEG of 32x32 takes 180 us of a core of an EPYC, fetching it from memory 1 us or less. The memory is
    shared with loader processes that are forked later, so that an image which one of them decodes is there for all; a
    process that is started anew instead keeps its own. It is taken from the system as it is filled.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        super().__init__(
            image_size=dataset.image_size,
            channels=dataset.channels,
            labels=dataset.labels(),
            num_classes=dataset.num_classes,
            class_names=dataset.class_names,
        )
        self._dataset = dataset
        # Arrays and not tensors, which would move through /dev/shm to a process started anew: 64 MiB in a container.
        pixels = np.frombuffer(mmap.mmap(-1, max(1, num_bytes(dataset))), dtype=np.uint8, count=num_bytes(dataset))
        self._pixels = pixels.reshape(len(dataset), dataset.channels, dataset.image_size, dataset.image_size)
        self._there = np.frombuffer(mmap.mmap(-1, max(1, len(dataset))), dtype=np.bool_, count=len(dataset))

    def name(self, index: int) -> str:
        return self._dataset.name(index)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[int], list[str]]:
        rows = np.asarray(indices, dtype=np.int64)
        missing = np.unique(rows[~self._there[rows]])
        if len(missing):
            images, kept, _ = self._dataset.read(missing.tolist())
            self._pixels[missing[kept]] = images.numpy()
            # Last, since another process may read what is marked.
            self._there[missing[kept]] = True
        there = self._there[rows]
        # Copies whole images; indexing with a tensor goes through them byte by byte, and takes seven times as long.
        images = torch.from_numpy(self._pixels).index_select(0, torch.from_numpy(rows[there]))
        return images, np.flatnonzero(there).tolist(), [self.name(int(row)) for row in rows[~there]]

    def __len__(self) -> int:
        return len(self._dataset)


def num_bytes(dataset: ImageDataset) -> int:
    """Return how much memory all images of a data set take once they are decoded."""
    return len(dataset) * dataset.channels * dataset.image_size**2


class SelectedDataset(ImageDataset):
    """Some images of another data set.

    Args:
        dataset: where the images lie.
        indices: [M] int64, which of them and in which order.
    """

    def __init__(self, dataset: ImageDataset, indices: Tensor) -> None:
        labels = dataset.labels()
        super().__init__(
            image_size=dataset.image_size,
            channels=dataset.channels,
            labels=None if labels is None else labels[indices],
            num_classes=dataset.num_classes,
            class_names=dataset.class_names,
        )
        self._dataset, self._indices = dataset, indices

    def name(self, index: int) -> str:
        return self._dataset.name(int(self._indices[index]))

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[int], list[str]]:
        return self._dataset.read(self._indices[torch.as_tensor(list(indices), dtype=torch.int64)].tolist())

    def __len__(self) -> int:
        return len(self._indices)


def open_dataset(source: str, config: DatasetConfig, split: Split, seed: int = 0) -> ImageDataset:
    """Open one part of a data set.

    Args:
        source: "digits"; a folder of parquet files, of images (one folder a class) or of WebDataset tars; one .parquet
            or .tar file; or the name of a data set on the Hugging Face hub, as "owner/name" or "owner/name:config".
        config: columns, splits, image size and channels.
        split: train, or test as `config.test_split` says.
        seed: draws what is held out for testing where the source itself has no test split.

    Raises:
        FileNotFoundError: there is nothing of this name.
        ValueError: the source is empty or broken, or lacks the split or column; the message says what was found.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; it must be train or test")
    if config.image_size < 1 or config.channels not in (1, 3):
        raise ValueError(
            f"image_size is {config.image_size} and channels {config.channels}; "
            "the size must be positive and the channels 1 or 3"
        )
    if config.memory_mib < 0:
        raise ValueError(f"memory_mib is {config.memory_mib}; it must be at least 0")
    if source == "digits":
        return _open_digits(config, split, seed)
    encoded = EncodedDataset(
        open_source(source, config, split, seed), image_size=config.image_size, channels=config.channels
    )
    return KeptDataset(encoded) if num_bytes(encoded) <= config.memory_mib * 2**20 else encoded


def _open_digits(config: DatasetConfig, split: Split, seed: int) -> TensorDataset:
    """Return 70% of scikit-learn's 1797 digits for training, or the other 30%, with equal shares of every class."""
    # scikit-learn takes a second to import, which a run on other data need not wait for.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        np.arange(len(digits.target)), test_size=0.3, stratify=digits.target, random_state=seed % 2**32
    )
    chosen = np.sort(parts[0 if split == "train" else 1])
    levels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    images = torch.stack([fit_image(Image.fromarray(x), config.image_size, config.channels) for x in levels])
    labels = torch.from_numpy(digits.target[chosen].astype(np.int64))
    return TensorDataset(images, labels, class_names=[str(n) for n in digits.target_names], name=f"digits {split}")
