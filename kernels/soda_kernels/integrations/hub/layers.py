"""Layers whose forward `kernels.kernelize` gives to layers of other people's models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from soda_kernels.group_norm.api import modulated_group_norm


class _Layer(nn.Module):
    """A forward to be lent to an `nn.GroupNorm`, or to a layer with its attributes, so that it has no state."""

    has_backward = True
    can_torch_compile = True

    num_groups: int
    eps: float
    weight: nn.Parameter | None
    bias: nn.Parameter | None


class GroupNorm(_Layer):
    """Group norm alone, in either layout."""

    def forward(self, input: Tensor) -> Tensor:
        """Take and return [N, C, *spatial]."""
        return _norm(self, input, activation=None)


class GroupNormSiLU(_Layer):
    """Group norm, then SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Take and return [N, C, *spatial]."""
        return _norm(self, x)


class ModulatedGroupNorm(_Layer):
    """Group norm, then h * (1 + scale) + shift, then SiLU."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Take x of [N, C, *spatial], scale and shift of [N, C] or [N, C, 1, ...]; return x's shape."""
        return _norm(self, x, [(scale.flatten(1), shift.flatten(1))])


def _norm(layer: Any, x: Tensor, modulations: Sequence[tuple[Tensor, Tensor]] = (), **options: Any) -> Tensor:
    # Not a method: of a layer kernelize takes the forward alone.
    y = modulated_group_norm(x, layer.num_groups, layer.weight, layer.bias, modulations, eps=layer.eps, **options)
    assert isinstance(y, Tensor)
    return y
