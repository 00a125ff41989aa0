"""What the arguments of a modulated group norm must be, in lines that name the one that is not."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from soda_kernels import _checks
from soda_kernels._checks import LARGEST

MAX_MODULATIONS = 2
ACTIVATIONS = ("silu", None)
# As messages name them. Made here: to put the names together again in every call took longer than the checks.
_NAMES = tuple(f"modulations[{index}] {part}" for index in range(MAX_MODULATIONS) for part in ("scale", "shift"))


def check_numbers(scale_offset: float, eps: float, dropout_p: float) -> None:
    """Require finite numbers, an eps that is not negative and a probability below 1."""
    _checks.check_number("scale_offset", scale_offset)
    _checks.check_number("eps", eps)
    if not eps >= 0.0:
        raise ValueError(f"eps is {eps}; it must not be negative")
    _checks.check_probability("dropout_p", dropout_p)


def check_options(
    scale_offset: float, eps: float, dropout_p: float, residual_scale: float, residual: object, activation: object
) -> None:
    """Require numbers as `check_numbers`, a finite factor with something for it to scale, and a known activation."""
    if (
        type(scale_offset) is type(eps) is type(dropout_p) is type(residual_scale) is float and residual_scale == 1.0
        and -LARGEST <= scale_offset <= LARGEST and 0.0 <= eps <= LARGEST and 0.0 <= dropout_p < 1.0
        and activation in ACTIVATIONS
    ):  # nearly always; one check after the other took 3 us more of a small image's 20, on an EPYC core
        return
    check_numbers(scale_offset, eps, dropout_p)
    _checks.check_number("residual_scale", residual_scale)
    if residual is None and residual_scale != 1.0:
        raise ValueError(f"residual_scale is {residual_scale} and residual None; without a residual it must be 1")
    _checks.check_choice("activation", activation, ACTIVATIONS)


def flatten_modulations(modulations: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Turn up to two pairs into a list of scale, shift, scale, shift, as the op takes them."""
    if not isinstance(modulations, (tuple, list)):
        raise TypeError(f"modulations is a {type(modulations).__name__}; it must be a sequence of (scale, shift) pairs")
    if len(modulations) > MAX_MODULATIONS:
        raise ValueError(f"modulations has {len(modulations)} pairs; at most {MAX_MODULATIONS} are accepted")
    flat: list[Tensor] = []
    for index, pair in enumerate(modulations):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"modulations[{index}] is a {type(pair).__name__}; it must be a pair (scale, shift)")
        flat += pair
    return flat


def check_tensors(
    x: Tensor, skip: Tensor | None, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    modulations: Sequence[Tensor], num_groups: int,
) -> None:  # fmt: skip
    """Require tensors that fit together, and a number of groups that divides their channels."""
    _checks.check_float_tensor("x", x, min_ndim=2)
    batch, channels = x.shape[:2]
    if skip is not None:
        if residual is not None:
            raise ValueError("residual came with a pair (h, skip); give one or the other")
        _checks.check_float_tensor("skip", skip)
        _checks.check_shape("skip", skip, (batch, skip.shape[1] if skip.ndim > 1 else 0, *x.shape[2:]))
        if skip.dtype != x.dtype:
            raise TypeError(f"skip has dtype {skip.dtype} and h {x.dtype}; they must be the same")
        _checks.check_device("skip", skip, "h", x)
        channels += skip.shape[1]
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"num_groups is a {type(num_groups).__name__}; it must be an int")
    if num_groups <= 0 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}; it must divide the {channels} channels of x")
    if residual is not None:
        _checks.check_like("residual", residual, "x", x)
    if weight is not None:
        _checks.check_parameter("weight", weight, (channels,), "x", x)
    if bias is not None:
        _checks.check_parameter("bias", bias, (channels,), "x", x)
    for name, modulation in zip(_NAMES, modulations, strict=False):
        _checks.check_parameter(name, modulation, (batch, channels), "x", x)
