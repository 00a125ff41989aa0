"""Descriptions of launches from which a kernel can be compiled without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from soda_kernels._launch import Launch

_POINTER_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}

# Triton's launcher tells the compiler which pointers and integers are multiples of this: wide accesses depend on it.
_DIVISOR = 16


def specify(launch: Launch) -> dict[str, Any]:
    """Describe the kernel that a launch would compile, as its just-in-time launcher specializes it.

    Pointers count as aligned, as torch's allocators make them. Equal descriptions are one compiled kernel.

    Args:
        launch: of tensors on any device, meta included.

    Returns:
        A JSON-ready dict: "kernel" as "module:function", "signature" (Triton's type of each parameter by name),
        "constants", "divisible" (parameters known to be multiples of 16), "num_warps", "num_stages".
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    divisible = []
    for name, value in launch.arguments.items():
        if name in launch.descriptors:
            element = _POINTER_TYPES[value.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{element}{list(launch.descriptors[name])}>"
            continue
        signature[name], constant = _type(value)
        if constant is not _NOT_CONSTANT:
            constants[name] = constant
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % _DIVISOR == 0):
            divisible.append(name)
    signature.update(dict.fromkeys(launch.constants, "constexpr"))
    return {
        "kernel": f"{launch.kernel.fn.__module__}:{launch.kernel.fn.__name__}",
        "signature": signature,
        "constants": constants,
        "divisible": divisible,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


_NOT_CONSTANT = object()


def _type(value: Any) -> tuple[str, Any]:
    """Return Triton's type of an argument, and its value where the launcher makes it a constant."""
    if value is None:
        return "constexpr", None
    if isinstance(value, torch.Tensor):
        return _POINTER_TYPES[value.dtype], _NOT_CONSTANT
    if isinstance(value, float):
        return "fp32", _NOT_CONSTANT
    if value == 1:
        return "constexpr", 1
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), _NOT_CONSTANT
