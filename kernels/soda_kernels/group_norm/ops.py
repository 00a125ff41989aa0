"""Schemas and shape functions of modulated group norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from soda_kernels._checks import image_memory_format
from soda_kernels._library import define
from soda_kernels.group_norm import reference


def _empty(like: Tensor, channels: int) -> Tensor:
    """An empty tensor of `like`'s layout with another number of channels."""
    shape = (like.shape[0], channels, *like.shape[2:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=image_memory_format(like))


def _fake_forward(
    x: Tensor, skip: Tensor | None, residual: Tensor | None, weight: Any, bias: Any, modulations: Any, num_groups: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    statistics = torch.promote_types(x.dtype, torch.float32)
    y = _empty(x, x.shape[1] + (0 if skip is None else skip.shape[1]))
    summed = x.new_empty(0) if residual is None else _empty(x, x.shape[1])
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=statistics) for _ in range(2))
    return y, summed, mean, rstd


def _fake_backward(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, skip: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    modulations: list[Tensor], *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    dskip = x.new_empty(0) if skip is None else _empty(x, skip.shape[1])
    dweight, dbias = (x.new_empty(0) if p is None else torch.empty_like(p) for p in (weight, bias))
    return _empty(x, x.shape[1]), dskip, dweight, dbias, [torch.empty(m.shape, dtype=m.dtype, device=m.device)
                                                         for m in modulations]  # fmt: skip


define(
    "modulated_group_norm",
    "(Tensor x, Tensor? skip, Tensor? residual, Tensor? weight, Tensor? bias, Tensor[] modulations, int num_groups, "
    "float scale_offset, float eps, bool silu, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.forward,
    fake=_fake_forward,
)
define(
    "modulated_group_norm_backward",
    "(Tensor dy, Tensor? dsummed, Tensor x, Tensor? skip, Tensor? weight, Tensor? bias, Tensor[] modulations, "
    "Tensor mean, Tensor rstd, float scale_offset, bool silu, float dropout_p, Tensor? seed) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    reference=reference.backward,
    fake=_fake_backward,
)
