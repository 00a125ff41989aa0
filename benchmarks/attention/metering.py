"""The bytes of attention's launches, metered over few heads and at a few short lengths.

At a fixed launch config every program does the same with its own heads. Where heads begin at the same places in
sectors, so many of them at a time move the same bytes; and where whole blocks make up the lengths, what they move is a
sum of something for each block of queries, for each block of keys, for each pair of both, and for each head. With rows
that fill whole sectors it does not matter either how many of them lie between two of one head.

The interpreter multiplies the bit patterns of bf16 instead of their values: the results are wrong, and the bytes, which
no value decides, are right.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.attention.cases import AttentionCase, AttentionShape
from benchmarks.attention.plans import attention_plan
from benchmarks.metering import Counts, extrapolate, meter_plan
from tests.harness.traffic import SECTOR_BYTES


def metered_bytes(case: AttentionCase, mode: str, config: Any) -> tuple[Counts, tuple[AttentionShape, ...]]:
    """Return the bytes of each launch of a case at one launch config, and the shapes that were metered for it."""
    heads = _fewest_heads(case, config)
    if heads is None:
        return _meter(case, case.shape, mode, config), (case.shape,)
    queries, keys = _lengths(case, config)
    sizes = list(itertools.product(queries.sizes, keys.sizes))
    terms = [_products(queries.terms(m), keys.terms(n)) for m, n in sizes]
    whole = _products(queries.terms(queries.whole), keys.terms(keys.whole))
    fewer = case.shape._replace(batch=1, heads=heads)
    if queries.shortened or keys.shortened:  # a packed projection could not shorten one of them alone
        shapes = tuple(fewer._replace(queries=m, keys=n) for m, n in sizes)
    else:
        shapes = (fewer,)
    metered = [_meter(case, shape, mode, config) for shape in shapes]
    return extrapolate(metered, terms, whole, times=case.pairs // heads), shapes


def _meter(case: AttentionCase, shape: AttentionShape, mode: str, config: Any) -> Counts:
    """Run a case's launches in another shape."""
    return meter_plan(attention_plan(dataclasses.replace(case, shape=shape), mode, "cpu", config=config))


class _Length(NamedTuple):
    """A number of queries or keys, and what to meter in its place."""

    whole: int
    unit: int
    """What one program, or one turn of its loop, takes."""
    shortened: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """The lengths to meter: as many as there are terms."""
        return (self.unit, 2 * self.unit) if self.shortened else (self.whole,)

    def terms(self, length: int) -> tuple[int, ...]:
        """Return what bytes are a sum of, as far as this length goes."""
        return (1, length) if self.shortened else (1,)


def _lengths(case: AttentionCase, config: Any) -> tuple[_Length, _Length]:
    """Return the queries and the keys, each shortened if it is of whole units and of more than would be metered."""
    # The backward in one kernel is another kernel where one block is all; its heads are short.
    may_shorten = config.variant != "one_kernel"
    units = (config.block_m * config.blocks, config.block_n)
    queries, keys = (
        _Length(whole=whole, unit=unit, shortened=may_shorten and whole % unit == 0 and whole > 2 * unit)
        for whole, unit in zip((case.shape.queries, case.num_keys), units, strict=True)
    )
    return queries, keys


def _products(first: Sequence[int], second: Sequence[int]) -> list[int]:
    return [a * b for a in first for b in second]


def _fewest_heads(case: AttentionCase, config: Any) -> int | None:
    """Return after how many heads programs and sectors repeat themselves, or None where they never do."""
    row = _sectors_repeat(case.shape.head_dim * case.torch_dtype.itemsize)
    heads = math.lcm(config.pairs, row, _sectors_repeat(case.shape.queries * torch.float32.itemsize))  # the last: lse
    return heads if case.shape.heads % row == 0 and case.pairs % heads == 0 else None


def _sectors_repeat(num_bytes: int) -> int:
    """Return how many neighbours of so many bytes fill whole sectors."""
    return SECTOR_BYTES // math.gcd(SECTOR_BYTES, num_bytes)
