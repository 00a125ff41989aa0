"""The steps of one sampling loop: where each begins and ends, and which one a timestep names."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Loop:
    """Steps in order, their indices on a device and known on the host.

    Args:
        timesteps: int64 of shape [num_steps], where each step begins.
        following: int64 of shape [num_steps], where each ends, -1 for the clean end.
        device: of the tensors.

    Attributes:
        timesteps: the same as a tensor. listed: the same as ints. ends_clean: whether the last ends at the clean end.
        next_place: the place of the step that comes next; None before the first.
        begin_place: the place of the first, if it was said.
    """

    def __init__(self, timesteps: np.ndarray, following: np.ndarray, device: torch.device | str | None = None) -> None:
        self.timesteps = torch.from_numpy(timesteps.copy()).to(device)
        self.listed: list[int] = timesteps.tolist()
        self.ends_clean = bool(following[-1] < 0)
        self.next_place: int | None = None
        self.begin_place: int | None = None
        self._places = {timestep: place for place, timestep in enumerate(self.listed)}
        self._indices = torch.from_numpy(np.stack((timesteps, following))).to(device)

    def __len__(self) -> int:
        return len(self.listed)

    def indices(self, place: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return where a step begins and ends, 0-d int64 tensors on `device`."""
        if self._indices.device != device:
            self._indices = self._indices.to(device)
        return self._indices[0, place], self._indices[1, place]

    def place_of(self, timestep: int | Tensor) -> int:
        """Tell which step a timestep names, without waiting for a device where that can be.

        An element of `timesteps` tells by where it lies, numbers in main memory by what they are. Of another device's
        tensor the first is read, unless the beginning was said; those after it are counted.

        Raises:
            ValueError: the timestep is not one of the loop's, or was counted beyond its end.
        """
        counted = self.begin_place if self.next_place is None else self.next_place
        if isinstance(timestep, Tensor):
            if _share_storage(timestep, self.timesteps):
                return int(timestep.storage_offset() - self.timesteps.storage_offset())
            if timestep.device.type != "cpu" and counted is not None:
                if counted >= len(self):
                    raise ValueError(f"all {len(self)} steps of the loop are taken; call set_timesteps for another")
                return counted
        value = int(timestep)
        if counted is not None and counted < len(self) and self.listed[counted] == value:
            return counted  # where one timestep is listed twice
        if value not in self._places:
            raise ValueError(f"timestep is {value}, which is not among the {len(self)} of set_timesteps")
        return self._places[value]


def _share_storage(timestep: Tensor, timesteps: Tensor) -> bool:
    """Tell whether a 0-d tensor is an element of `timesteps`, as iteration hands them out."""
    if timestep.ndim or timestep.dtype != timesteps.dtype or timestep.device != timesteps.device:
        return False
    return timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
