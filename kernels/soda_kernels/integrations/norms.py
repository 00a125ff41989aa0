"""Group norms that take modulations, SiLU and dropout along when they are asked to, and alone are plain group norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soda_kernels.group_norm.api import modulated_group_norm
from soda_kernels.integrations.replacement import Fused

Modulations = Sequence[tuple[Tensor, Tensor]]


class GroupNorm(Fused):
    """A group norm: called with an image alone it is what it was, in one op."""

    label = "group norm"
    num_groups: int
    eps: float
    weight: Tensor | None
    bias: Tensor | None

    def fused_forward(
        self, x: Tensor, modulations: Modulations = (), *, activation: str | None = None, dropout_p: float = 0.0
    ) -> Tensor:  # fmt: skip
        """Normalize x [N, C, *], modulate, activate, drop: see `modulated_group_norm`."""
        return normalize(x, self.num_groups, self.weight, self.bias, modulations, self.eps, activation, dropout_p)


class GroupNormSilu(Fused):
    """A group norm that applies the SiLU after it too."""

    label = "group norm and SiLU"
    num_groups: int
    eps: float
    weight: Tensor | None
    bias: Tensor | None

    def fused_forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.num_groups, self.weight, self.bias, (), self.eps, "silu", 0.0)


class PassedSilu(Fused):
    """A SiLU that the norm before it has applied."""

    label = "SiLU, applied by the norm before it"

    def fused_forward(self, x: Tensor) -> Tensor:
        return x


class Silu(Fused):
    """A SiLU that somebody wrote, in one op."""

    label = "SiLU"

    def fused_forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


def normalize(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, modulations: Modulations, eps: float,
    activation: str | None, dropout_p: float,
) -> Tensor:  # fmt: skip
    """Call `modulated_group_norm`; dropout's seed comes from PyTorch's generator of x's device."""
    # A tensor: the host waits for no device, and a checkpoint that restores the generator draws it again.
    seed = torch.randint(2**63 - 1, (), device=x.device) if dropout_p > 0.0 else None
    y = modulated_group_norm(
        x, num_groups, weight, bias, modulations, eps=eps, activation=activation, dropout_p=dropout_p, seed=seed
    )
    assert isinstance(y, Tensor)
    return y


def drop_probability(dropout: nn.Module) -> float | None:
    """Return with which probability a dropout drops now, or None where only it can tell."""
    if type(dropout) is not nn.Dropout or not dropout.p < 1.0:
        return None
    return dropout.p if dropout.training else 0.0


def is_group_norm(module: nn.Module) -> bool:
    """Tell whether a module computes as `nn.GroupNorm` does, whatever it is named; replaced ones do."""
    return isinstance(module, GroupNorm) or type(module).forward is nn.GroupNorm.forward


def is_silu(module: nn.Module) -> bool:
    """Tell whether a module computes as `nn.SiLU` does; replaced ones do."""
    return isinstance(module, Silu) or type(module).forward is nn.SiLU.forward
