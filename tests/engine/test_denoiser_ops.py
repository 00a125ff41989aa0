"""What the denoiser asks of PyTorch, by the profiler's list: nothing moves data around attention, few sums are left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from soda_engine.config import DenoiserConfig, LatentConfig
from soda_engine.models.blocks import AttentionBlock, CrossAttentionBlock
from soda_engine.models.residual import ResidualSum, formed, normalized
from soda_engine.models.unet import Denoiser
from soda_kernels import ModulatedGroupNorm

NORM = "soda_kernels::modulated_group_norm"
MOVES = {
    f"aten::{name}" for name in ("permute", "contiguous", "copy_", "clone", "_to_copy", "cat", "stack", "add", "mul")
}


def events(run: Callable[[], object], *, without: tuple[str, ...]) -> Iterator[Any]:
    """The ops that `run` calls, at any depth, but not those that an op named in `without` calls."""
    with profile(record_shapes=True) as seen:
        run()
    for event in seen.events():
        parent = event.cpu_parent
        while parent is not None and parent.name not in without:
            parent = parent.cpu_parent
        if parent is None:
            yield event


@pytest.mark.parametrize("differentiated", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_nothing_moves_data_around_attention(cross: bool, differentiated: bool) -> None:
    a, b = (torch.randn(17, 16, 3, 5).contiguous(memory_format=torch.channels_last) for _ in range(2))
    args: tuple[Tensor, ...] = ()
    block: AttentionBlock | CrossAttentionBlock
    if cross:
        block = CrossAttentionBlock(16, token_dim=7, head_dim=8, num_groups=4, residual_scale=2**-0.5)
        args = (torch.randn(17, 4, 7),)
    else:
        block = AttentionBlock(16, head_dim=8, num_groups=4, residual_scale=2**-0.5)
    block.to(memory_format=torch.channels_last)
    norm = ModulatedGroupNorm(4, 16)

    def run() -> None:
        left = block(ResidualSum(a, b, 2**-0.5), *args)
        y = normalized(norm, left)
        assert y.requires_grad == formed(left).requires_grad == differentiated

    with torch.set_grad_enabled(differentiated):
        # A norm without the native library is a reference of many ops. On a CPU PyTorch's linear layer, which a 1x1
        # convolution is there, copies its bias first.
        names = [event.name for event in events(run, without=(NORM, "aten::linear"))]
    counts = [names.count(name) for name in (NORM, "aten::linear", "aten::conv2d", "soda_kernels::attention")]
    assert counts == [2, 3 if cross else 2, 0, 1]
    assert MOVES.isdisjoint(names), MOVES.intersection(names)


@pytest.mark.parametrize("scale", [1.0, 2**-0.5], ids=["plain", "scaled"])
@pytest.mark.parametrize("cross_attention", [False, True], ids=["self", "cross"])
def test_the_sums_that_no_norm_forms(cross_attention: bool, scale: float) -> None:
    config = DenoiserConfig(
        image_size=8, channels=8, multipliers=(1, 2), attention_resolutions=(4,), head_dim=8, num_groups=4,
        residual_scale=scale, cross_attention=cross_attention,
    )  # fmt: skip
    model = Denoiser(config, LatentConfig(dim=16)).eval().to(memory_format=torch.channels_last)
    x_t = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)

    def run() -> None:
        with torch.no_grad():
            model(x_t, torch.rand(2), torch.randn(2, 16))

    passes = Counter(
        event.name.rstrip("_")
        for event in events(run, without=(NORM,))
        if event.name in ("aten::add", "aten::add_", "aten::mul", "aten::mul_") and len(event.input_shapes[0]) == 4
    )
    pairs = sum(layer.takes_skip for layer in model.up)
    # The norm of a pair with a skip forms no sum. The convolution of a pair is a sum of two, but a product adds it up.
    assert passes["aten::add"] == pairs == 6
    assert passes["aten::mul"] == (0 if scale == 1.0 else pairs)
