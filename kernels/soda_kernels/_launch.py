"""Kernel launches as data: what a launcher decides can be run, counted, metered or compiled ahead of time."""

from __future__ import annotations

from dataclasses import dataclass
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

    def run(self) -> None:
        """Launch on the current stream of the current device."""
        self.kernel[self.grid](
            **self.arguments, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages,
            enable_fp_fusion=True,
        )  # fmt: skip

    @property
    def num_programs(self) -> int:
        """How many programs the grid holds."""
        product = 1
        for extent in self.grid:
            product *= extent
        return product


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The launches that compute an op, in order, with the tensors that they write."""

    launches: tuple[Launch, ...]
    outputs: tuple[Any, ...]
    """The op's results, allocated and not yet written; an absent one is empty."""
    config: Any
    """The launch config, a frozen dataclass."""

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
