"""Choosing between the kernels a device has and the reference, and asking which would run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from soda_kernels._library import AUTO_NAMESPACE, REFERENCE_NAMESPACE, description
from soda_kernels._native import native_is_loaded
from soda_kernels._ranges import ranged

Backend = Literal["auto", "reference"]

_STRIDED = torch.strided

# A plain module global: torch.compile guards on it, and autograd's threads see it.
_backend: Backend = "auto"


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Choose the implementation of every op called inside the context, in the whole process.

    Args:
        backend: "auto" takes the fastest kernel registered for the tensors' device; "reference" takes plain PyTorch.

    Raises:
        ValueError: `backend` is neither.
    """
    global _backend
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend is {backend!r}; it must be 'auto' or 'reference'")
    previous, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = previous


def current_ops() -> Any:
    """Return the op namespace that the current backend calls."""
    return ranged(getattr(torch.ops, AUTO_NAMESPACE if _backend == "auto" else REFERENCE_NAMESPACE))


def is_reference() -> bool:
    """Tell whether the current backend is the reference."""
    return _backend == "reference"


# What the native library may be handed unseen: not a subclass, which may stand for anything.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def runs_native(*arguments: Any) -> bool:
    """Tell whether an op of these tensors, some of them None, goes to the native library, whatever else is wrong."""
    if _backend != "auto" or not native_is_loaded() or torch.compiler.is_compiling():
        return False
    for argument in arguments:
        if argument is not None and not (type(argument) in _PLAIN and argument.is_cpu and argument.layout is _STRIDED):
            return False
    return True


@dataclass(frozen=True, kw_only=True)
class OpChoice:
    """One op that a call would run, and what would run it."""

    op: str
    device: str
    backend: str
    config: dict[str, Any] = field(default_factory=dict)
    reason: str

    def __str__(self) -> str:
        config = f" {self.config}" if self.config else ""
        return f"{self.op} on {self.device}: {self.backend}{config} ({self.reason})"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found, in the order of the calls."""

    choices: tuple[OpChoice, ...]

    def __str__(self) -> str:
        return "\n".join(str(choice) for choice in self.choices) or "no op of soda_kernels is called"


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tell what a call would run, its launch config, and why, without computing anything.

    The call is traced over fake tensors, so its arguments are checked as in a real one. Of a function that
    calls `torch.autograd.grad` the backward's ops are told too (`backward()` would leave fake gradients behind).

    Args:
        function: a function or module that calls this package, with the arguments of the call.

    Returns:
        One `OpChoice` an op, printable as text.

    Raises:
        What `function` raises for wrong arguments.
    """
    recorder = _Recorder()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake_mode:
        fake_args, fake_kwargs = tree_map_only(torch.Tensor, fake_mode.from_tensor, (args, kwargs))
        with recorder:
            function(*fake_args, **fake_kwargs)
    return Explanation(tuple(recorder.choices))


class _Recorder(TorchDispatchMode):
    """Notes each op of this package that passes."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: list[OpChoice] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in (AUTO_NAMESPACE, REFERENCE_NAMESPACE):
            self.choices.append(_choice(func, args))
        return func(*args, **(kwargs or {}))


def _choice(func: Any, args: tuple[Any, ...]) -> OpChoice:
    """Ask the dispatcher what runs `func` on the device of its first tensor, and the op with which config."""
    device = next(leaf.device for leaf in tree_flatten(args)[0] if isinstance(leaf, torch.Tensor))
    name = func._schema.name.split("::")[1]
    backend: str = "reference"
    config: dict[str, Any] = {}
    if func.namespace == REFERENCE_NAMESPACE:
        reason = "asked for by use_backend"
    elif device.type == "meta":
        backend, reason = "meta", "meta tensors have shapes and no values"
    elif not func.has_kernel_for_dispatch_key(getattr(torch._C.DispatchKey, device.type.upper())):
        reason = f"no kernel is registered for {device.type}"
    else:
        describe = description(name)
        assert describe is not None, f"{name} has a kernel for {device.type} and does not describe it"
        backend, config, reason = describe(device.type, *args)
    return OpChoice(op=name, device=str(device), backend=backend, config=config, reason=reason)
