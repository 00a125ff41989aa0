"""Counts the kernels that code would launch on a GPU and the bytes they would move, over tensors without values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.roofline import H200
from soda_kernels._flops import register_flop_formulas
from tests.harness.host_sync import NoHostSync

# What a kernel takes at least, however little it does: an assumption, since no GPU was at hand.
LEAST_US = 2.0

# Lists of tensors go in launches of so many tensors (by how many lists there are) or so many chunks, whichever is
# reached first: PyTorch's aten/src/ATen/native/cuda/MultiTensorApply.cuh.
_MOST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_MOST_CHUNKS, _CHUNK = 320, 65536

# Ops that launch nothing: views and allocations have their own marks in the schema, these have not.
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach", "lift_fresh",
    "_reshape_alias", "set_",
}  # fmt: skip


class Launches(NoHostSync):
    """Sums over the ops on meta tensors, and raises where the host would wait for the GPU.

    Counted are launches, bytes (each input read, each output written, once an op) and FLOPs; an op of soda_kernels is
    one launch. `us` is the time that an H200 would take at its ceilings, at least LEAST_US a launch.
    """

    def __init__(self) -> None:
        super().__init__()
        register_flop_formulas()
        self.launches, self.num_bytes, self.flops, self.us = 0, 0, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_meta]
        made = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_meta]
        if not (inputs or made) or func.is_view or name in _FREE:
            return outputs
        written = _written(func, args, kwargs)
        returned = made if not written else []  # an in-place op returns what it wrote
        num_bytes = sum(map(_num_bytes, [*inputs, *written, *returned]))
        flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=outputs) if (
            func.overloadpacket in flop_registry
        ) else 0  # fmt: skip
        launches = multi_tensor_launches(args) if name.startswith(("_foreach", "_fused")) else 1
        self.launches += launches
        self.num_bytes += num_bytes
        self.flops += flops
        self.us += max(H200.least_us(num_bytes, flops), launches * LEAST_US)
        return outputs

    def row(self) -> dict[str, float]:
        """Return the sums."""
        return {"launches": self.launches, "bytes": self.num_bytes, "flops": self.flops, "predicted_us": self.us}


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among an op's arguments that it writes."""
    written: list[Any] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tree_leaves(args[index] if index < len(args) else kwargs.get(argument.name))
    # The fused optimizers' schemas mark gradients as written; they are only where a scale is given.
    if func.overloadpacket.__name__.startswith("_fused") and kwargs.get("grad_scale") is None:
        gradients = {id(tensor) for tensor in args[1]}
        written = [tensor for tensor in written if id(tensor) not in gradients]
    return [tensor for tensor in written if isinstance(tensor, Tensor) and tensor.is_meta]


def _num_bytes(tensor: Tensor) -> int:
    """Bytes a tensor covers in memory: an expanded one is smaller than its shape."""
    extents = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(extents) * tensor.element_size() if tensor.numel() else 0


def multi_tensor_launches(args: Sequence[Any]) -> int:
    """Return in how many launches PyTorch works through the lists of tensors among its arguments."""
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    # The optimizers' step counts are read beside the lists, not chunk by chunk.
    lists = [each for each in lists if any(tensor.numel() > 1 for tensor in each)] or lists[:1]
    launches = tensors = chunks = 0
    for tensor in lists[0]:
        tensors += 1
        left = math.ceil(max(1, tensor.numel()) / _CHUNK)
        while left:
            taken = min(left, _MOST_CHUNKS - chunks)
            left, chunks = left - taken, chunks + taken
            if chunks == _MOST_CHUNKS or (tensors == _MOST_TENSORS[len(lists)] and not left):
                launches, chunks, tensors = launches + 1, 0, int(bool(left))
    return launches + bool(chunks)
