"""FLOP formulas for `torch.utils.flop_counter.FlopCounterMode`, which counts nothing for an op it does not know."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from soda_kernels._library import AUTO_NAMESPACE, REFERENCE_NAMESPACE


@functools.cache
def register_flop_formulas() -> None:
    """Let `FlopCounterMode` count attention and convolution as it counts torch's own.

    Attention is two products forward and five backward. A convolution's products are those of its definition, of which
    Winograd's algorithm takes fewer. A multiply-add is two operations. Call it once before counting; it is not done on
    import, because torch's counter imports Triton.
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

    def convolution(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
        return 2 * x_shape[0] * math.prod(x_shape[2:]) * math.prod(weight_shape)

    def convolution_backward(
        dy_shape: Any, x_shape: Any, weight_shape: Any, for_x: bool, for_weight: bool, *_: Any, **__: Any
    ) -> int:
        return (for_x + for_weight) * convolution(x_shape, weight_shape)

    for ops in (getattr(torch.ops, namespace) for namespace in (AUTO_NAMESPACE, REFERENCE_NAMESPACE)):
        register_flop_formula(ops.conv3x3)(convolution)
        register_flop_formula(ops.conv3x3_backward)(convolution_backward)
        register_flop_formula(ops.attention)(forward)
        register_flop_formula(ops.attention_backward)(backward)
        register_flop_formula(ops.attention_qkvpacked_backward)(backward_qkvpacked)
