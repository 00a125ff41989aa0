"""Proof, on a machine without a GPU, that code would not wait for one: it runs on the meta device, as if on a GPU.

Meta tensors have no values, so whatever reads one fails by itself.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")

# Ops whose result's shape, or whose error, depends on values: on a GPU each reads something back.
_READING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive",
    "unique_dim", "bincount", "_linalg_check_errors", "repeat_interleave",
}  # fmt: skip


class HostSyncError(AssertionError):
    """The code under test would wait for the device."""


_autocast_of_pytorch = torch.autocast


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
    """torch.autocast, which the meta device has none of."""
    return _autocast_of_pytorch("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


class NoHostSync(TorchDispatchMode):
    """Raises where code would wait for the device, and counts the ops on the device by name in `ops`.

    A copy from the host waits unless it is asked not to and comes from pinned memory, which is simulated here; a copy
    to the host waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self._pinned: list[Tensor] = []
        self._autocast = patch("torch.autocast", _autocast)

    def __enter__(self) -> NoHostSync:
        self._autocast.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._autocast.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_pin_memory":
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.is_meta for tensor in inputs):
            masks = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in inputs[1:])
            if name in _READING or masks:
                raise HostSyncError(f"{func} reads from the device")
            if name == "copy_" and args[0].device != args[1].device:
                self._check_copy(args[1], non_blocking=len(args) > 2 and args[2])
            if name == "_to_copy" and kwargs.get("device", DEVICE) != DEVICE:
                self._check_copy(args[0], non_blocking=False)
        if name == "_fused_sgd_" and args[0][0].is_meta:  # in place, and not known on the meta device
            outputs = None
        else:
            outputs = func(*args, **kwargs)
        on_device = any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in (*inputs, *tree_leaves(outputs)))
        if name == "_to_copy" and on_device and not args[0].is_meta:
            self._check_copy(args[0], non_blocking=kwargs.get("non_blocking", False))
        if on_device:
            self.ops[name] += 1
        return outputs

    def _is_pinned(self, source: Tensor) -> bool:
        storages = {pinned.untyped_storage().data_ptr() for pinned in self._pinned}
        return source.untyped_storage().data_ptr() in storages

    def _check_copy(self, source: Tensor, *, non_blocking: bool) -> None:
        if source.is_meta or not non_blocking or not self._is_pinned(source):
            raise HostSyncError(f"a copy of {tuple(source.shape)} {source.dtype} from {source.device} waits")
