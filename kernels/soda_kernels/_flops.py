"""FLOP formulas for `torch.utils.flop_counter.FlopCounterMode`, which counts nothing for an op it does not know."""

from __future__ import annotations

import functools
from typing import Any

import torch

from soda_kernels._library import AUTO_NAMESPACE, REFERENCE_NAMESPACE


@functools.cache
def register_flop_formulas() -> None:
    """Let `FlopCounterMode` count attention as it counts torch's own: two products forward, five backward.

    A multiply-add is two operations. Call it once before counting; it is not done on import, because torch's counter
    imports Triton.
    """
    from torch.utils.flop_counter import register_flop_formula

    def product(q_shape: Any, k_shape: Any) -> int:
        batch, queries, heads, dim = q_shape
        return 2 * batch * heads * queries * k_shape[1] * dim

    def forward(q_shape: Any, k_shape: Any, *_: Any, **__: Any) -> int:
        return 2 * product(q_shape, k_shape)

    def backward(do_shape: Any, q_shape: Any, k_shape: Any, *_: Any, **__: Any) -> int:
        return 5 * product(q_shape, k_shape)

    def backward_qkvpacked(do_shape: Any, *_: Any, **__: Any) -> int:
        return 5 * product(do_shape, do_shape)

    for ops in (getattr(torch.ops, namespace) for namespace in (AUTO_NAMESPACE, REFERENCE_NAMESPACE)):
        register_flop_formula(ops.attention)(forward)
        register_flop_formula(ops.attention_backward)(backward)
        register_flop_formula(ops.attention_qkvpacked_backward)(backward_qkvpacked)
