"""What a forward pass keeps for the backward, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class LiveMemory(TorchDispatchMode):
    """Adds up the memory of tensors that were made inside the context and still live, by storage, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live: dict[StorageWeakRef, int] = {}

    def num_bytes(self) -> int:
        """Return how many bytes live now."""
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}
        return sum(self._live.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        given = {StorageWeakRef(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        for leaf in tree_leaves(outputs):
            if _is_tensor(leaf):
                storage = StorageWeakRef(leaf.untyped_storage())
                if storage not in given:  # else a view, or written in place
                    self._live[storage] = leaf.untyped_storage().nbytes()
        self.peak_bytes = max(self.peak_bytes, self.num_bytes())
        return outputs


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def list_saved(model: nn.Module, run: Callable[[], Any]) -> list[SavedTensor]:
    """List what is kept for the backward, in the order it is kept; weights, buffers and views of them are left out.

    What lies inside a checkpoint is not seen, nor what is held to compute anything again, nor autocast's copy of a
    weight whose input is made again: `LiveMemory` sees them.

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
