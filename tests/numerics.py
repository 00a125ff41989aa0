"""The one tolerance rule: twice the error of the same-dtype PyTorch composition, both against fp64, plus one ulp."""

from __future__ import annotations

import torch
from torch import Tensor


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the spacing of `dtype`'s numbers at each magnitude of `exact`, in fp64."""
    info = torch.finfo(dtype)
    magnitude = exact.abs().clamp(info.tiny, info.max).double()
    return torch.exp2(magnitude.log2().floor()) * info.eps


def assert_accurate(actual: Tensor, composition: Tensor, exact: Tensor, name: str = "result") -> None:
    """Require |actual - exact| <= 2 max|composition - exact| + ulp everywhere.

    Args:
        actual: what is tested. Its dtype sets the ulp.
        composition: plain PyTorch on the same inputs in the same dtype.
        exact: the composition on the same inputs in fp64.
    """
    assert actual.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    assert exact.dtype == torch.float64
    if not exact.numel():
        return
    actual, composition, exact = actual.detach(), composition.detach(), exact.detach()
    allowed = 2 * (composition.double() - exact).abs().max() + ulp(exact, actual.dtype)
    error = (actual.double() - exact).abs()
    excess = torch.where(error <= allowed, 0.0, error - allowed)  # a NaN is in excess
    assert not excess.count_nonzero(), (
        f"{name}: {int(excess.count_nonzero())} of {excess.numel()} values are off by up to {float(error.max()):.3g}, "
        f"where {float(allowed.max()):.3g} is allowed"
    )


def assert_accurate_in_norm(actual: Tensor, composition: Tensor, exact: Tensor, name: str = "result") -> None:
    """Require the error's norm to be at most twice the composition's, plus a rounding's: the rule for few values.

    The largest error of a few dozen values is a draw; their norm much less so. Arguments as in `assert_accurate`.
    """
    assert actual.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    rounding = torch.finfo(actual.dtype).eps
    actual, composition, exact = (tensor.detach().double() for tensor in (actual, composition, exact))
    error, allowed = float((actual - exact).norm()), float(2 * (composition - exact).norm() + rounding * exact.norm())
    assert error <= allowed, f"{name}: an error of norm {error:.3g}, where {allowed:.3g} is allowed"


def assert_exact(actual: Tensor, exact: Tensor, name: str = "result", tolerance: float = 1e-12) -> None:
    """Require equality up to fp64 rounding: a relative error in norm of at most `tolerance` (absolute below norm 1)."""
    assert actual.dtype == exact.dtype == torch.float64, f"{name} has dtype {actual.dtype}"
    assert actual.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    error, norm = float((actual - exact).detach().norm()), float(exact.detach().norm())
    assert error <= tolerance * max(norm, 1.0), f"{name}: error {error:.3g} at norm {norm:.3g}"
