"""The tensors of a 3x3 convolution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.convolution.cases import ConvolutionCase
from benchmarks.steps import Forward


@dataclass(frozen=True, kw_only=True)
class ConvolutionProblem:
    """The inputs of one convolution and the gradient that comes back to it."""

    outputs: ClassVar[tuple[str, ...]] = ("y",)

    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor

    @property
    def named_inputs(self) -> dict[str, Tensor]:
        """What gradients are taken of, by name."""
        return {"x": self.x, "weight": self.weight, "bias": self.bias}

    @property
    def gradient(self) -> Tensor:
        """What comes back to the result."""
        return self.dy

    def call(self, forward: Forward) -> Tensor:
        """Apply a function with the signature of `soda_kernels.conv3x3`."""
        return forward(self.x, self.weight, self.bias)

    def with_noise(self) -> ConvolutionProblem:
        """Return this problem, in which there is no noise."""
        return self

    def double(self) -> ConvolutionProblem:
        """Return contiguous copies of every tensor in fp64, apart from this problem's graph."""

        def copy(tensor: Tensor) -> Tensor:
            wide = tensor.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
            return wide.requires_grad_(tensor.requires_grad)

        return ConvolutionProblem(
            x=copy(self.x), weight=copy(self.weight), bias=copy(self.bias), dy=copy(self.dy)
        )  # fmt: skip


def convolution_problem(
    case: ConvolutionCase, device: torch.device | str, *, seed: int = 0, grad: bool = False
) -> ConvolutionProblem:
    """Draw a case's tensors; on the meta device they have shapes and no values."""
    device, shape = torch.device(device), case.shape
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    layout = torch.channels_last if case.layout == "nhwc" else torch.contiguous_format

    def normal(*size: int, std: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=generator, device=device).mul_(std).to(case.torch_dtype)
        return values.contiguous(memory_format=layout) if len(size) == 4 else values

    problem = ConvolutionProblem(
        x=normal(shape.batch, shape.channels, shape.height, shape.width),
        weight=normal(shape.filters, shape.channels, 3, 3, std=1 / math.sqrt(9 * shape.channels)),
        bias=normal(shape.filters),
        dy=normal(shape.batch, shape.filters, shape.height, shape.width),
    )
    for tensor in problem.named_inputs.values():
        tensor.requires_grad_(grad)
    return problem
