"""A training step over meta tensors: what each layer computes, moves and keeps, forward and backward.

Counted is the engine's own step as a GPU takes it: every op's inputs are read once and its outputs written once. What
one kernel could do for several ops is not foreseen, and neither are caches, launches and the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from soda_engine.config import TrainConfig
from soda_engine.data.views import make_view
from soda_engine.models.blocks import AttentionBlock, ConvResample, CrossAttentionBlock, ResidualBlock, SectionTokens
from soda_engine.models.encoder import BasicBlock, Bottleneck
from soda_engine.models.modulation import TimeEmbedding
from soda_engine.models.soda import Soda
from soda_engine.roofline.devices import Ceilings
from soda_engine.roofline.layers import Layers
from soda_engine.roofline.op_costs import op_cost, op_kind
from soda_engine.roofline.saved import LiveMemory, SavedTensor, list_saved
from soda_kernels import register_flop_formulas

Phase = Literal["views", "forward", "backward", "optimizer"]

_BLOCKS = (
    BasicBlock, Bottleneck, ResidualBlock, AttentionBlock, CrossAttentionBlock, ConvResample, TimeEmbedding,
    SectionTokens,
)  # fmt: skip
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Passes over the fp32 weights: the norm reads gradients (1); fused AdamW reads weights, gradients and both moments and
# writes them all, gradients clipped (8); the moving average reads weights and itself and writes itself (3).
_OPTIMIZER_PASSES = 12
# Autocast reads fp32 and writes bf16 for each weight of a product, and the other way for its gradient.
_CAST_BYTES = 4 + 2


@dataclass(frozen=True, kw_only=True)
class Work:
    """One op, or one line of work that is not counted op by op."""

    layer: str
    """The path of the module it belongs to; "" for none."""
    kind: str
    phase: Phase
    num_bytes: int
    flops: int
    again: bool = False
    """Whether a checkpoint computes it a second time, in the backward."""


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """A training step."""

    batch_size: int
    dtype: str
    work: tuple[Work, ...]
    saved: tuple[SavedTensor, ...]
    blocks: tuple[str, ...]
    """Paths of the blocks that layers are gathered into, in the model's order."""
    held_bytes: int
    """Memory that lives between forward and backward, weights and the optimizer's state aside."""
    peak_bytes: int
    """The most that lives at a time in forward and backward, gradients (in the products' dtype) included."""

    @property
    def flops(self) -> int:
        """Of the model: what a checkpoint computes again does not count."""
        return sum(each.flops for each in self.work if not each.again)

    @property
    def num_bytes(self) -> int:
        return sum(each.num_bytes for each in self.work)

    def floor_us(self, ceilings: Ceilings) -> float:
        """Return the least time of the step: the sum of `least_us`."""
        return least_us(self.work, ceilings)

    def block_of(self, layer: str) -> str:
        """Return the block that a layer is a part of, or its first two names."""
        parts = layer.split(".")
        paths = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((path for path in paths if path in self.blocks), ".".join(parts[:2]))


def least_us(work: Iterable[Work], ceilings: Ceilings) -> float:
    """Sum, over ops, the larger of the time their bytes need and the time their FLOPs need."""
    return sum(ceilings.least_us(each.num_bytes, each.flops) for each in work)


def count_step(config: TrainConfig, *, batch_size: int, dtype: str) -> StepCosts:
    """Count a training step of a config, on one device and without accumulation.

    Args:
        config: a run's settings.
        batch_size: images of the step.
        dtype: "bf16" is autocast over fp32 weights, "fp32" all in fp32.

    Raises:
        ValueError: batch_size is not positive, dtype is another, or the config does not fit together.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be positive")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {list(_DTYPES)}")
    register_flop_formulas()
    model = meta_model(config, _DTYPES[dtype])
    with Layers(model) as layers, _Counter(layers) as counter:
        counter.phase = "views"
        source, target = _views(config, batch_size, _DTYPES[dtype])
        with LiveMemory() as memory:
            counter.phase = "forward"
            loss = _loss(model, source, target)
            held = memory.num_bytes()
            counter.phase = "backward"
            loss.backward()
    products = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    cast = _CAST_BYTES * sum(weight.numel() for weight in products) if dtype == "bf16" else 0
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    known: tuple[tuple[str, Phase, int], ...] = (
        ("casts", "forward", cast), ("casts", "backward", cast), ("optimizer", "optimizer", _OPTIMIZER_PASSES * weights)
    )  # fmt: skip
    work = [
        *counter.work,
        *(Work(layer="", kind=kind, phase=phase, num_bytes=size, flops=0) for kind, phase, size in known if size),
    ]
    return StepCosts(
        batch_size=batch_size, dtype=dtype, work=tuple(work),
        saved=tuple(list_saved(model, lambda: _loss(model, source, target))),
        held_bytes=held, peak_bytes=memory.peak_bytes,
        blocks=tuple(path for path, module in model.named_modules() if isinstance(module, _BLOCKS)),
    )  # fmt: skip


def meta_model(config: TrainConfig, dtype: torch.dtype) -> Soda:
    """Build a run's model without values, in training mode and in the run's layout."""
    with torch.device("meta"):
        model = Soda(config.model).to(dtype)
    model.to(memory_format=_layout(config))  # type: ignore[call-overload]
    model.denoiser.checkpoint_activations(config.checkpoint_activations)
    model.schedule  # noqa: B018  moved to the device once, which is no part of a step
    return model


def _layout(config: TrainConfig) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.contiguous_format


def _views(config: TrainConfig, batch_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    side, channels = config.dataset.image_size, config.dataset.channels
    images = torch.empty(batch_size, channels, side, side, dtype=torch.uint8, device="meta")
    ids = torch.arange(batch_size)
    key: dict[str, Any] = {"seed": config.seed, "sample_ids": ids, "epochs": torch.zeros_like(ids)}
    source = make_view(images, config.views.source, config.model.encoder.image_size, role="source", **key)
    target = make_view(images, config.views.target, config.model.denoiser.image_size, role="target", **key)
    layout = _layout(config)
    return source.to(dtype, memory_format=layout), target.to(dtype, memory_format=layout)


def _loss(model: Soda, source: Tensor, target: Tensor) -> Tensor:
    ids = torch.empty(len(source), dtype=torch.int64, device="meta")
    losses: Tensor = model(source, target, seed=0, sample_ids=ids, step=0)
    return losses.mean()


class _Counter(TorchDispatchMode):
    """Notes the work of every op on meta tensors."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.phase: Phase = "forward"
        self.work: list[Work] = []
        self._layers = layers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "_pin_memory":  # which only a GPU's host has
            return args[0].clone()
        outputs = func(*args, **(kwargs or {}))
        cost = op_cost(func, args, kwargs or {}, outputs)
        if cost is not None:
            kind = "views" if self.phase == "views" else op_kind(func)
            again = self.phase == "backward" and self._layers.is_forward
            self.work.append(
                Work(layer=self._layers.current, kind=kind, phase=self.phase, again=again, **cost._asdict())
            )
        return outputs
