"""The 3x3 convolutions that are measured, as data, one line a case, and what no kernel can do without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from benchmarks.cases import DTYPES, MODES, ShapeSet, cut_down

LAYOUTS = ("nchw", "nhwc")


class ConvolutionShape(NamedTuple):
    """Images and the number of filters of 3x3 that go over them, with stride 1 and padding 1."""

    batch: int
    channels: int
    filters: int
    height: int
    width: int


def _square(batch: int, channels: int, filters: int, side: int) -> ConvolutionShape:
    return ConvolutionShape(batch, channels, filters, side, side)


CONVOLUTION_SHAPES = {
    # Of the presets with these names, in which a decoder's first convolution of a block is over a concatenation. First
    # and last convolutions, of images' one or three channels, are PyTorch's.
    "cifar": ShapeSet(16, (
        _square(128, 128, 128, 32),
        _square(128, 256, 256, 16),
        _square(128, 256, 256,  8),
        _square(128, 512, 256,  8),
    )),
    "cifar-small": ShapeSet(128, (
        _square(128,  24,  24, 16),
        _square(128,  48,  48, 16),
        _square(128,  72,  24, 16),
        _square(128,  48,  48,  8),
        _square(128,  72,  48,  8),
        # The encoder, a ResNet-18 of half the width.
        _square(128,  32,  32, 16),
        _square(128,  64,  64,  8),
        _square(128, 128, 128,  4),
        _square(128, 256, 256,  2),
    )),
    "digits": ShapeSet(128, (
        _square(128,  16,  16,  8),
        _square(128,  32,  32,  8),
        _square(128,  48,  16,  8),
        _square(128,  32,  32,  4),
        _square(128,  64,  32,  4),
        _square(128,  64,  64,  2),
    )),
    # On images of 32x32, as the encoder of the presets cifar10 and cifar10-light.
    "resnet18": ShapeSet(32, (
        _square( 64,  64,  64, 32),
        _square( 64, 128, 128, 16),
        _square( 64, 256, 256,  8),
        _square( 64, 512, 512,  4),
    )),
    "odd": ShapeSet(4, (
        ConvolutionShape(4, 40, 72, 33, 47),
        _square(  1,  64,  64,  8),
        _square(  2, 512, 512,  4),
    )),
    # For rehearsals of the suite itself.
    "tiny": ShapeSet(2, (ConvolutionShape(2, 8, 16, 6, 4),)),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ConvolutionCase:
    """One shape in one layout and dtype, with a bias; filters lie as images do."""

    shape_set: str
    shape: ConvolutionShape
    layout: str
    dtype: str

    op: ClassVar[str] = "conv3x3"
    """As rows of results call it."""
    modes: ClassVar[tuple[str, ...]] = MODES

    @property
    def id(self) -> str:
        """The shape in words: `cifar/16x512->256@8x8` is 16 images of 512 channels, and 256 filters."""
        shape = self.shape
        return f"{self.shape_set}/{shape.batch}x{shape.channels}->{shape.filters}@{shape.height}x{shape.width}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Every tensor's dtype."""
        return DTYPES[self.dtype]

    def with_batch(self, batch: int) -> ConvolutionCase:
        """The same case with another number of images."""
        return ConvolutionCase(
            shape_set=self.shape_set, shape=self.shape._replace(batch=batch), layout=self.layout, dtype=self.dtype
        )

    def to_dict(self) -> dict[str, Any]:
        """What identifies the case in a row of results."""
        shape = self.shape
        return {
            "set": self.shape_set, "id": self.id, "N": shape.batch, "C": shape.channels, "K": shape.filters,
            "H": shape.height, "W": shape.width, "layout": self.layout, "dtype": self.dtype,
        }  # fmt: skip


def convolution_cases(
    shape_sets: Sequence[str], layouts: Sequence[str], dtype: str, *, on_cpu: bool = False
) -> list[ConvolutionCase]:
    """List the cases of some shape sets, with batches cut down for a CPU if asked; a layout's cases stay together."""
    cases = [
        ConvolutionCase(shape_set=name, shape=shape, layout=layout, dtype=dtype)
        for layout in layouts
        for name in shape_sets
        for shape in CONVOLUTION_SHAPES[name].shapes
    ]
    return cut_down(cases, CONVOLUTION_SHAPES) if on_cpu else cases


def convolution_floor_bytes(case: ConvolutionCase, mode: str) -> int:
    """Count the bytes that no kernel can do without: each input read once, each output written once.

    Forward: x, weight and bias; y. Backward: dy, x and weight; dx and the gradients of weight and bias.

    Args:
        mode: "fwd", "bwd" or "fwd+bwd", which is the sum.
    """
    if mode == "fwd+bwd":
        return convolution_floor_bytes(case, "fwd") + convolution_floor_bytes(case, "bwd")
    shape = case.shape
    pixels = shape.batch * shape.height * shape.width
    x, y, weight = pixels * shape.channels, pixels * shape.filters, 9 * shape.channels * shape.filters
    elements = x + y + weight if mode == "fwd" else 2 * x + y + 2 * weight
    return (elements + shape.filters) * case.torch_dtype.itemsize


def convolution_flops(case: ConvolutionCase, mode: str) -> int:
    """Count the operations of the convolution's definition, of which Winograd's algorithm takes fewer.

    A multiply-add is two, and border counts as if it were image; the backward is two convolutions.
    """
    shape = case.shape
    one = 2 * 9 * shape.batch * shape.height * shape.width * shape.channels * shape.filters
    return {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[mode] * one
