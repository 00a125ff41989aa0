"""The attention that is measured, as data, one line a case, and what no kernel can do without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from benchmarks.cases import DTYPES, MODES, ShapeSet, cut_down

LAYOUTS = ("packed", "separate")


class AttentionShape(NamedTuple):
    """Self-attention on a packed projection, or from queries to as many keys in tensors of their own."""

    batch: int
    queries: int
    heads: int
    head_dim: int
    keys: int | None = None


ATTENTION_SHAPES = {
    # 1024 heads fill an H200; 8 leave most of it to the blocks of their queries.
    "lengths": ShapeSet(2, tuple(
        AttentionShape(batch, length, 8, head_dim)
        for batch in (128, 1) for head_dim in (32, 64) for length in (64, 256, 1024)
    )),
    "cifar": ShapeSet(8, (
        AttentionShape(128,  256,  4,  64),
        AttentionShape(128,   64,  4,  64),
    )),
    "soda-64": ShapeSet(2, (
        AttentionShape( 64, 1024,  6,  64),
        AttentionShape( 64,  256,  9,  64),
        AttentionShape( 64,   64, 12,  64),
    )),
    "soda-128": ShapeSet(2, (
        AttentionShape( 16, 1024,  8,  64),
        AttentionShape( 16,  256, 12,  64),
        AttentionShape( 16,   64, 16,  64),
    )),
    "sd15": ShapeSet(1, (
        AttentionShape(  8, 4096,  8,  40),
        AttentionShape( 32, 1024,  8,  80),
        AttentionShape( 32,  256,  8, 160),
        AttentionShape( 32,   64,  8, 160),
        AttentionShape(  8, 4096,  8,  40, keys=77),
        AttentionShape( 32, 1024,  8,  80, keys=77),
        AttentionShape( 32,  256,  8, 160, keys=77),
        AttentionShape( 32,   64,  8, 160, keys=77),
    )),
    "odd": ShapeSet(2, (
        AttentionShape(  4,   49,  3,  40),
        AttentionShape(  1, 1023,  5,  24),
        AttentionShape(  2,   17,  2, 256),
        AttentionShape(  4,   33,  3,  64, keys=13),
        AttentionShape(  4,    1,  3,  64, keys=257),
    )),
    # What the small models of the suite e2e have, a training step's and a sampled batch's.
    "small": ShapeSet(128, (
        AttentionShape(128,   64,  1,  24),
        AttentionShape( 64,   64,  1,  24),
        AttentionShape(128,   16,  2,  16),
        AttentionShape( 32,  256,  2,  32),
        AttentionShape( 32,   64,  2,  32),
    )),
    # For rehearsals of the suite itself.
    "tiny": ShapeSet(2, (
        AttentionShape(  2,   16,  2,  16),
        AttentionShape(  2,   16,  2,  16, keys=7),
    )),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One shape in one dtype."""

    shape_set: str
    shape: AttentionShape
    dtype: str

    op: ClassVar[str] = "attention"
    """As rows of results call it."""
    modes: ClassVar[tuple[str, ...]] = MODES

    @property
    def id(self) -> str:
        """The shape in words: `sd15/8x4096x77-h8-d40` is 8 samples of 4096 queries and 77 keys, in 8 heads of 40."""
        shape = self.shape
        lengths = f"{shape.queries}" if shape.keys is None else f"{shape.queries}x{shape.keys}"
        return f"{self.shape_set}/{shape.batch}x{lengths}-h{shape.heads}-d{shape.head_dim}"

    @property
    def layout(self) -> str:
        """How q, k and v come: as one "packed" (B, T, 3, H, D), or "separate", each (B, T or S, H, D)."""
        return "packed" if self.shape.keys is None else "separate"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Every tensor's dtype."""
        return DTYPES[self.dtype]

    @property
    def pairs(self) -> int:
        """Batch times heads."""
        return self.shape.batch * self.shape.heads

    @property
    def num_keys(self) -> int:
        """As many as queries where the projection is packed."""
        return self.shape.queries if self.shape.keys is None else self.shape.keys

    @property
    def image_elements(self) -> int:
        """Elements of the smaller of q and k: tensors on which the width of accesses matters have as many at least."""
        return self.pairs * min(self.shape.queries, self.num_keys) * self.shape.head_dim

    def with_batch(self, batch: int) -> AttentionCase:
        """The same case with another number of samples."""
        return AttentionCase(shape_set=self.shape_set, shape=self.shape._replace(batch=batch), dtype=self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """What identifies the case in a row of results."""
        shape = self.shape
        return {
            "set": self.shape_set, "id": self.id, "B": shape.batch, "T": shape.queries, "S": self.num_keys,
            "H": shape.heads, "D": shape.head_dim, "layout": self.layout, "dtype": self.dtype,
        }  # fmt: skip


def attention_cases(
    shape_sets: Sequence[str], layouts: Sequence[str], dtype: str, *, on_cpu: bool = False
) -> list[AttentionCase]:
    """List the cases of some shape sets, with batches cut down for a CPU if asked; a layout's cases stay together."""
    cases = [
        AttentionCase(shape_set=name, shape=shape, dtype=dtype)
        for name in shape_sets
        for shape in ATTENTION_SHAPES[name].shapes
    ]
    ordered = [case for layout in layouts for case in cases if case.layout == layout]
    return cut_down(ordered, ATTENTION_SHAPES) if on_cpu else ordered


def attention_floor_bytes(case: AttentionCase, mode: str) -> int:
    """Count the bytes that no kernel can do without: each input read once, each output written once.

    Forward: q, k and v; o and lse. Backward: do, q, k, v, o and lse; dq, dk and dv. lse is one fp32 a query and head.

    Args:
        mode: "fwd", "bwd" or "fwd+bwd", which is the sum.
    """
    if mode == "fwd+bwd":
        return attention_floor_bytes(case, "fwd") + attention_floor_bytes(case, "bwd")
    row = case.pairs * case.shape.head_dim * case.torch_dtype.itemsize
    of_queries, of_keys = row * case.shape.queries, row * case.num_keys
    lse = case.pairs * case.shape.queries * torch.float32.itemsize
    if mode == "fwd":
        return 2 * of_queries + 2 * of_keys + lse
    return 4 * of_queries + 4 * of_keys + lse


def attention_flops(case: AttentionCase, mode: str) -> int:
    """Count the operations of attention's products, two forward and five backward; a multiply-add is two."""
    products = {"fwd": 2, "bwd": 5, "fwd+bwd": 7}[mode]
    return products * 2 * case.pairs * case.shape.queries * case.num_keys * case.shape.head_dim
