"""What an op costs, told by its arguments and results on the meta device: bytes, FLOPs and what kind of work it is."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Ops that launch nothing: views and allocations have their own marks in the schema, these have not.
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach", "lift_fresh",
    "_reshape_alias", "set_",
}  # fmt: skip

# By the beginning of an op's name.
_KINDS = {
    "conv": ("convolution", "cudnn_convolution", "mkldnn_convolution"),
    "norm": ("modulated_group_norm", "native_batch_norm", "_native_batch_norm", "cudnn_batch_norm", "batch_norm"),
    "attention": ("attention", "_scaled_dot_product", "_flash_attention"),
    "linear": ("mm", "addmm", "bmm", "baddbmm"),
    "noise, loss": ("add_noise", "denoising_loss", "draw_step_index", "philox"),
    "optimizer": ("_fused", "_foreach"),
}


class OpCost(NamedTuple):
    """Of one call; an op of soda_kernels is one."""

    num_bytes: int
    """Each input read once and each output written once."""
    flops: int
    """Of products alone, as `torch.utils.flop_counter` counts them: a multiply-add is two."""


def op_cost(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> OpCost | None:
    """Return the cost of a call on meta tensors, or None where it does nothing on the device.

    `soda_kernels.register_flop_formulas` must have been called.

    Args:
        func: an op's overload, as a dispatch mode sees it, with its arguments and what it returned.
    """
    inputs, made = (_on_meta(leaves) for leaves in ((args, kwargs), outputs))
    if not (inputs or made) or func.is_view or func.overloadpacket.__name__ in _FREE:
        return None
    written = _written(func, args, kwargs)
    returned = made if not written else []  # an in-place op returns what it wrote
    count = flop_registry.get(func.overloadpacket)
    flops = 0 if count is None else count(*args, **kwargs, out_val=outputs)
    return OpCost(sum(map(_num_bytes, [*inputs, *written, *returned])), flops)


def op_kind(func: Any) -> str:
    """Return what kind of work an op is: a key of the table above, or "elementwise" for all others."""
    name = func.overloadpacket.__name__
    return next((kind for kind, starts in _KINDS.items() if name.startswith(starts)), "elementwise")


def _on_meta(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_meta]


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
    return _on_meta(written)


def _num_bytes(tensor: Tensor) -> int:
    """Bytes a tensor covers in memory: an expanded one is smaller than its shape."""
    extents = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(extents) * tensor.element_size() if tensor.numel() else 0
