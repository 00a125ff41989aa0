"""Kernels run by Triton's interpreter, with every access to memory shown to an observer before it happens."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

Addresses = np.ndarray
"""uint64 byte addresses of the active lanes of one access, flat."""

# Bytes of no tensor after each storage in an AddressMap's flat array: an element that begins inside a storage and ends
# outside it must not reach the next one.
_GAP_BYTES = 16


class Observer:
    """What happens in a launch, in the interpreter's order: programs run one after another."""

    def begin_launch(self, kernel: str, grid: tuple[int, ...], tensors: dict[str, Tensor]) -> None:
        """Called before the first program, with the kernel's tensors by the names of their parameters."""

    def begin_program(self, program: int) -> None:
        """Called before each program, with its place in the grid's order."""

    def load(self, addresses: Addresses, itemsize: int) -> np.ndarray | None:
        """Called before a load; a boolean array that is returned says which lanes may go ahead."""

    def store(self, addresses: Addresses, itemsize: int) -> np.ndarray | None:
        """Called before a store; as `load`."""

    def end_launch(self) -> None:
        """Called after the last program, also when one of them raised."""


def require_interpreter() -> None:
    """Choose Triton's interpreter for this process.

    Raises:
        RuntimeError: Triton was already imported as a compiler, which cannot be undone.
    """
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    if not is_interpreting():
        raise RuntimeError(
            "Triton was imported as a compiler: set TRITON_INTERPRET=1 before anything imports it "
            "(a machine with a GPU has to ask for the interpreter in its environment)"
        )


def is_interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter. Its own library must, not only what is decorated from now on."""
    from triton.language import standard
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(standard.zeros, InterpretedFunction)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Show every launch of a `triton.jit` function inside the context to `observer`. Contexts do not nest.

    Loads and stores of every form (masked or not, scalars, block pointers, tensor descriptors) end in the builder's
    masked ones; atomics are shown as a load and a store. Verified on Triton 3.6.0 and 3.9.0.
    """
    require_interpreter()
    from triton.runtime import interpreter as triton_interpreter

    builder: Any = triton_interpreter.interpreter_builder
    executor: Any = triton_interpreter.GridExecutor
    if "create_masked_load" in vars(builder):
        raise RuntimeError("another observer is already watching")
    run_grid = executor.__call__

    def watched_grid(self: Any, *args: Any, **kwargs: Any) -> None:
        tensors = _tensors_by_name(self, args, kwargs)

        begun = False

        def set_grid_dim(*extents: int) -> None:
            nonlocal begun
            type(builder).set_grid_dim(builder, *extents)
            observer.begin_launch(self.fn.__name__, extents, tensors)
            begun = True

        builder.set_grid_dim = set_grid_dim
        try:
            run_grid(self, *args, **kwargs)
        finally:
            del builder.set_grid_dim
            if begun:
                observer.end_launch()

    def set_grid_idx(x: int, y: int, z: int) -> None:
        type(builder).set_grid_idx(builder, x, y, z)
        observer.begin_program((x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z)

    def allowed(observe: Callable[..., np.ndarray | None], pointers: Any, mask: Any) -> Any:
        # Block pointers of Triton 3.6 bring a plain array for a mask, whose `data` is a view of its buffer.
        active = np.broadcast_to(np.asarray(mask.data, dtype=bool), np.shape(pointers.data))
        addresses = np.ravel(pointers.data) if active.all() else np.asarray(pointers.data)[active]
        if not addresses.size:
            return mask
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)  # a boolean is stored as a byte
        permitted = observe(addresses, itemsize)
        if permitted is None:
            return mask
        narrowed = np.zeros(active.shape, dtype=bool)
        narrowed[active] = permitted
        return triton_interpreter.TensorHandle(narrowed, triton_interpreter.tl.int1)

    def masked_load(ptrs: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        mask = allowed(observer.load, ptrs, mask)
        return type(builder).create_masked_load(builder, ptrs, mask, other, *rest, **options)

    def masked_store(ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        mask = allowed(observer.store, ptrs, mask)
        return type(builder).create_masked_store(builder, ptrs, value, mask, *rest, **options)

    def atomic_rmw(op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        mask = allowed(observer.store, ptr, allowed(observer.load, ptr, mask))
        return type(builder).create_atomic_rmw(builder, op, ptr, val, mask, *rest)

    def atomic_cas(*args: Any) -> Any:
        raise NotImplementedError("compare-and-swap is not observed")

    builder.set_grid_idx = set_grid_idx
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_atomic_rmw, builder.create_atomic_cas = atomic_rmw, atomic_cas
    executor.__call__ = watched_grid
    try:
        yield
    finally:
        executor.__call__ = run_grid
        for name in (
            "set_grid_idx", "create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas",
        ):  # fmt: skip
            delattr(builder, name)


def _tensors_by_name(executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Name the tensors of a launch, those of descriptors too, by the kernel's parameters."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    known = inspect.signature(executor.fn).parameters
    bound = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
    bound = {name: value.base if isinstance(value, TensorDescriptor) else value for name, value in bound.items()}
    tensors = {name: value for name, value in bound.items() if name in known and isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}: the harness watches tensors in main memory")
    return {name: tensor for name, tensor in tensors.items() if tensor.numel()}


class AddressMap:
    """Which element of which tensor a byte address belongs to.

    Tensors are exactly the elements that their sizes and strides reach: a gap between two rows belongs to none.
    Where tensors share elements, the first one named owns them.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.names = list(tensors)
        self.tensors = list(tensors.values())
        sizes = {_base(tensor): tensor.untyped_storage().nbytes() for tensor in self.tensors}
        self._bases = np.array(sorted(sizes), dtype=np.uint64)
        extents = np.array([sizes[int(base)] for base in self._bases], dtype=np.int64)
        self._ends = self._bases + extents.astype(np.uint64)
        spaced = extents + _GAP_BYTES
        self._starts = np.cumsum(spaced) - spaced
        self.num_bytes = int(spaced.sum())
        self._owners = self.number(tensors)

    def number(self, tensors: dict[str, Tensor]) -> np.ndarray:
        """Number every byte of a flat array of `num_bytes` by the tensor it belongs to, from 1; 0 is none.

        Args:
            tensors: in storages that this map knows.
        """
        if len(tensors) > 255:
            raise ValueError(f"{len(tensors)} tensors; at most 255 are told apart")
        numbers = torch.zeros(self.num_bytes, dtype=torch.uint8)
        for number, tensor in reversed(list(enumerate(tensors.values(), start=1))):
            self.view(numbers, tensor).fill_(number)
        return numbers.numpy()

    def positions(self, addresses: Addresses) -> np.ndarray:
        """Return each address as an index into a flat array of `num_bytes`; those outside share one of no tensor."""
        storage = np.searchsorted(self._bases, addresses, side="right") - 1
        inside = (storage >= 0) & (addresses < self._ends[storage])
        offset = (addresses - self._bases[storage]).astype(np.int64)
        return np.where(inside, self._starts[storage] + offset, self.num_bytes - _GAP_BYTES)

    def owners(self, addresses: Addresses) -> np.ndarray:
        """Return the number of the tensor that each address belongs to, its place in `names` plus one; 0 is none."""
        return self._owners[self.positions(addresses)]

    def address(self, position: int) -> int:
        """Return the address at a position that lies in a storage."""
        storage = int(np.searchsorted(self._starts, position, side="right")) - 1
        return int(self._bases[storage]) + position - int(self._starts[storage])

    def view(self, flat: Tensor, tensor: Tensor) -> Tensor:
        """Return the bytes of a tensor's elements as a view of a flat array of `num_bytes`: [*shape, itemsize].

        Expanded dimensions are kept at length one, since their elements are the same ones.
        """
        start = int(self._starts[np.searchsorted(self._bases, np.uint64(_base(tensor)))])
        itemsize = tensor.itemsize
        shape = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        strides = [stride * itemsize for stride in tensor.stride()]
        offset = start + tensor.storage_offset() * itemsize
        return torch.as_strided(flat, (*shape, itemsize), (*strides, 1), offset)


def _base(tensor: Tensor) -> int:
    """Return the address at which a tensor's storage begins."""
    return tensor.untyped_storage().data_ptr()


def extent(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte of a tensor and of the last."""
    steps = (stride * (size - 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (sum(steps) + 1) * tensor.itemsize - 1
