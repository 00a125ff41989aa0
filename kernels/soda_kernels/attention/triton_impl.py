"""Launchers of attention: which kernels run over which grid, and what they write.

They decide and allocate; what they return runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from soda_kernels._launch import Launch, Plan
from soda_kernels.attention.config import AttentionConfig, Problem, choose
from soda_kernels.attention.triton_backward import (
    _attention_bwd_head_kernel,
    _attention_bwd_keys_kernel,
    _attention_bwd_queries_kernel,
)
from soda_kernels.attention.triton_forward import _attention_fwd_online_kernel, _attention_fwd_whole_row_kernel


def plan_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, *, config: AttentionConfig | None = None) -> Plan:
    """Plan the op `attention`, whose arguments these are; none may be empty."""
    problem = Problem.of(q, k, v, backward=False)
    config = config or choose(problem, q.device, "triton")
    batch, queries, heads, _ = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    blocks = math.ceil(queries / config.block_m)
    whole = config.variant == "whole_row"
    if whole and config.block_n < problem.keys:
        raise ValueError(f"block_n is {config.block_n}; of a whole row it must be at least the {problem.keys} keys")
    described = config.descriptors and _are_aligned(q, k, v)
    launch = Launch(
        kernel=_attention_fwd_whole_row_kernel if whole else _attention_fwd_online_kernel,
        grid=(math.ceil(problem.pairs / config.pairs), math.ceil(blocks / config.blocks)),
        arguments={
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "o_ptr": o, "lse_ptr": lse, **_strides(q=q, k=k, v=v),
            **_dense_strides(o=o), "heads": heads, "num_pairs": problem.pairs, "queries": queries,
            "keys": problem.keys, "scale": scale,
        },
        constants={
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, **_constants(problem, (q, k, v, o)),
            **({"PAIRS": config.pairs, "QUERY_BLOCKS": config.blocks} if whole else {"DESCRIBED": described}),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        descriptors=_descriptors(problem, q_ptr=config.block_m, k_ptr=config.block_n, v_ptr=config.block_n)
        if described else {},
    )  # fmt: skip
    return Plan(launches=(launch,), outputs=(o, lse), config=config)


def plan_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, *,
    config: AttentionConfig | None = None,
) -> Plan:  # fmt: skip
    """Plan the op `attention_backward`, whose arguments these are; none may be empty."""
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    return _plan_backward(do, q, k, v, o, lse, scale, gradients, tuple(gradients), config)


def plan_backward_qkvpacked(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, scale: float, *, config: AttentionConfig | None = None
) -> Plan:
    """Plan the op `attention_qkvpacked_backward`, whose arguments these are; none may be empty."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    q, k, v = qkv.unbind(2)
    return _plan_backward(do, q, k, v, o, lse, scale, dqkv.unbind(2), (dqkv,), config)


def _plan_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float,
    gradients: Sequence[Tensor], outputs: tuple[Tensor, ...], config: AttentionConfig | None,
) -> Plan:  # fmt: skip
    problem = Problem.of(q, k, v, do, backward=True)
    config = config or choose(problem, q.device, "triton")
    dq, dk, dv = gradients
    o, lse = o.contiguous(), lse.contiguous()
    inputs = {"do_ptr": do, "q_ptr": q, "k_ptr": k, "v_ptr": v, "lse_ptr": lse, **_strides(do=do, q=q, k=k, v=v)}
    lengths = {
        "heads": q.shape[2], "queries": problem.queries, "keys": problem.keys, "scale": scale,
        # With one key P is 1 whatever q and k are: what rounding leaves of dP - delta is no gradient.
        "gradient_scale": scale if problem.keys > 1 else 0.0,
    }  # fmt: skip
    with_queries = {**inputs, **lengths, "o_ptr": o, **_dense_strides(o=o), "dq_ptr": dq, **_dense_strides(dq=dq)}
    with_keys = {**inputs, **lengths, "dk_ptr": dk, "dv_ptr": dv, **_dense_strides(dk=dk)}
    own, other = config.block_m, config.block_n
    constants = {"OWN": own, "OTHER": other, **_constants(problem, (do, q, k, v, o, dq, dk, dv))}

    def launch(
        kernel: Any, blocks: tuple[int, ...], arguments: dict[str, Any],
        descriptors: dict[str, tuple[int, ...]] | None = None, **more: Any,
    ) -> Launch:  # fmt: skip
        return Launch(
            kernel=kernel, grid=(problem.pairs, *blocks), arguments=arguments, constants={**constants, **more},
            num_warps=config.num_warps, num_stages=config.num_stages, descriptors=descriptors or {},
        )  # fmt: skip

    if config.variant == "one_kernel":
        blocks = math.ceil(max(problem.queries, problem.keys) / own)
        single = launch(
            _attention_bwd_head_kernel, (math.ceil(blocks / config.blocks),), {**with_queries, **with_keys},
            BLOCKS=config.blocks,
            ONE_BLOCK=problem.queries <= other and problem.keys <= own and problem.block_dim <= 128,
        )  # fmt: skip
        return Plan(launches=(single,), outputs=outputs, config=config)
    delta = {"delta_ptr": torch.empty_like(lse)}
    described = config.descriptors and _are_aligned(q, k, v, do)
    launches = (
        launch(
            _attention_bwd_queries_kernel, (math.ceil(problem.queries / own),), {**with_queries, **delta},
            _descriptors(problem, k_ptr=other, v_ptr=other) if described else {}, DESCRIBED=described,
        ),
        launch(
            _attention_bwd_keys_kernel, (math.ceil(problem.keys / own),), {**with_keys, **delta},
            _descriptors(problem, q_ptr=other, do_ptr=other) if described else {}, DESCRIBED=described,
        ),
    )  # fmt: skip
    return Plan(launches=launches, outputs=outputs, config=config)


def _constants(problem: Problem, tensors: Sequence[Tensor]) -> dict[str, Any]:
    return {
        "BLOCK_D": problem.block_dim, "HEAD_DIM": problem.head_dim, "VECTOR": _vector(tensors),
        "PRECISION": _precision(),
    }  # fmt: skip


def _descriptors(problem: Problem, **rows: int) -> dict[str, tuple[int, ...]]:
    """Return the blocks of one head that descriptors of [B, T, H, D] load, by the names of the kernels' parameters."""
    return {name: (1, count, 1, problem.block_dim) for name, count in rows.items()}


def _are_aligned(*tensors: Tensor) -> bool:
    """Whether tensors begin where descriptors can, which PyTorch's own memory does."""
    return all(x.data_ptr() % 16 == 0 for x in tensors)


def _vector(tensors: Sequence[Tensor]) -> int:
    """Return of how many elements every head's place is a multiple: up to 16 bytes, in which a GPU can then access it.

    Triton's launcher sees multiples of 16 elements alone, which heads of 40 do not lie at.
    """
    strides = (x.stride(d) for x in tensors for d in (0, 2) if x.shape[d] > 1)
    return math.gcd(16 // tensors[0].element_size(), *strides)


def _precision() -> str:
    """Return how fp32 products are formed: as torch.backends.cuda.matmul says."""
    # Not its allow_tf32, which raises once fp32_precision was set.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Return the strides of [B, T, H, D] tensors, by the names of the kernels' parameters."""
    parts = ("batch", "row", "head", "dim")
    return {f"{name}_{part}_stride": x.stride(d) for name, x in tensors.items() for d, part in enumerate(parts)}


def _dense_strides(**tensors: Tensor) -> dict[str, int]:
    """Return the strides of tensors whose heads' numbers lie together."""
    return {name: stride for name, stride in _strides(**tensors).items() if not name.endswith("dim_stride")}
