"""Counts the kernels that code would launch on a GPU and the bytes they would move, over tensors without values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benchmarks.roofline import H200
from soda_engine.roofline.op_costs import op_cost
from soda_kernels import register_flop_formulas
from tests.harness.host_sync import NoHostSync

# What a kernel takes at least, however little it does: an assumption, since no GPU was at hand.
LEAST_US = 2.0

# Lists of tensors go in launches of so many tensors (by how many lists there are) or so many chunks, whichever is
# reached first: PyTorch's aten/src/ATen/native/cuda/MultiTensorApply.cuh.
_MOST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_MOST_CHUNKS, _CHUNK = 320, 65536


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
        cost = op_cost(func, args, kwargs, outputs)
        if cost is None:
            return outputs
        launches = multi_tensor_launches(args) if name.startswith(("_foreach", "_fused")) else 1
        self.launches += launches
        self.num_bytes += cost.num_bytes
        self.flops += cost.flops
        self.us += max(H200.least_us(*cost), launches * LEAST_US)
        return outputs

    def row(self) -> dict[str, float]:
        """Return the sums."""
        return {"launches": self.launches, "bytes": self.num_bytes, "flops": self.flops, "predicted_us": self.us}


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
