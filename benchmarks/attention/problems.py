"""The tensors of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.attention.cases import AttentionCase
from benchmarks.steps import Forward


@dataclass(frozen=True, kw_only=True)
class AttentionProblem:
    """The inputs of one call of attention and the gradient that comes back to it."""

    outputs: ClassVar[tuple[str, ...]] = ("o",)

    inputs: tuple[Tensor, ...]
    """A packed projection (B, T, 3, H, D) alone, or q (B, T, H, D), k and v (B, S, H, D)."""
    do: Tensor
    """(B, T, H, D)."""

    @property
    def packed(self) -> Tensor | None:
        """The packed projection, if it is one."""
        return self.inputs[0] if len(self.inputs) == 1 else None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """q, k and v."""
        return self.inputs if self.packed is None else self.packed.unbind(2)

    @property
    def named_inputs(self) -> dict[str, Tensor]:
        """What gradients are taken of, by name."""
        names = ("q", "k", "v") if self.packed is None else ("qkv",)
        return dict(zip(names, self.inputs, strict=True))

    @property
    def gradient(self) -> Tensor:
        """What comes back to the result."""
        return self.do

    def call(self, forward: Forward) -> Tensor:
        """Apply a function of a packed projection, or of q, k and v."""
        return forward(*self.inputs)

    def with_noise(self) -> AttentionProblem:
        """Return this problem, in which there is no noise."""
        return self

    def double(self) -> AttentionProblem:
        """Return copies of every tensor in fp64, apart from this problem's graph."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to(torch.float64, copy=True).requires_grad_(tensor.requires_grad)

        return AttentionProblem(inputs=tuple(map(copy, self.inputs)), do=copy(self.do))


def attention_problem(
    case: AttentionCase, device: torch.device | str, *, seed: int = 0, grad: bool = False
) -> AttentionProblem:
    """Draw a case's tensors; on the meta device they have shapes and no values."""
    device, shape = torch.device(device), case.shape
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(case.torch_dtype)

    head = (shape.heads, shape.head_dim)
    if case.layout == "packed":
        inputs = (normal(shape.batch, shape.queries, 3, *head),)
    else:
        inputs = tuple(normal(shape.batch, rows, *head) for rows in (shape.queries, case.num_keys, case.num_keys))
    for tensor in inputs:
        tensor.requires_grad_(grad)
    return AttentionProblem(inputs=inputs, do=normal(shape.batch, shape.queries, *head))
