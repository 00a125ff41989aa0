"""The tensors of a group norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.group_norm.cases import NormCase
from benchmarks.steps import Forward

EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class NormProblem:
    """The inputs of one modulated group norm and the gradient that comes back to it."""

    outputs: ClassVar[tuple[str, ...]] = ("y",)

    x: Tensor
    skip: Tensor | None
    weight: Tensor
    bias: Tensor
    modulations: tuple[Tensor, ...]
    """scale, shift, scale, shift."""
    num_groups: int
    dy: Tensor

    @property
    def named_inputs(self) -> dict[str, Tensor]:
        """What gradients are taken of, by name."""
        named = {"x": self.x, "skip": self.skip, "weight": self.weight, "bias": self.bias}
        for index, tensor in enumerate(self.modulations):
            named[f"{('scale', 'shift')[index % 2]}{index // 2 + 1}"] = tensor
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def gradient(self) -> Tensor:
        """What comes back to the result."""
        return self.dy

    @property
    def pairs(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The modulations as the public function takes them."""
        return tuple(zip(self.modulations[0::2], self.modulations[1::2], strict=True))

    def call(self, forward: Forward) -> Tensor:
        """Apply a function with the signature of `soda_kernels.modulated_group_norm`."""
        x = self.x if self.skip is None else (self.x, self.skip)
        return forward(x, self.num_groups, self.weight, self.bias, self.pairs)

    def with_noise(self) -> NormProblem:
        """Return this problem, in which there is no noise."""
        return self

    def double(self) -> NormProblem:
        """Return contiguous copies of every tensor in fp64, apart from this problem's graph."""

        def copy(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            wide = tensor.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
            return wide.requires_grad_(tensor.requires_grad)

        return NormProblem(
            x=copy(self.x), skip=copy(self.skip), weight=copy(self.weight), bias=copy(self.bias),
            modulations=tuple(copy(tensor) for tensor in self.modulations), num_groups=self.num_groups,
            dy=copy(self.dy),
        )  # fmt: skip


def norm_problem(case: NormCase, device: torch.device | str, *, seed: int = 0, grad: bool = False) -> NormProblem:
    """Draw a case's tensors; on the meta device they have shapes and no values."""
    device, dtype, shape = torch.device(device), case.torch_dtype, case.shape
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    layout = torch.channels_last if case.layout == "nhwc" else torch.contiguous_format

    def normal(*size: int, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(size, generator=generator, device=device).mul_(std).add_(mean).to(dtype)
        return values.contiguous(memory_format=layout) if len(size) == 4 else values

    def image(channels: int, mean: float = 0.0) -> Tensor:
        return normal(shape.batch, channels, shape.height, shape.width, mean=mean)

    problem = NormProblem(
        x=image(shape.channels, mean=0.5),
        skip=image(shape.skip_channels) if shape.skip_channels else None,
        weight=normal(case.num_channels, mean=1.0, std=0.1, dtype=torch.float32),
        bias=normal(case.num_channels, std=0.1, dtype=torch.float32),
        modulations=tuple(normal(shape.batch, case.num_channels, std=0.3) for _ in range(2 * shape.modulations)),
        num_groups=shape.num_groups,
        dy=image(case.num_channels),
    )
    for tensor in problem.named_inputs.values():
        tensor.requires_grad_(grad)
    return problem
