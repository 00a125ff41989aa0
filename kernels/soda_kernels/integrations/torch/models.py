"""Which modules of a PyTorch model are replaced, which are left, and why."""

from __future__ import annotations

from typing import Any

from torch import nn

from soda_kernels.integrations import norms
from soda_kernels.integrations.convolutions import Conv3x3, replace_convolutions
from soda_kernels.integrations.replacement import (
    NOTHING,
    OWN_FORWARD,
    Fused,
    Report,
    class_name,
    own_forward,
    replace,
    restore_modules,
)
from soda_kernels.integrations.torch import sequences
from soda_kernels.integrations.torch.behaviour import computes_group_norm, computes_silu, disagreement
from soda_kernels.integrations.torch.blocks import KINDS, Block


def optimize(model: nn.Module) -> Report:
    """Replace, in place, the group norms of a model, with the modulations, SiLU and dropout that follow them.

    Replaced are group norms (PyTorch's, and classes with its attributes that compute the same), SiLUs of other classes,
    each `nn.Sequential` in which a SiLU follows a group norm, residual blocks of the guided-diffusion, EDM and DiffAE
    kinds, and 3x3 convolutions (which run another kernel on a CPU in fp32 and channels_last alone). A block is known by
    its attributes; it is replaced only where a copy of it, on a small input, gives the same result both ways. Whatever
    else calls a group norm finds it to be one. Modules get other classes and nothing else: parameters, their names and
    the state dict are as before. A second call changes nothing.

    Args:
        model: any module; its weights may be on the meta device.

    Returns:
        What is replaced and what is left, with reasons; print it.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: there is nothing in it to replace.
    """
    _require_module(model)
    left = replace_convolutions(model)
    checked: dict[Any, str | None] = {}
    parts = dict(model.named_modules())
    for part in parts.values():
        if computes_silu(part) and not norms.is_silu(part) and not own_forward(part):
            replace(part, norms.Silu)
    blocks = {name: kind for name, part in parts.items() if (kind := _kind(part)) is not None}
    for name, part in parts.items():
        if not isinstance(part, Fused) and computes_group_norm(part):
            if own_forward(part):
                left[name] = OWN_FORWARD
            else:
                replace(part, norms.GroupNorm)
    for part in parts.values():
        if type(part).forward is nn.Sequential.forward and any(sequences.pairs_of(part)):
            replace(part, sequences.Sequential)
    for name, kind in blocks.items():
        part = parts[name]
        reason = _why_left(part, kind, checked)
        if reason is None:
            replace(part, kind)
        else:
            left[name] = reason
    report = Report(class_name(model))
    report.include("", model, left)
    if not any(isinstance(part, norms.GroupNorm | Conv3x3) for part in model.modules()) and not left:
        raise ValueError(f"{report.model} {NOTHING}")
    return report


def restore(model: nn.Module) -> None:
    """Undo `optimize`: every module gets the class back that it had.

    Raises:
        TypeError: model is not an nn.Module.
    """
    _require_module(model)
    restore_modules(model)


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be an nn.Module")


def _kind(module: nn.Module) -> type[Block] | None:
    if isinstance(module, Fused):
        return None
    return next((kind for kind in KINDS if kind.recognizes(module)), None)


def _why_left(block: nn.Module, kind: type[Block], checked: dict[Any, str | None]) -> str | None:
    """Say why a block of a kind may not be replaced, or None."""
    if own_forward(block):
        return OWN_FORWARD
    for name in kind.norms:
        norm = block.get_submodule(name)
        if not isinstance(norm, norms.GroupNorm):
            return f"its {name} is a {type(norm).__name__}, which is no group norm"
    # Blocks that look alike are tried once.
    simple = {name: value for name, value in vars(block).items() if isinstance(value, int | float | str | None)}
    simple.pop("training", None)
    likeness = (type(block), repr(block), repr(sorted(simple.items(), key=str)))
    if likeness not in checked:
        checked[likeness] = disagreement(block, kind, kind.calls(block))
    return checked[likeness]
