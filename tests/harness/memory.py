"""The memory checker: accesses outside the tensors, elements nobody wrote, and programs that meet at one address."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.harness.interpreter import Addresses, AddressMap, Observer, extent, observed

# Unused address space around each storage, so that a pointer that overruns one tensor cannot land in another.
_FENCE_BYTES = 1 << 24
_ALIGNMENT_BYTES = 64
# NaN in every floating dtype and -1 in signed integers.
_POISON = 0xFF
# Who read or wrote a byte in this launch, where it is not the number of a program.
_NOBODY, _SEVERAL = -1, -2


@dataclass(frozen=True)
class Finding:
    """One kind of defect in one tensor of one launch."""

    kind: str
    """"out of bounds", "input written", "unwritten read", "unwritten output", "write conflict" or "race"."""
    kernel: str
    tensor: str
    """The parameter's name (the nearest one for an access outside all), or "output 1" for the plan's second output."""
    count: int
    """Bytes, or for an output its elements."""
    example: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.kind}: {self.tensor}: {self.count}, first {self.example}"


def check_memory(plan: Any, inputs: Any) -> list[Finding]:
    """Run a plan in the interpreter and list what its kernels do wrong with memory; an empty list means nothing.

    The plan runs on copies with unused address space around each; its outputs receive the results. What is not an
    input holds poison until a kernel writes it: NaN, or -1. An access out of bounds is reported and not carried out.
    - out of bounds: an active lane outside the elements of every tensor of the launch, gaps between rows included
    - input written: a store to a storage of the inputs
    - unwritten read: a load of a byte that is no input and that no launch has stored
    - unwritten output: an element of the plan's outputs that no launch has stored
    - write conflict: two programs of a launch store to one address, atomics included
    - race: a program loads what another program of the same launch stores, in whatever order they happened to run

    Args:
        plan: `launches` and `outputs` (nested as deep as the plan likes).
        inputs: the tensors that the op was given, nested in lists and tuples; other values are passed over.
    """
    outputs = list(_tensors(plan.outputs))
    given = {_storage(tensor) for tensor in _tensors(inputs)}
    copies = _Copies(given)
    launches = []
    for launch in plan.launches:
        moved = {
            name: copies.move(value) if isinstance(value, Tensor) and value.numel() else value
            for name, value in launch.arguments.items()
        }
        launches.append(dataclasses.replace(launch, arguments=moved))
    moved_outputs = [copies.move(tensor) for tensor in outputs]
    everything = {f"{i} {name}": t for i, item in enumerate(launches) for name, t in item.arguments.items() if _is(t)}
    everything.update({f"output {i}": tensor for i, tensor in enumerate(moved_outputs) if tensor.numel()})
    checker = _Checker(AddressMap(everything), copies.inputs)
    with observed(checker):
        for launch in launches:
            launch.run()
    for number, tensor in enumerate(moved_outputs):
        checker.require_written(number, tensor)
    copies.return_results()
    return checker.findings()


def _is(value: Any) -> bool:
    """Whether a value is a tensor with elements."""
    return isinstance(value, Tensor) and value.numel() > 0


def _storage(tensor: Tensor) -> int:
    """Return the address at which a tensor's storage begins."""
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Any) -> Iterator[Tensor]:
    """Walk over the tensors in nested lists and tuples."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Iterable) and not isinstance(values, str):
        for value in values:
            yield from _tensors(value)


class _Copies:
    """The storages of a plan, each copied (inputs) or poisoned (all others) in a fenced allocation of its own."""

    def __init__(self, given: set[int]) -> None:
        self._given = given
        self._moved: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        self.inputs: list[Tensor] = []

    def move(self, tensor: Tensor) -> Tensor:
        """Return the same view of the copy of a tensor's storage."""
        if not tensor.numel():
            return tensor
        key = _storage(tensor)
        if key not in self._moved:
            self._moved[key] = (tensor.untyped_storage(), self._fenced(tensor.untyped_storage()))
            if key in self._given:
                self.inputs.append(self._moved[key][1])
        storage = self._moved[key][1].untyped_storage()
        view = torch.empty(0, dtype=tensor.dtype)
        return view.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())

    def _fenced(self, storage: torch.UntypedStorage) -> Tensor:
        size = storage.nbytes()
        space = np.empty(size + 2 * _FENCE_BYTES, dtype=np.uint8)
        aligned = _FENCE_BYTES + (storage.data_ptr() - space.ctypes.data) % _ALIGNMENT_BYTES - _ALIGNMENT_BYTES
        copy = torch.from_numpy(space[aligned : aligned + size])
        if storage.data_ptr() in self._given:
            copy.untyped_storage().copy_(storage)
        else:
            copy.fill_(_POISON)
        return copy

    def return_results(self) -> None:
        """Copy what the kernels wrote to the plan's own tensors."""
        for key, (storage, copy) in self._moved.items():
            if key not in self._given:
                storage.copy_(copy.untyped_storage())


class _Checker(Observer):
    """Keeps, for each byte of a plan's storages, whether it was ever written and who touched it in this launch."""

    def __init__(self, plan_map: AddressMap, inputs: list[Tensor]) -> None:
        self._plan_map = plan_map
        size = plan_map.num_bytes
        self._written, self._input = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
        for storage in inputs:
            start = int(plan_map.positions(np.array([storage.data_ptr()], dtype=np.uint64))[0])
            self._input[start : start + storage.numel()] = True
        self._written |= self._input
        self._writer, self._reader = np.empty(size, dtype=np.int32), np.empty(size, dtype=np.int32)
        self._found: dict[tuple[int, str, str], Finding] = {}
        self._launch = -1

    def begin_launch(self, kernel: str, grid: tuple[int, ...], tensors: dict[str, Tensor]) -> None:
        self._kernel, self._tensors = kernel, tensors
        self._owners = self._plan_map.number(tensors)
        self._launch += 1
        self._writer.fill(_NOBODY)
        self._reader.fill(_NOBODY)

    def begin_program(self, program: int) -> None:
        self._program = program

    def load(self, addresses: Addresses, itemsize: int) -> np.ndarray | None:
        position, allowed = self._legal(addresses, itemsize)
        self._report("unwritten read", position[~self._written[position]])
        self._report("race", position[self._by_another(self._writer[position])])
        reader = self._reader[position]
        self._reader[position] = np.where(self._by_another(reader), _SEVERAL, self._program)
        return allowed

    def store(self, addresses: Addresses, itemsize: int) -> np.ndarray | None:
        position, allowed = self._legal(addresses, itemsize)
        self._report("input written", position[self._input[position]])
        self._report("write conflict", position[self._by_another(self._writer[position])])
        self._report("race", position[self._by_another(self._reader[position])])
        self._writer[position] = self._program
        self._written[position] = True
        return allowed

    def require_written(self, number: int, tensor: Tensor) -> None:
        """Report the elements of an output that no launch has stored."""
        if not tensor.numel():
            return
        written = self._plan_map.view(torch.from_numpy(self._written), tensor).all(dim=-1)
        missing = written.logical_not().nonzero()
        if len(missing):
            finding = Finding("unwritten output", "plan", f"output {number}", len(missing), f"at {missing[0].tolist()}")
            self._found[self._launch, finding.kind, finding.tensor] = finding

    def findings(self) -> list[Finding]:
        """Return what was found, in order."""
        return list(self._found.values())

    def _by_another(self, programs: np.ndarray) -> np.ndarray:
        return (programs != _NOBODY) & (programs != self._program)

    def _legal(self, addresses: Addresses, itemsize: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the position of every byte of the lanes that lie inside tensors, and which lanes do unless all."""
        positions = self._plan_map.positions(addresses)[:, None] + np.arange(itemsize)
        allowed = (self._owners[positions] > 0).all(axis=1)
        if allowed.all():
            return positions.ravel(), None
        outside = addresses[~allowed]
        nearest = [self._nearest(int(address)) for address in outside]
        for name in dict.fromkeys(nearest):
            theirs = [int(address) for address, of in zip(outside, nearest, strict=True) if of == name]
            self._add("out of bounds", name, len(theirs) * itemsize, theirs[0])
        return positions[allowed].ravel(), allowed

    def _nearest(self, address: int) -> str:
        """Name the tensor of this launch whose extent lies nearest to an address."""

        def distance(name: str) -> int:
            first, last = extent(self._tensors[name])
            return max(first - address, address - last)

        return min(self._tensors, key=distance)

    def _report(self, kind: str, positions: np.ndarray) -> None:
        """Add what is wrong with bytes of tensors."""
        if not positions.size:
            return
        owners = self._owners[positions]
        for owner in np.unique(owners).tolist():
            theirs = positions[owners == owner]
            self._add(kind, list(self._tensors)[owner - 1], int(theirs.size), self._plan_map.address(int(theirs[0])))

    def _add(self, kind: str, name: str, count: int, address: int) -> None:
        key = (self._launch, kind, name)
        if key in self._found:
            self._found[key] = dataclasses.replace(self._found[key], count=self._found[key].count + count)
            return
        tensor = self._tensors[name]
        element = (address - tensor.data_ptr()) // tensor.itemsize
        example = f"in program {self._program}, {element} elements from the start"
        self._found[key] = Finding(kind, self._kernel, name, count, example)
