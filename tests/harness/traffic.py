"""The byte meter: what a launch loads and stores, and the DRAM sectors that its programs touch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from tests.harness.interpreter import Addresses, AddressMap, Observer, observed

SECTOR_BYTES = 32
"""What a GPU of NVIDIA's fetches from DRAM at the least; AMD's fetch 32 or 64."""
_SECTOR_BITS = SECTOR_BYTES.bit_length() - 1


@dataclass
class TensorTraffic:
    """What one launch does with one of its tensors."""

    loaded_bytes: int = 0
    stored_bytes: int = 0
    loaded_sectors: int = 0
    stored_sectors: int = 0

    @property
    def bytes_moved(self) -> int:
        """Bytes of every access by an active lane, repetitions included."""
        return self.loaded_bytes + self.stored_bytes

    @property
    def bytes_dram(self) -> int:
        """Bytes of the distinct sectors that each program loads, plus those that it stores, summed over programs.

        A program's repeated access to its own footprint is free: it hits the caches for as long as the footprints of
        the programs that run at once fit in L2.
        """
        return (self.loaded_sectors + self.stored_sectors) * SECTOR_BYTES


@dataclass(frozen=True, kw_only=True)
class LaunchTraffic:
    """One launch: its kernel, its grid and the traffic of each tensor by the name of its parameter."""

    kernel: str
    grid: tuple[int, ...]
    tensors: dict[str, TensorTraffic]

    @property
    def bytes_moved(self) -> int:
        """Bytes of every access."""
        return sum(tensor.bytes_moved for tensor in self.tensors.values())

    @property
    def bytes_dram(self) -> int:
        """Bytes of the distinct sectors of each program."""
        return sum(tensor.bytes_dram for tensor in self.tensors.values())

    @property
    def num_programs(self) -> int:
        """Programs in the grid."""
        return math.prod(self.grid)


@dataclass
class Traffic:
    """What all launches do in a `metered` context, in order."""

    launches: list[LaunchTraffic] = field(default_factory=list)

    @property
    def bytes_moved(self) -> int:
        """Bytes of every access of every launch."""
        return sum(launch.bytes_moved for launch in self.launches)

    @property
    def bytes_dram(self) -> int:
        """Bytes of the distinct sectors of each program of each launch."""
        return sum(launch.bytes_dram for launch in self.launches)

    def __str__(self) -> str:
        lines = [f"{'launch and tensor':40} {'bytes moved':>14} {'bytes dram':>14}  loaded + stored (dram)"]
        for launch in self.launches:
            title = f"{launch.kernel} {launch.grid}"
            lines.append(f"{title:40} {launch.bytes_moved:14,} {launch.bytes_dram:14,}")
            for name, item in launch.tensors.items():
                loaded, stored = item.loaded_sectors * SECTOR_BYTES, item.stored_sectors * SECTOR_BYTES
                lines.append(f"  {name:38} {item.bytes_moved:14,} {item.bytes_dram:14,}  {loaded:,} + {stored:,}")
        return "\n".join(lines)


@contextmanager
def metered() -> Iterator[Traffic]:
    """Count the traffic of every launch inside the context: `with metered() as traffic: plan.run()`."""
    traffic = Traffic()
    with observed(_Meter(traffic)):
        yield traffic


def meter(plan: Any) -> Traffic:
    """Run a plan, or one launch, and return its traffic."""
    with metered() as traffic:
        plan.run()
    return traffic


class _Meter(Observer):
    """Collects the sectors of one program at a time and counts the distinct ones when it ends."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def begin_launch(self, kernel: str, grid: tuple[int, ...], tensors: dict[str, Tensor]) -> None:
        self._map = AddressMap(tensors)
        self._kernel, self._grid = kernel, grid
        kinds = len(self._map.names) + 1  # 0: outside every tensor
        self._bytes = {kind: np.zeros(kinds, dtype=np.int64) for kind in ("loaded", "stored")}
        self._sectors = {kind: np.zeros(kinds, dtype=np.int64) for kind in ("loaded", "stored")}
        self._footprint: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"loaded": [], "stored": []}

    def begin_program(self, program: int) -> None:
        self._end_program()

    def load(self, addresses: Addresses, itemsize: int) -> None:
        self._count("loaded", addresses, itemsize)

    def store(self, addresses: Addresses, itemsize: int) -> None:
        self._count("stored", addresses, itemsize)

    def end_launch(self) -> None:
        self._end_program()
        tensors = {
            name: TensorTraffic(
                loaded_bytes=int(self._bytes["loaded"][number]),
                stored_bytes=int(self._bytes["stored"][number]),
                loaded_sectors=int(self._sectors["loaded"][number]),
                stored_sectors=int(self._sectors["stored"][number]),
            )
            for number, name in enumerate(["(outside)", *self._map.names])
        }
        if not tensors["(outside)"].bytes_moved:
            del tensors["(outside)"]
        self._traffic.launches.append(LaunchTraffic(kernel=self._kernel, grid=self._grid, tensors=tensors))

    def _count(self, kind: str, addresses: Addresses, itemsize: int) -> None:
        # Neighbouring lanes mostly share a sector: one entry for each run of them keeps the rest of the work small.
        sectors = addresses >> np.uint64(_SECTOR_BITS)
        starts = np.flatnonzero(np.concatenate(([True], sectors[1:] != sectors[:-1])))
        owners = self._map.owners(addresses[starts])
        lengths = np.diff(np.append(starts, addresses.size)) * itemsize
        self._bytes[kind] += np.bincount(owners, weights=lengths, minlength=self._bytes[kind].size).astype(np.int64)
        self._footprint[kind].append((sectors[starts], owners))

    def _end_program(self) -> None:
        for kind, pieces in self._footprint.items():
            if pieces:
                sectors, owners = (np.concatenate(column) for column in zip(*pieces, strict=True))
                _, first = np.unique(sectors, return_index=True)
                self._sectors[kind] += np.bincount(owners[first], minlength=self._sectors[kind].size)
                pieces.clear()
