"""The one place where ops are registered with PyTorch's dispatcher, which is the backend registry.

Every op is defined twice: as `soda_kernels::name`, which takes whatever kernel a device has, and as
`soda_kernels_reference::name`, which has the plain PyTorch implementation alone. A copy of this package under another
name (`integrations/hub` writes one) has its ops under that name. A kernel for a device is an `impl` of
the first under that device's dispatch key; nothing else decides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

AUTO_NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")
REFERENCE_NAMESPACE = f"{AUTO_NAMESPACE}_reference"

_LIBRARIES = {name: torch.library.Library(name, "DEF") for name in (AUTO_NAMESPACE, REFERENCE_NAMESPACE)}


# How an op tells `explain` what it would run: (backend, launch config, reason) from the device type and its arguments.
Describe = Callable[..., tuple[str, dict[str, Any], str]]

_DESCRIPTIONS: dict[str, Describe] = {}
_CPU_FUNCTIONS: dict[str, Callable[..., Any]] = {}


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    gpu: Callable[..., Any] | None = None,
    describe: Describe | None = None,
) -> None:
    """Register an op with its reference implementation and its shape function.

    Args:
        name: the op's name in both namespaces.
        schema: the signature in torch.library's language, without the name: `(Tensor x) -> Tensor`.
        reference: plain PyTorch, forward or closed-form backward; it must not call autograd and must not return an
            input. It runs with autocast off, since the op's arguments already have the dtypes it is meant to see.
        fake: takes the same arguments and returns empty tensors with the outputs' true shapes, dtypes and strides.
        cpu: runs the op on tensors in main memory where there is no native library, in place of the reference.
        gpu: runs the op on tensors of a CUDA or ROCm device. It imports Triton inside, never when it is defined.
        describe: takes a device type and the op's arguments, and says what runs; only for devices with a kernel.
    """
    for namespace, library in _LIBRARIES.items():
        library.define(name + schema)
        library.impl(name, without_autocast(reference), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", _of_one_device(name, fake), lib=library)
    if cpu is not None:
        _CPU_FUNCTIONS[name] = without_autocast(cpu)
    if gpu is not None:
        # PyTorch's builds for ROCm file their devices under the same key.
        _LIBRARIES[AUTO_NAMESPACE].impl(name, without_autocast(gpu), "CUDA")
    if describe is not None:
        _DESCRIPTIONS[name] = describe


def do_without_native() -> None:
    """Let the ops that have a function for CPU tensors run it; the native library would register its own."""
    for name, function in _CPU_FUNCTIONS.items():
        _LIBRARIES[AUTO_NAMESPACE].impl(name, function, "CPU")
    _CPU_FUNCTIONS.clear()


def description(name: str) -> Describe | None:
    """Return how an op tells what it would run, if it can."""
    return _DESCRIPTIONS.get(name)


def _of_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Let a shape function refuse tensors of several devices.

    The dispatcher takes it wherever one of them is a meta tensor; for the others it would hand out memory unwritten.
    """

    @functools.wraps(fake)
    def run(*args: Any) -> Any:
        tensors = [arg for each in args for arg in (each if isinstance(each, list) else [each])]
        devices = {str(tensor.device) for tensor in tensors if isinstance(tensor, torch.Tensor)}
        if len(devices) > 1:
            raise ValueError(f"the tensors of {name} are on {' and '.join(sorted(devices))}; move them to one device")
        return fake(*args)

    return run


def without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Run an implementation with autocast off, on the device of its first tensor argument."""

    @functools.wraps(implementation)
    def run(*args: Any) -> Any:
        device_type = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        if not torch.is_autocast_enabled(device_type):
            return implementation(*args)
        with torch.autocast(device_type, enabled=False):
            return implementation(*args)

    return run
