"""The bytes of a group norm's launches, metered at a few small sizes.

What a launch moves depends on shapes alone, and at a fixed launch config it is a sum of simple terms: something for
the launch (a gradient that is summed over the batch), for each block of samples that one program handles (the
parameters it reads), for each sample, and, where programs or their loops walk over an image in chunks, for each chunk;
and all of it is proportional to the number of groups. So only as many sizes are metered as there are terms, over as few
groups as look alike.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch

from benchmarks.group_norm.cases import NormCase
from benchmarks.group_norm.plans import norm_plan
from benchmarks.metering import Counts, extrapolate, meter_plan
from tests.harness.traffic import SECTOR_BYTES


class Size(NamedTuple):
    """A batch, a number of positions of an image, and of groups of channels."""

    batch: int
    spatial: int
    num_groups: int


def metered_bytes(case: NormCase, mode: str, config: Any) -> tuple[Counts, tuple[Size, ...]]:
    """Return the bytes of each launch of a case at one launch config, and the sizes that were metered for it."""
    terms = _Terms(case, config)
    metered = [meter_plan(_smaller_plan(case, size, mode, config)) for size in terms.sizes]
    repeats = case.shape.num_groups // terms.sizes[0].num_groups
    return extrapolate(metered, *terms.of_sizes(), times=repeats), terms.sizes


class _Terms:
    """What the bytes of a case are a sum of, and as many sizes."""

    def __init__(self, case: NormCase, config: Any) -> None:
        shape = case.shape
        self.whole = Size(batch=shape.batch, spatial=shape.height * shape.width, num_groups=shape.num_groups)
        self._block = config.samples
        # A resident program's tile is one chunk; where the last chunk is cut off, the whole image is one.
        chunk = config.rows * config.tiles
        self._chunk = chunk if self.whole.spatial % chunk == 0 else self.whole.spatial
        one, block, chunks = self._chunk, self._block, self.whole.spatial // self._chunk
        sizes = [(1, one), (2, one)]
        if block > 1:
            sizes.append((block + 1, one))
        if chunks > 1:
            sizes.append((1, 2 * one))
        # Samples and chunks are alike only if each begins on a sector of its own.
        aligned = _whole_sectors(case, shape.channels, case.num_channels, *([one] if chunks > 1 else []))
        # Metering every sample is the best there is, where it costs no more.
        dearer = sum(batch * spatial for batch, spatial in sizes) >= self.whole.batch * self.whole.spatial
        if dearer or not aligned:
            sizes = [(self.whole.batch, self.whole.spatial)]
        groups = _fewest_groups(case, config)
        self.sizes = tuple(Size(batch=batch, spatial=spatial, num_groups=groups) for batch, spatial in sizes)

    def of_sizes(self) -> tuple[list[list[int]], list[int]]:
        """Return the terms of each size, and those of the whole."""
        if len(self.sizes) == 1:
            return [[1]], [1]
        return [self._of(size) for size in self.sizes], self._of(self.whole)

    def _of(self, size: Size) -> list[int]:
        blocks = math.ceil(size.batch / self._block)
        terms = [1, blocks]
        if self._block > 1:
            terms.append(size.batch)
        if self.whole.spatial > self._chunk:
            terms.append(size.batch * size.spatial // self._chunk)
        return terms


def _whole_sectors(case: NormCase, *elements: int) -> bool:
    """Whether so many elements of an image always fill whole sectors."""
    return all(count * case.torch_dtype.itemsize % SECTOR_BYTES == 0 for count in elements)


def _fewest_groups(case: NormCase, config: Any) -> int:
    """Return the fewest groups whose channels fill slabs, programs and sectors as all of them do."""
    shape = case.shape
    for groups in range(1, shape.num_groups):
        times = shape.num_groups // groups
        channels = [count // times for count in (shape.channels, shape.skip_channels) if count]
        if (
            times * groups == shape.num_groups
            and groups % config.groups == 0
            and groups * torch.float32.itemsize % SECTOR_BYTES == 0  # a sample's mean and rstd
            and all(count % times == 0 for count in (shape.channels, shape.skip_channels))
            and all(count % config.slab == 0 or config.variant != "split" for count in channels)
            and _whole_sectors(case, *channels)
        ):
            return groups
    return shape.num_groups


def _smaller_plan(case: NormCase, size: Size, mode: str, config: Any) -> Any:
    """Plan a case's launches at another size."""
    height, width = case.shape.height, case.shape.width
    if size.spatial != height * width:
        height, width = 1, size.spatial  # to the kernels an image is a row of positions
    times = case.shape.num_groups // size.num_groups
    smaller = dataclasses.replace(case, shape=case.shape._replace(
        batch=size.batch, height=height, width=width, num_groups=size.num_groups,
        channels=case.shape.channels // times, skip_channels=case.shape.skip_channels // times,
    ))  # fmt: skip
    return norm_plan(smaller, mode, "cpu", config=config)
