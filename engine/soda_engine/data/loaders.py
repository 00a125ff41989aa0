"""Batches in an order that a single number describes, so that a run resumes anywhere by saying how far it came.

The stream of training images is endless: at global position p stands image permutation(seed, p // n)[p % n] of
the n images. A batch is a stretch of it and a process takes its contiguous share, so the stream depends neither on the
number of processes nor on that of workers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from soda_engine.data.datasets import ImageDataset

# Batches each worker prepares ahead.
_PREFETCH = 4

# Unreadable images in a row after which training gives up, where the set is not so small that two epochs (a stretch
# that holds every image at least once) come first. In shuffled order so many say that next to nothing is readable.
_MAX_UNREADABLE = 4096


@dataclass
class Batch:
    """Images of a step, with the ids that key all their random numbers.

    Images that could not be decoded are missing from the tensors, which may then hold none at all.

    Attributes:
        images: [N, C, S, S] uint8.
        labels: [N] int64, or None.
        sample_ids: [N] int64, each image's index in its data set.
        epochs: [N] int64, how often the image had been passed before.
        skipped: names of the images that could not be decoded.
    """

    images: Tensor
    labels: Tensor | None
    sample_ids: Tensor
    epochs: Tensor
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Return the batch on a device; from pinned memory the copy does not wait."""
        images, sample_ids, epochs = (
            x.to(device, non_blocking=non_blocking) for x in (self.images, self.sample_ids, self.epochs)
        )
        labels = None if self.labels is None else self.labels.to(device, non_blocking=non_blocking)
        return Batch(images, labels, sample_ids, epochs, self.skipped)

    def split(self, num_parts: int) -> list[Batch]:
        """Cut the batch into parts of nearly equal size; the first carries the names of the skipped images.

        Raises:
            ValueError: there are fewer images than parts.
        """
        if not 1 <= num_parts <= len(self):
            raise ValueError(f"num_parts is {num_parts}; it must be from 1 to the {len(self)} images of the batch")
        ends = [len(self) * index // num_parts for index in range(num_parts + 1)]
        parts = []
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            labels = None if self.labels is None else self.labels[start:end]
            images, sample_ids, epochs = (x[start:end] for x in (self.images, self.sample_ids, self.epochs))
            parts.append(Batch(images, labels, sample_ids, epochs, self.skipped if start == 0 else []))
        return parts

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory. The loader calls this where it was asked to pin."""
        labels = None if self.labels is None else self.labels.pin_memory()
        return Batch(
            self.images.pin_memory(), labels, self.sample_ids.pin_memory(), self.epochs.pin_memory(), self.skipped
        )


@functools.lru_cache(maxsize=4)
def permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order [num_images] int64 of an epoch, the same in every process; the last few are cached."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(num_images)
    order.flags.writeable = False  # the cache hands out the array itself
    return order


class _Stretches(torch.utils.data.Dataset[Batch]):
    """The stream, indexed by the position at which a batch begins; `seed` None is one pass in order."""

    def __init__(self, dataset: ImageDataset, size: int, seed: int | None) -> None:
        self.dataset, self.size, self.seed = dataset, size, seed

    def __getitem__(self, start: int) -> Batch:
        count = len(self.dataset)
        if self.seed is None:
            indices = np.arange(start, min(start + self.size, count))
            epochs = np.zeros_like(indices)
        else:
            epochs, places = np.divmod(np.arange(start, start + self.size), count)
            indices = np.concatenate(
                [permutation(count, self.seed, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
            )
        images, kept, skipped = self.dataset.read(indices.tolist())
        sample_ids, labels = torch.from_numpy(indices[kept]), self.dataset.labels()
        labels = None if labels is None else labels[sample_ids]
        return Batch(images, labels, sample_ids, torch.from_numpy(epochs[kept]), skipped)


def train_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    seed: int,
    start_image: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Iterate without end over shuffled batches, from any position.

    Batch b covers positions [start_image + b * batch_size, start_image + (b + 1) * batch_size); of it, process `rank`
    takes share `rank` of `world_size`. A batch of unreadable images is passed on empty, so that every process makes
    the same number of steps.

    Args:
        dataset: what to read.
        batch_size: images of a step over all processes.
        seed: draws the order.
        start_image: position of the first image; a run that has seen so many images resumes here.
        rank, world_size: this process, and how many there are.
        workers: loader processes; 0 loads in this one.
        pin_memory: copy batches to page-locked memory, for a GPU.

    Raises:
        ValueError: an argument is none of the above; while iterating, thousands of images in a row, or two epochs,
            could not be read.
    """
    if len(dataset) == 0:
        raise ValueError("the data set is empty; training needs at least one image")
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of world_size {world_size}; it must lie in [0, world_size)")
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(f"batch_size is {batch_size}; it must be a positive multiple of world_size {world_size}")
    if start_image < 0:
        raise ValueError(f"start_image is {start_image}; it must not be negative")
    share = batch_size // world_size
    starts = itertools.count(start_image + rank * share, batch_size)
    batches = _loader(_Stretches(dataset, share, seed), starts, workers, pin_memory)
    return _until_unreadable(batches, limit=min(2 * len(dataset), _MAX_UNREADABLE))


def eval_loader(
    dataset: ImageDataset, *, batch_size: int, workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """Iterate once over a data set in order; the last batch may be smaller.

    Raises:
        ValueError: `batch_size` is not positive; while iterating, no image of the whole set could be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be positive")
    starts = range(0, len(dataset), batch_size)
    batches = _loader(_Stretches(dataset, batch_size, None), starts, workers, pin_memory)
    return _until_unreadable(batches, limit=len(dataset))


def _loader(
    batches: _Stretches, starts: itertools.count[int] | range, workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Start the loader processes."""
    if workers < 0:
        raise ValueError(f"workers is {workers}; it must not be negative")
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=starts,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=_PREFETCH if workers else None,
        # The loader draws a seed for its workers, from the global generator unless it has its own.
        generator=torch.Generator(),
    )
    return iter(loader)


def _until_unreadable(batches: Iterator[Batch], limit: int) -> Iterator[Batch]:
    """Pass batches on until `limit` images in a row could not be read."""
    unreadable = 0
    for batch in batches:
        unreadable = 0 if len(batch) else unreadable + len(batch.skipped)
        if unreadable >= limit:
            raise ValueError(
                f"none of {unreadable} images in a row could be decoded, the last being {batch.skipped[-1]}; "
                "check that the image column holds image files and that they are complete"
            )
        yield batch
