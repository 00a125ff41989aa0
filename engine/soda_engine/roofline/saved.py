"""What a forward pass keeps for the backward, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from soda_engine.roofline.layers import Layers


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """A tensor that autograd keeps."""

    layer: str
    """The path of the module that keeps it."""
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    """Of the memory behind it, which it may share or show a part of."""
    shares_with: str | None
    """The module that kept the same memory before, if one did: then it takes none of its own."""

    @property
    def own_bytes(self) -> int:
        """Memory that it alone accounts for."""
        return 0 if self.shares_with is not None else self.num_bytes


def list_saved(model: nn.Module, run: Callable[[], Any]) -> list[SavedTensor]:
    """List what is kept for the backward, in the order it is kept; weights, buffers and views of them are left out.

    What a checkpoint keeps to compute a part again is not seen, only what lies outside.

    Args:
        model: whose modules are told apart.
        run: calls it, on any device; meta tensors will do.
    """
    own = {StorageWeakRef(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
    first: dict[StorageWeakRef, str] = {}  # weak references keep an address from being used twice
    saved: list[SavedTensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage not in own:
            saved.append(SavedTensor(
                layer=layers.current, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."),
                num_bytes=tensor.untyped_storage().nbytes(), shares_with=first.get(storage),
            ))  # fmt: skip
            first.setdefault(storage, layers.current)
        return tensor

    with Layers(model) as layers, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result  # held until here, so that nothing is freed while it is counted
    return saved
