"""Kernel launches as data: what a launcher decides can be run, counted, metered or compiled ahead of time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel over one grid."""

    kernel: Any
    """A `triton.jit` function."""
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By parameter name: tensors, ints, floats, or None for a tensor that is absent."""
    constants: dict[str, Any]
    """The compile-time parameters."""
    num_warps: int
    num_stages: int = 1
    descriptors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the tensors that the kernel takes as tensor descriptors: the block that it loads at a time."""

    def run(self) -> None:
        """Launch on the current stream of the current device."""
        described = {name: _described(self.arguments[name], block) for name, block in self.descriptors.items()}
        self.kernel[self.grid](
            **(self.arguments | described), **self.constants, num_warps=self.num_warps, num_stages=self.num_stages,
            enable_fp_fusion=True,
        )  # fmt: skip

    @property
    def num_programs(self) -> int:
        """How many programs the grid holds."""
        product = 1
        for extent in self.grid:
            product *= extent
        return product


# Strides of a descriptor are multiples of 16 bytes.
_STRIDE_BYTES = 16


def can_describe(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor descriptor can stand for a tensor, whose storage is taken to be aligned."""
    if tensor.stride(-1) != 1 or tensor.storage_offset() * tensor.element_size() % _STRIDE_BYTES:
        return False
    outer = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return all(
        size == 1 or (stride > 0 and stride * tensor.element_size() % _STRIDE_BYTES == 0) for size, stride in outer
    )


def _described(tensor: torch.Tensor, block: tuple[int, ...]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    # Where there is one index, any stride will do.
    strides = [
        stride if size > 1 else _STRIDE_BYTES for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], list(block))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The launches that compute an op, in order, with the tensors that they write."""

    launches: tuple[Launch, ...]
    outputs: tuple[Any, ...]
    """The op's results, allocated and not yet written; an absent one is empty."""
    config: Any
    """The launch config, a frozen dataclass."""
    problem: Any = None
    """What the choice of the config saw, where a plan tells."""

    def run(self) -> tuple[Any, ...]:
        """Run every launch and return the outputs."""
        device = next(value for value in self.launches[0].arguments.values() if isinstance(value, torch.Tensor)).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._run()
        return self._run()

    def _run(self) -> tuple[Any, ...]:
        for launch in self.launches:
            launch.run()
        return self.outputs
