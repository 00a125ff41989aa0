"""Backward attention without atomics: one kernel a head, or one over blocks of queries and one over blocks of keys.

    dV = P^T dO      dS = P (dO V^T - delta)      delta = sum_d O dO      dQ = scale dS K      dK = scale dS^T Q

Reference: Dao et al. 2022 (the backward from lse).
"""

from __future__ import annotations

import triton
import triton.language as tl

from soda_kernels.attention.triton_device import (
    head_of,
    load_rows,
    load_tile,
    score_gradient,
    score_gradient_of_keys,
    store_tile,
)


@triton.jit
def _load_queries(
    q_head, do_head, o_head, lse_head, m, queries, q_row_stride, q_dim_stride, do_row_stride, do_dim_stride,
    o_row_stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Return a block's q, do, lse (infinite, so that P is 0, beyond the queries) and delta."""
    q = load_tile(q_head, m, queries, q_row_stride, q_dim_stride, ROWS, BLOCK_D, HEAD_DIM)
    do = load_tile(do_head, m, queries, do_row_stride, do_dim_stride, ROWS, BLOCK_D, HEAD_DIM)
    o = load_tile(o_head, m, queries, o_row_stride, 1, ROWS, BLOCK_D, HEAD_DIM)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    row = m + tl.arange(0, ROWS)
    return q, do, tl.load(lse_head + row, row < queries, float("inf")), delta


@triton.jit
def _attention_bwd_head_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr,
    do_batch_stride, do_row_stride, do_head_stride, do_dim_stride,
    q_batch_stride, q_row_stride, q_head_stride, q_dim_stride,
    k_batch_stride, k_row_stride, k_head_stride, k_dim_stride,
    v_batch_stride, v_row_stride, v_head_stride, v_dim_stride,
    o_batch_stride, o_row_stride, o_head_stride,
    dq_batch_stride, dq_row_stride, dq_head_stride, dk_batch_stride, dk_row_stride, dk_head_stride,
    heads, queries, keys, scale, gradient_scale,
    OWN: tl.constexpr, OTHER: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCKS: tl.constexpr, ONE_BLOCK: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All three gradients of one head, or of BLOCKS blocks of OWN keys and of OWN queries of it.

    With ONE_BLOCK the head has one block of keys and one of queries: S is formed once, and o is not read.
    """
    pair, first = tl.program_id(0), tl.program_id(1) * (BLOCKS * OWN)
    q_head = head_of(q_ptr, pair, heads, q_batch_stride, q_head_stride, VECTOR)
    k_head = head_of(k_ptr, pair, heads, k_batch_stride, k_head_stride, VECTOR)
    v_head = head_of(v_ptr, pair, heads, v_batch_stride, v_head_stride, VECTOR)
    do_head = head_of(do_ptr, pair, heads, do_batch_stride, do_head_stride, VECTOR)
    o_head = head_of(o_ptr, pair, heads, o_batch_stride, o_head_stride, VECTOR)
    dq_head = head_of(dq_ptr, pair, heads, dq_batch_stride, dq_head_stride, VECTOR)
    dk_head = head_of(dk_ptr, pair, heads, dk_batch_stride, dk_head_stride, VECTOR)
    dv_head = head_of(dv_ptr, pair, heads, dk_batch_stride, dk_head_stride, VECTOR)
    lse_head = lse_ptr + pair.to(tl.int64) * queries
    for n in range(first, tl.minimum(first + BLOCKS * OWN, keys), OWN):
        k = load_tile(k_head, n, keys, k_row_stride, k_dim_stride, OWN, BLOCK_D, HEAD_DIM)
        v = load_tile(v_head, n, keys, v_row_stride, v_dim_stride, OWN, BLOCK_D, HEAD_DIM)
        dk = tl.zeros((OWN, BLOCK_D), tl.float32)
        dv = tl.zeros((OWN, BLOCK_D), tl.float32)
        for m in range(0, queries, OTHER):
            if ONE_BLOCK:
                q = load_tile(q_head, m, queries, q_row_stride, q_dim_stride, OTHER, BLOCK_D, HEAD_DIM)
                do = load_tile(do_head, m, queries, do_row_stride, do_dim_stride, OTHER, BLOCK_D, HEAD_DIM)
                row = m + tl.arange(0, OTHER)
                lse = tl.load(lse_head + row, row < queries, float("inf"))
                delta = lse  # which takes its place as an argument, and is not used
            else:
                q, do, lse, delta = _load_queries(
                    q_head, do_head, o_head, lse_head, m, queries, q_row_stride, q_dim_stride, do_row_stride,
                    do_dim_stride, o_row_stride, OTHER, BLOCK_D, HEAD_DIM,
                )  # fmt: skip
            p, ds = score_gradient_of_keys(
                q, k, v, do, lse, delta, scale, m, queries, keys, OTHER, OWN, BLOCK_D, PRECISION, ONE_BLOCK
            )
            dv = tl.dot(p, do, dv, input_precision=PRECISION)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
            if ONE_BLOCK:
                dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
                store_tile(dq_head, dq * gradient_scale, m, queries, dq_row_stride, OTHER, BLOCK_D, HEAD_DIM)
        store_tile(dk_head, dk * gradient_scale, n, keys, dk_row_stride, OWN, BLOCK_D, HEAD_DIM)
        store_tile(dv_head, dv, n, keys, dk_row_stride, OWN, BLOCK_D, HEAD_DIM)
    if not ONE_BLOCK:
        # Of heads over 128 wide 64 queries at a time would spill.
        MINE: tl.constexpr = OWN if BLOCK_D <= 128 else OTHER
        THEIRS: tl.constexpr = OTHER if BLOCK_D <= 128 else OWN
        for m in range(first, tl.minimum(first + BLOCKS * OWN, queries), MINE):
            q, do, lse, delta = _load_queries(
                q_head, do_head, o_head, lse_head, m, queries, q_row_stride, q_dim_stride, do_row_stride,
                do_dim_stride, o_row_stride, MINE, BLOCK_D, HEAD_DIM,
            )  # fmt: skip
            dq = tl.zeros((MINE, BLOCK_D), tl.float32)
            for n in range(0, keys, THEIRS):
                k = load_tile(k_head, n, keys, k_row_stride, k_dim_stride, THEIRS, BLOCK_D, HEAD_DIM)
                v = load_tile(v_head, n, keys, v_row_stride, v_dim_stride, THEIRS, BLOCK_D, HEAD_DIM)
                _, ds = score_gradient(q, k, v, do, lse, delta, scale, n, keys, THEIRS, PRECISION)
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
            store_tile(dq_head, dq * gradient_scale, m, queries, dq_row_stride, MINE, BLOCK_D, HEAD_DIM)


@triton.jit
def _attention_bwd_queries_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, delta_ptr, dq_ptr,
    do_batch_stride, do_row_stride, do_head_stride, do_dim_stride,
    q_batch_stride, q_row_stride, q_head_stride, q_dim_stride,
    k_batch_stride, k_row_stride, k_head_stride, k_dim_stride,
    v_batch_stride, v_row_stride, v_head_stride, v_dim_stride,
    o_batch_stride, o_row_stride, o_head_stride, dq_batch_stride, dq_row_stride, dq_head_stride,
    heads, queries, keys, scale, gradient_scale,
    OWN: tl.constexpr, OTHER: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries, and their delta for the kernel that follows. If DESCRIBED, k and v are descriptors."""
    pair, m = tl.program_id(0), tl.program_id(1) * OWN
    q_head = head_of(q_ptr, pair, heads, q_batch_stride, q_head_stride, VECTOR)
    do_head = head_of(do_ptr, pair, heads, do_batch_stride, do_head_stride, VECTOR)
    o_head = head_of(o_ptr, pair, heads, o_batch_stride, o_head_stride, VECTOR)
    rows = pair.to(tl.int64) * queries
    q, do, lse, delta = _load_queries(
        q_head, do_head, o_head, lse_ptr + rows, m, queries, q_row_stride, q_dim_stride, do_row_stride,
        do_dim_stride, o_row_stride, OWN, BLOCK_D, HEAD_DIM,
    )  # fmt: skip
    row = m + tl.arange(0, OWN)
    tl.store(delta_ptr + rows + row, delta, row < queries)
    dq = tl.zeros((OWN, BLOCK_D), tl.float32)
    for n in range(0, keys, OTHER):
        k = load_rows(
            k_ptr, pair, heads, n, keys, k_batch_stride, k_row_stride, k_head_stride, k_dim_stride,
            OTHER, BLOCK_D, HEAD_DIM, VECTOR, DESCRIBED,
        )  # fmt: skip
        v = load_rows(
            v_ptr, pair, heads, n, keys, v_batch_stride, v_row_stride, v_head_stride, v_dim_stride,
            OTHER, BLOCK_D, HEAD_DIM, VECTOR, DESCRIBED,
        )  # fmt: skip
        _, ds = score_gradient(q, k, v, do, lse, delta, scale, n, keys, OTHER, PRECISION)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dq_head = head_of(dq_ptr, pair, heads, dq_batch_stride, dq_head_stride, VECTOR)
    store_tile(dq_head, dq * gradient_scale, m, queries, dq_row_stride, OWN, BLOCK_D, HEAD_DIM)


@triton.jit
def _attention_bwd_keys_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    do_batch_stride, do_row_stride, do_head_stride, do_dim_stride,
    q_batch_stride, q_row_stride, q_head_stride, q_dim_stride,
    k_batch_stride, k_row_stride, k_head_stride, k_dim_stride,
    v_batch_stride, v_row_stride, v_head_stride, v_dim_stride,
    dk_batch_stride, dk_row_stride, dk_head_stride, heads, queries, keys, scale, gradient_scale,
    OWN: tl.constexpr, OTHER: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys. If DESCRIBED, q and do are descriptors."""
    pair, n = tl.program_id(0), tl.program_id(1) * OWN
    k_head = head_of(k_ptr, pair, heads, k_batch_stride, k_head_stride, VECTOR)
    v_head = head_of(v_ptr, pair, heads, v_batch_stride, v_head_stride, VECTOR)
    rows = pair.to(tl.int64) * queries
    k = load_tile(k_head, n, keys, k_row_stride, k_dim_stride, OWN, BLOCK_D, HEAD_DIM)
    v = load_tile(v_head, n, keys, v_row_stride, v_dim_stride, OWN, BLOCK_D, HEAD_DIM)
    dk = tl.zeros((OWN, BLOCK_D), tl.float32)
    dv = tl.zeros((OWN, BLOCK_D), tl.float32)
    for m in range(0, queries, OTHER):
        q = load_rows(
            q_ptr, pair, heads, m, queries, q_batch_stride, q_row_stride, q_head_stride, q_dim_stride,
            OTHER, BLOCK_D, HEAD_DIM, VECTOR, DESCRIBED,
        )  # fmt: skip
        do = load_rows(
            do_ptr, pair, heads, m, queries, do_batch_stride, do_row_stride, do_head_stride, do_dim_stride,
            OTHER, BLOCK_D, HEAD_DIM, VECTOR, DESCRIBED,
        )  # fmt: skip
        row = m + tl.arange(0, OTHER)
        lse = tl.load(lse_ptr + rows + row, row < queries, float("inf"))
        delta = tl.load(delta_ptr + rows + row, row < queries, 0.0)
        p, ds = score_gradient_of_keys(
            q, k, v, do, lse, delta, scale, m, queries, keys, OTHER, OWN, BLOCK_D, PRECISION, False
        )
        dv = tl.dot(p, do, dv, input_precision=PRECISION)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    dk_head = head_of(dk_ptr, pair, heads, dk_batch_stride, dk_head_stride, VECTOR)
    dv_head = head_of(dv_ptr, pair, heads, dk_batch_stride, dk_head_stride, VECTOR)
    store_tile(dk_head, dk * gradient_scale, n, keys, dk_row_stride, OWN, BLOCK_D, HEAD_DIM)
    store_tile(dv_head, dv, n, keys, dk_row_stride, OWN, BLOCK_D, HEAD_DIM)
