"""What the native library calls for the modulated group norms that it has no kernels for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from soda_kernels._library import REFERENCE_NAMESPACE
from soda_kernels._native import Fallback
from soda_kernels.group_norm import ops  # noqa: F401  registers the reference
from soda_kernels.group_norm.checks import check_tensors

_REFERENCE = getattr(torch.ops, REFERENCE_NAMESPACE)


def _forward(*args: Any) -> Any:
    """The reference, after the checks that were left to the library."""
    check_tensors(*args[:7])
    return _REFERENCE.modulated_group_norm.default(*args)


def _backward(*args: Any) -> list[Tensor]:
    """The reference's gradients in one list."""
    *gradients, dmodulations = _REFERENCE.modulated_group_norm_backward.default(*args)
    return [*gradients, *dmodulations]


FALLBACKS = (
    Fallback("modulated_group_norm", _forward),
    Fallback("modulated_group_norm_backward", _backward, results="Tensor[]"),
)
