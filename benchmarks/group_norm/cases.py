"""The group norms that are measured, as data, one line a case, and what no kernel can do without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from benchmarks.cases import DTYPES, MODES, ShapeSet, cut_down

LAYOUTS = ("nchw", "nhwc")


class NormShape(NamedTuple):
    """The input of one modulated group norm; a pair (h, skip) where there are skip channels."""

    batch: int
    channels: int
    height: int
    width: int
    modulations: int
    num_groups: int = 32
    skip_channels: int = 0


def _pair(batch: int, channels: int, skip_channels: int, side: int) -> NormShape:
    """The first norm of a block in the up path: over a concatenation, and not modulated."""
    return NormShape(batch, channels, side, side, modulations=0, skip_channels=skip_channels)


NORM_SHAPES = {
    "cifar": ShapeSet(32, (
        NormShape(128,  128,  32,  32, modulations=2),
        NormShape(128,  256,  16,  16, modulations=2),
        NormShape(128,  256,   8,   8, modulations=2),
        _pair(128, 256, 128, 32),
    )),
    "soda-64": ShapeSet(8, (
        NormShape( 64,  192,  64,  64, modulations=2),
        NormShape( 64,  384,  32,  32, modulations=2),
        NormShape( 64,  576,  16,  16, modulations=2),
        NormShape( 64,  768,   8,   8, modulations=2),
        _pair(64, 384, 192, 32),
    )),
    "soda-128": ShapeSet(2, (
        NormShape( 16,  256, 128, 128, modulations=2),
        NormShape( 16,  256,  64,  64, modulations=2),
        NormShape( 16,  512,  32,  32, modulations=2),
        NormShape( 16,  768,  16,  16, modulations=2),
        NormShape( 16, 1024,   8,   8, modulations=2),
    )),
    "adm-256": ShapeSet(1, (
        NormShape(  8,  256, 256, 256, modulations=1),
        NormShape(  8,  256, 128, 128, modulations=1),
        NormShape(  8,  512,  64,  64, modulations=1),
        NormShape(  8,  512,  32,  32, modulations=1),
        NormShape(  8, 1024,  16,  16, modulations=1),
        NormShape(  8, 1024,   8,   8, modulations=1),
        _pair(8, 512, 512, 64),
    )),
    "sd15": ShapeSet(2, (
        NormShape(  8,  320,  64,  64, modulations=1),
        NormShape( 32,  640,  32,  32, modulations=1),
        NormShape( 32, 1280,  16,  16, modulations=1),
        NormShape( 32, 1280,   8,   8, modulations=1),
        _pair(32, 1280, 640, 32),
        NormShape(  1,  320,  64,  64, modulations=1),
    )),
    "sdxl": ShapeSet(1, (
        NormShape(  4,  320, 128, 128, modulations=1),
        NormShape(  4,  640,  64,  64, modulations=1),
        NormShape(  4, 1280,  32,  32, modulations=1),
        _pair(4, 1280, 640, 64),
    )),
    "vae-decode": ShapeSet(1, (
        NormShape(  8,  128, 256, 256, modulations=0),
        NormShape(  4,  512,  64,  64, modulations=0),
    )),
    "odd": ShapeSet(64, (
        NormShape(  4,   96,  33,  47, modulations=2),
        NormShape(  4,   96,  32,  32, modulations=2),
        NormShape(  4,   64,  17,  17, modulations=1, num_groups=1),
        NormShape(  4,   64,  31,   9, modulations=1, num_groups=64),
        NormShape(  1,   96,  33,  47, modulations=1),
        NormShape(4096,  32,   4,   4, modulations=2, num_groups=8),
        _pair(4, 96, 32, 15),
    )),
    # For rehearsals of the suite itself.
    "tiny": ShapeSet(2, (NormShape(2, 16, 8, 8, modulations=2, num_groups=4),)),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NormCase:
    """One shape in one layout and dtype; parameters are fp32, modulations have the activations' dtype."""

    shape_set: str
    shape: NormShape
    layout: str
    dtype: str

    op: ClassVar[str] = "modulated_group_norm"
    """As rows of results call it."""
    modes: ClassVar[tuple[str, ...]] = MODES

    @property
    def id(self) -> str:
        """The shape in words: `soda-64/64x(384+192)@32x32-g32-m0` is a pair, in 32 groups, without modulations."""
        shape = self.shape
        channels = f"({shape.channels}+{shape.skip_channels})" if shape.skip_channels else f"{shape.channels}"
        size = f"{shape.batch}x{channels}@{shape.height}x{shape.width}"
        return f"{self.shape_set}/{size}-g{shape.num_groups}-m{shape.modulations}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The activations' dtype."""
        return DTYPES[self.dtype]

    @property
    def num_channels(self) -> int:
        """Those of both tensors of a pair."""
        return self.shape.channels + self.shape.skip_channels

    @property
    def num_elements(self) -> int:
        """Elements of the normalized tensor."""
        return self.shape.batch * self.num_channels * self.shape.height * self.shape.width

    @property
    def image_elements(self) -> int:
        """Elements of its smallest image: the tensors on which the width of accesses matters have as many at least."""
        narrowest = min(filter(None, (self.shape.channels, self.shape.skip_channels)))
        return narrowest * self.num_elements // self.num_channels

    def with_batch(self, batch: int) -> NormCase:
        """The same case with another number of samples."""
        return NormCase(
            shape_set=self.shape_set, shape=self.shape._replace(batch=batch), layout=self.layout, dtype=self.dtype
        )

    def to_dict(self) -> dict[str, Any]:
        """What identifies the case in a row of results."""
        shape = self.shape
        return {
            "set": self.shape_set, "id": self.id, "N": shape.batch, "C": shape.channels, "C_skip": shape.skip_channels,
            "H": shape.height, "W": shape.width, "G": shape.num_groups, "layout": self.layout, "dtype": self.dtype,
            "param_dtype": "fp32", "modulations": shape.modulations,
        }  # fmt: skip


def norm_cases(
    shape_sets: Sequence[str], layouts: Sequence[str], dtype: str, *, on_cpu: bool = False
) -> list[NormCase]:
    """List the cases of some shape sets, with batches cut down for a CPU if asked; a layout's cases stay together."""
    cases = [
        NormCase(shape_set=name, shape=shape, layout=layout, dtype=dtype)
        for layout in layouts
        for name in shape_sets
        for shape in NORM_SHAPES[name].shapes
    ]
    return cut_down(cases, NORM_SHAPES) if on_cpu else cases


def norm_floor_bytes(case: NormCase, mode: str) -> int:
    """Count the bytes that no kernel can do without: each input read once, each output written once.

    Forward: x, weight, bias and the modulations; y, mean and rstd. Backward: dy, x, weight, bias, the modulations, mean
    and rstd; dx and the gradients of weight, bias and the modulations. Of a pair, both tensors.

    Args:
        mode: "fwd", "bwd" or "fwd+bwd", which is the sum.
    """
    if mode == "fwd+bwd":
        return norm_floor_bytes(case, "fwd") + norm_floor_bytes(case, "bwd")
    itemsize = case.torch_dtype.itemsize
    image = case.num_elements * itemsize
    parameters = 2 * case.num_channels * torch.float32.itemsize
    modulations = 2 * case.shape.modulations * case.shape.batch * case.num_channels * itemsize
    statistics = 2 * case.shape.batch * case.shape.num_groups * torch.float32.itemsize
    if mode == "fwd":
        return 2 * image + parameters + modulations + statistics
    return 3 * image + 2 * parameters + 2 * modulations + statistics


# Operations an element, transcendental functions counted as one: the two centred sums (4), the affine map (2), SiLU
# (4); backward x_hat and the affine map (4), SiLU's derivative (8), the two sums (3), the combination (5).
_FLOPS = {"fwd": 10, "bwd": 20, "fwd+bwd": 30}


def norm_flops(case: NormCase, mode: str) -> int:
    """Estimate the operations of a modulated group norm with SiLU."""
    return _FLOPS[mode] * case.num_elements
