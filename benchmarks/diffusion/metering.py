"""The bytes of the launches of noise-schedule sampling, metered over a few samples.

At a fixed launch config every program does the same with its own tile of its own sample. Where samples begin at the
same places in sectors, so many of them at a time move the same bytes.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch

from benchmarks.diffusion.cases import DiffusionCase, ImageShape
from benchmarks.diffusion.plans import diffusion_plan
from benchmarks.metering import Counts, extrapolate, meter_plan
from tests.harness.traffic import SECTOR_BYTES


def metered_bytes(case: DiffusionCase, mode: str, config: Any) -> tuple[Counts, tuple[ImageShape, ...]]:
    """Return the bytes of each launch of a case at one launch config, and the shape that was metered for it."""
    samples = _fewest_samples(case, mode, config)
    if case.shape.batch % samples:
        samples = case.shape.batch
    fewer = case.with_batch(samples)
    counts = meter_plan(diffusion_plan(fewer, mode, "cpu", config=config))
    return extrapolate([counts], [[1]], [1], times=case.shape.batch // samples), (fewer.shape,)


def _fewest_samples(case: DiffusionCase, mode: str, config: Any) -> int:
    """Return after how many samples their images, and the partial sums of their losses, begin with a sector again."""
    programs = Fraction(
        diffusion_plan(case, mode, "meta", config=config).launches[0].num_programs, case.shape.batch
    )  # fmt: skip
    sizes = [case.sample_elements * case.torch_dtype.itemsize, programs.numerator * torch.float32.itemsize]
    if case.call.bytes_x0:
        sizes.append(case.sample_elements)
    # A program may take several samples.
    return math.lcm(programs.denominator, *(SECTOR_BYTES // math.gcd(SECTOR_BYTES, size) for size in sizes))
