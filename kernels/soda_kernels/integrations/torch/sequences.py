"""Group norm, SiLU and dropout that follow one another in an `nn.Sequential`, in one op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from soda_kernels.integrations import norms
from soda_kernels.integrations.replacement import Fused, own_forward


class Sequential(Fused):
    """An `nn.Sequential` in which a SiLU, and a dropout after it, is computed by the group norm before it.

    Its modules stay what they are: who indexes it and calls one of them gets what that computes. A slice is of this
    class too.
    """

    label = "sequence with group norm and SiLU"

    def fused_forward(self, x: Any) -> Any:
        modules: list[nn.Module] = list(self)  # type: ignore[call-overload]
        index = 0
        while index < len(modules):
            module, taken = modules[index], _taken(modules, index)
            if not taken:
                x = module(x)
            else:
                dropout_p = norms.drop_probability(modules[index + 2]) if taken > 1 else 0.0
                x = module(x, activation="silu", dropout_p=dropout_p)
            index += 1 + taken
        return x


def _taken(modules: list[nn.Module], index: int) -> int:
    """Return how many modules after this one its norm computes too."""
    if not isinstance(modules[index], norms.GroupNorm):
        return 0
    following = modules[index + 1 : index + 3]
    if not following or not norms.is_silu(following[0]) or has_hooks(modules[index], following[0]):
        return 0
    return 1 + int(len(following) > 1 and norms.drop_probability(following[1]) is not None)


def has_hooks(*modules: nn.Module) -> bool:
    """Tell whether somebody looks at what goes into or comes out of modules, or says himself what a call does."""
    return any(
        own_forward(module) or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        for module in modules
    )


def pairs_of(sequence: nn.Sequential) -> Iterator[nn.Module]:
    """Yield the group norms of a sequence that a SiLU follows."""
    modules = list(sequence)
    for norm, following in zip(modules, modules[1:], strict=False):
        if isinstance(norm, norms.GroupNorm) and norms.is_silu(following):
            yield norm
