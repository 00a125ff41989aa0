"""Models under torch.compile, alone or with CUDA graphs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Compile = Literal["none", "default", "graphs"]


def compile_model(model: nn.Module, how: Compile, device: torch.device) -> None:
    """Let calls of the model compile it; its parameters and their names stay.

    Raises:
        ValueError: graphs are asked for and the device is no GPU.
    """
    if how == "graphs" and device.type != "cuda":
        raise ValueError(f"compile is 'graphs', which need a GPU; on {device.type} it must be 'default' or 'none'")
    if how != "none":
        model.compile(fullgraph=True, mode="reduce-overhead" if how == "graphs" else None)


def begin_pass(seed: int, step: int, how: Compile, device: torch.device) -> tuple[int | Tensor, int | Tensor]:
    """Return seed and step as the model is to take them: not as ints where a compiled graph would keep them."""
    if how == "none":
        return seed, step
    torch.compiler.cudagraph_mark_step_begin()  # what the graphs of the step before returned may be overwritten
    keys = [torch.full((), _wrapped(value), dtype=torch.int64, device=device) for value in (seed, step)]
    return keys[0], keys[1]


def _wrapped(value: int) -> int:
    """The int64 of the same 64 bits."""
    return (value + 2**63) % 2**64 - 2**63
