"""Argument validators that every family shares.

Each raises one line that names the argument, what came, and what is accepted. None reads a tensor's values, so none
waits for a device or breaks a traced graph.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

LARGEST = sys.float_info.max
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float_tensor(name: str, value: object, *, min_ndim: int = 0, or_uint8: bool = False) -> None:
    """Require a floating-point tensor, or one of bytes where they may be, of at least `min_ndim` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor")
    if value.dtype not in FLOAT_DTYPES and not (or_uint8 and value.dtype == torch.uint8):
        dtypes = (*FLOAT_DTYPES, torch.uint8) if or_uint8 else FLOAT_DTYPES
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has dtype {value.dtype}; accepted are {accepted}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}; it must be a dense tensor")
    if value.ndim < min_ndim:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must have at least {min_ndim} dimensions")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Require exactly `shape`."""
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {shape}")


def check_like(name: str, value: object, like_name: str, like: Tensor) -> None:
    """Require a tensor of the shape, dtype and device of another argument."""
    check_float_tensor(name, value)
    assert isinstance(value, Tensor)
    check_shape(name, value, tuple(like.shape))
    if value.dtype != like.dtype:
        raise TypeError(f"{name} has dtype {value.dtype} and {like_name} {like.dtype}; they must be the same")
    check_device(name, value, like_name, like)


def check_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Require the device of another argument."""
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} and {like_name} on {like.device}; they must be on one device")


def check_parameter(name: str, value: object, shape: tuple[int, ...], like_name: str, like: Tensor) -> None:
    """Require a floating-point tensor of exactly `shape` on the device of another argument."""
    # All at once first: one call a tensor is most of what a small image's checks cost.
    if (
        isinstance(value, Tensor)
        and value.dtype in FLOAT_DTYPES
        and value.shape == shape
        and value.device == like.device
    ):
        return
    check_float_tensor(name, value)
    assert isinstance(value, Tensor)
    check_shape(name, value, shape)
    check_device(name, value, like_name, like)


def check_choice(name: str, value: object, accepted: Sequence[object]) -> None:
    """Require one of the values listed."""
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; it must be one of {list(accepted)}")


def check_number(name: str, value: object) -> None:
    """Require a finite int or float."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a number")
    # Not math.isfinite, of which torch.compile makes no graph where the number is a symbol.
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name} is {value}; it must be finite")


def check_probability(name: str, value: float) -> None:
    """Require a number in [0, 1)."""
    check_number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} is {value}; it must be in [0, 1)")


def int64_scalar(name: str, value: int | Tensor, device: torch.device, out: Tensor | None = None) -> Tensor:
    """Turn an int or a 0-d integer tensor into a 0-d int64 tensor on `device`; ints beyond int64 wrap to 64 bits.

    Args:
        out: where an int is put, a new tensor if not given.
    """
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be an int or a 0-d tensor")
        return int64_tensor(name, value, device)
    value = plain_integer(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be an int or a 0-d integer tensor")
    # A fill, not a copy from the host: no device waits for it.
    return (torch.empty((), dtype=torch.int64, device=device) if out is None else out).fill_(_wrapped(value))


def plain_integer(value: Any) -> Any:
    """Return an integer of NumPy's as Python's, and whatever else as it is."""
    return int(value) if not isinstance(value, int) and isinstance(value, Integral) else value


def _wrapped(value: int) -> int:
    """The int64 of the same 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


def int64_vector(name: str, value: Tensor | Sequence[int], length: int, device: torch.device) -> Tensor:
    """Turn integers into an int64 tensor of shape (length,) on `device`; those beyond int64 wrap to 64 bits."""
    if not isinstance(value, Tensor):
        if not isinstance(value, Iterable):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be an (N,) integer tensor or list of ints")
        value = list(value)
        for entry in value:
            if isinstance(entry, bool) or not isinstance(entry, Integral):
                raise TypeError(f"{name} holds a {type(entry).__name__}; its entries must be ints")
        value = torch.tensor([_wrapped(int(entry)) for entry in value], dtype=torch.int64, device=device)
    check_shape(name, value, (length,))
    return int64_tensor(name, value, device)


def int64_scalar_or_vector(
    name: str, value: int | Tensor, length: int, device: torch.device, out: Tensor | None = None
) -> Tensor:
    """Turn an int, a 0-d or a (length,) integer tensor into an int64 tensor on `device`; `out` as for int64_scalar."""
    if isinstance(value, Tensor) and value.ndim == 1:
        return int64_vector(name, value, length, device)
    return int64_scalar(name, value, device, out)


def int64_tensor(name: str, value: Tensor, device: torch.device) -> Tensor:
    """Require an integer tensor on `device` and widen it to int64."""
    if value.dtype == torch.int64 and value.device == device:  # nearly always; the rest takes longer than a small draw
        return value
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {value.dtype}; it must be an integer tensor")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; it must be on {device}")
    return value.to(torch.int64)


def image_memory_format(x: Tensor) -> torch.memory_format:
    """Return the layout that outputs for `x` get: channels_last where `x` is dense in it alone, else contiguous."""
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == ndim and x.is_contiguous(memory_format=layout) and not x.is_contiguous():
            return layout
    return torch.contiguous_format
