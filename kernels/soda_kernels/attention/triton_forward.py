"""Forward attention: with the whole row of scores on chip, or block by block with an online softmax.

Reference: Dao et al. 2022 and Dao 2023 (FlashAttention, FlashAttention-2) for the online softmax and its lse.
"""

from __future__ import annotations

import triton
import triton.language as tl

from soda_kernels.attention.triton_device import LOG2_E, head_of, load_rows, load_tile, scores, store_tile


@triton.jit
def _attention_fwd_whole_row_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    q_batch_stride, q_row_stride, q_head_stride, q_dim_stride,
    k_batch_stride, k_row_stride, k_head_stride, k_dim_stride,
    v_batch_stride, v_row_stride, v_head_stride, v_dim_stride,
    o_batch_stride, o_row_stride, o_head_stride,
    heads, num_pairs, queries, keys, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr, QUERY_BLOCKS: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PAIRS heads after one another; of each, K and V once, and QUERY_BLOCKS blocks of queries."""
    first_pair = tl.program_id(0) * PAIRS
    first_query = tl.program_id(1) * (QUERY_BLOCKS * BLOCK_M)
    for index in range(PAIRS):
        pair = first_pair + index
        if pair < num_pairs:
            q_head = head_of(q_ptr, pair, heads, q_batch_stride, q_head_stride, VECTOR)
            o_head = head_of(o_ptr, pair, heads, o_batch_stride, o_head_stride, VECTOR)
            k_head = head_of(k_ptr, pair, heads, k_batch_stride, k_head_stride, VECTOR)
            v_head = head_of(v_ptr, pair, heads, v_batch_stride, v_head_stride, VECTOR)
            k = load_tile(k_head, 0, keys, k_row_stride, k_dim_stride, BLOCK_N, BLOCK_D, HEAD_DIM)
            v = load_tile(v_head, 0, keys, v_row_stride, v_dim_stride, BLOCK_N, BLOCK_D, HEAD_DIM)
            for m in range(first_query, tl.minimum(first_query + QUERY_BLOCKS * BLOCK_M, queries), BLOCK_M):
                q = load_tile(q_head, m, queries, q_row_stride, q_dim_stride, BLOCK_M, BLOCK_D, HEAD_DIM)
                s = scores(q, k, scale, 0, keys, BLOCK_N, PRECISION)
                highest = tl.max(s, axis=1)
                p = tl.exp2((s - highest[:, None]) * LOG2_E)
                total = tl.sum(p, axis=1)
                o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / total[:, None]
                store_tile(o_head, o, m, queries, o_row_stride, BLOCK_M, BLOCK_D, HEAD_DIM)
                row = m + tl.arange(0, BLOCK_M)
                lse = highest + tl.log(total)
                tl.store(lse_ptr + pair.to(tl.int64) * queries + row, lse, row < queries)


@triton.jit
def _attention_fwd_online_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    q_batch_stride, q_row_stride, q_head_stride, q_dim_stride,
    k_batch_stride, k_row_stride, k_head_stride, k_dim_stride,
    v_batch_stride, v_row_stride, v_head_stride, v_dim_stride,
    o_batch_stride, o_row_stride, o_head_stride,
    heads, num_pairs, queries, keys, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr,
    VECTOR: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head against all keys, in blocks. If DESCRIBED, q, k and v are descriptors."""
    pair, m = tl.program_id(0), tl.program_id(1) * BLOCK_M
    q = load_rows(
        q_ptr, pair, heads, m, queries, q_batch_stride, q_row_stride, q_head_stride, q_dim_stride,
        BLOCK_M, BLOCK_D, HEAD_DIM, VECTOR, DESCRIBED,
    )  # fmt: skip
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    o = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n in range(0, keys, BLOCK_N):  # the first block has a key, so that `highest` is finite after it
        k = load_rows(
            k_ptr, pair, heads, n, keys, k_batch_stride, k_row_stride, k_head_stride, k_dim_stride,
            BLOCK_N, BLOCK_D, HEAD_DIM, VECTOR, DESCRIBED,
        )  # fmt: skip
        s = scores(q, k, scale, n, keys, BLOCK_N, PRECISION)
        higher = tl.maximum(highest, tl.max(s, axis=1))
        shrink = tl.exp2((highest - higher) * LOG2_E)
        p = tl.exp2((s - higher[:, None]) * LOG2_E)
        total = total * shrink + tl.sum(p, axis=1)
        v = load_rows(
            v_ptr, pair, heads, n, keys, v_batch_stride, v_row_stride, v_head_stride, v_dim_stride,
            BLOCK_N, BLOCK_D, HEAD_DIM, VECTOR, DESCRIBED,
        )  # fmt: skip
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
        highest = higher
    o_head = head_of(o_ptr, pair, heads, o_batch_stride, o_head_stride, VECTOR)
    store_tile(o_head, o / total[:, None], m, queries, o_row_stride, BLOCK_M, BLOCK_D, HEAD_DIM)
    row = m + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + pair.to(tl.int64) * queries + row, highest + tl.log(total), row < queries)
