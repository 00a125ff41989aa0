"""Schemas and shape functions of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from soda_kernels._library import define
from soda_kernels.attention import reference


def _contiguous(like: Tensor) -> Tensor:
    """An empty contiguous tensor of `like`'s shape."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return _contiguous(q), q.new_empty((batch, heads, length), dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _contiguous(q), _contiguous(k), _contiguous(v)


def _fake_backward_qkvpacked(do: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return _contiguous(qkv)


define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    reference=reference.forward,
    fake=_fake_forward,
)
define(
    "attention_backward",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
    reference=reference.backward,
    fake=_fake_backward,
)
define(
    "attention_qkvpacked_backward",
    "(Tensor do, Tensor qkv, Tensor o, Tensor lse, float scale) -> Tensor",
    reference=reference.backward_qkvpacked,
    fake=_fake_backward_qkvpacked,
)
