"""What a model would launch on a GPU and how many bytes that would move, by kind of work, counted without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.peers.models import stable_diffusion
from benchmarks.tables import table
from soda_engine.roofline.op_costs import op_cost, op_kind
from soda_kernels import register_flop_formulas

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PASSES = {"inference": 2, "training": 8}
"""Batch sizes: a sample with guidance, and a step on one GPU."""
KINDS = ("norm", "elementwise", "attention", "linear", "conv")

# PyTorch's aten/src/ATen/native/cuda/group_norm_kernel.cu: moments, coefficients, an elementwise pass; backward two
# sums, rstd * weight, coefficients, an elementwise pass and the weights' gradients. Both passes read their images.
_LAUNCHES = {"native_group_norm": 3, "native_group_norm_backward": 5}


class Kernels(TorchDispatchMode):
    """Sums launches and bytes of the ops on meta tensors, by kind.

    An op reads each of its inputs once and writes each output once, in one launch. Of group norms, PyTorch's and this
    package's, what is known of their kernels is counted instead: how many there are, and images that are read twice.
    """

    def __init__(self) -> None:
        super().__init__()
        register_flop_formulas()
        self.launches, self.num_bytes = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        outputs = _laid_out(name, args, func(*args, **kwargs))
        cost = op_cost(func, args, kwargs, outputs)
        if cost is None:
            return outputs
        kind = "norm" if name.startswith("native_") and "norm" in name else op_kind(func)
        launches, again = 1, 0
        if name in _LAUNCHES:
            launches, again = _LAUNCHES[name], _image_bytes(args[:2] if name.endswith("backward") else args[:1])
        elif name.startswith("modulated_group_norm"):
            launches, again = _planned(name, args)
        self.launches[kind] += launches
        self.num_bytes[kind] += cost.num_bytes + again
        return outputs


def _laid_out(name: str, args: tuple[Any, ...], outputs: Any) -> Any:
    """Give a convolution's results the layout that they have on a GPU; on the meta device they are contiguous."""
    if not name.startswith("convolution"):
        return outputs
    operands = args[1:3] if name.endswith("backward") else args[:2]
    if not any(_is_channels_last(operand) for operand in operands):
        return outputs
    moved = [
        each.contiguous(memory_format=torch.channels_last) if isinstance(each, Tensor) and each.ndim == 4 else each
        for each in (outputs if isinstance(outputs, tuple) else (outputs,))
    ]
    return tuple(moved) if isinstance(outputs, tuple) else moved[0]


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _image_bytes(images: Any) -> int:
    return sum(image.numel() * image.element_size() for image in images if isinstance(image, Tensor))


def _planned(name: str, args: tuple[Any, ...]) -> tuple[int, int]:
    """Return the launches of one of this package's group norms on a GPU, and the bytes that it reads twice."""
    from soda_kernels.group_norm import triton_impl  # needs Triton

    backward = name.endswith("backward")
    plan = (triton_impl.plan_backward if backward else triton_impl.plan_forward)(*args)
    # Forward x is the first argument; backward dy is, and x the third.
    images = (args[0], args[2]) if backward else (args[0],)
    return len(plan.launches), _image_bytes(images) if plan.config.variant == "split" else 0


@contextlib.contextmanager
def flash_attention() -> Iterator[None]:
    """Run PyTorch's attention by the op that runs it on a GPU: on the meta device it falls apart into its formula."""

    def run(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return output

    with patch.object(F, "scaled_dot_product_attention", run):
        yield


def count(model: nn.Module, inputs: tuple[Tensor, ...], *, backward: bool) -> Kernels:
    """Count one forward of a model on the meta device, and its backward if that is asked for."""
    with flash_attention(), torch.set_grad_enabled(backward), Kernels() as counted:
        output = model(*inputs, return_dict=False)[0]
        if backward:
            output.backward(torch.empty_like(output))
    model.zero_grad(set_to_none=True)  # the next gradients are not added to these
    return counted


def kernel_rows(say: Callable[[str], None] = lambda _text: None) -> list[dict[str, Any]]:
    """Count Stable Diffusion's U-Net in bf16, plain and optimized: a row for each pass, layout and kind of work."""
    from soda_kernels.integrations.diffusers import optimize

    rows = []
    for name, batch in PASSES.items():
        for layout, memory_format in LAYOUTS.items():
            say(f"counting {name} {layout}")
            model, inputs = stable_diffusion(batch, torch.bfloat16, memory_format)
            model.train(name == "training")
            plain = count(model, inputs, backward=name == "training")
            optimize(model)
            ours = count(model, inputs, backward=name == "training")
            for kind in (*KINDS, "total"):
                row: dict[str, Any] = {"pass": name, "batch": batch, "layout": layout, "kind": kind}
                for who, counted in (("plain", plain), ("optimized", ours)):
                    for what, sums in (("launches", counted.launches), ("bytes", counted.num_bytes)):
                        row[f"{who}_{what}"] = sum(sums.values()) if kind == "total" else sums[kind]
                rows.append(row)
    return rows


def kernel_table(rows: list[dict[str, Any]]) -> str:
    """Write the rows as a table."""
    header = ("pass", "batch", "layout", "kind", "launches", "optimized", "GB", "optimized", "of the bytes")
    return table(header, (
        (row["pass"], str(row["batch"]), row["layout"], row["kind"], f"{row['plain_launches']:,}",
         f"{row['optimized_launches']:,}", f"{row['plain_bytes'] / 1e9:.3f}", f"{row['optimized_bytes'] / 1e9:.3f}",
         f"{row['optimized_bytes'] / row['plain_bytes']:.0%}" if row["plain_bytes"] else "-")
        for row in rows
    ))  # fmt: skip
