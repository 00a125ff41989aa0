"""What the attention kernels share: tiles of strided heads, and the formulas of one block of scores.

Tiles are [rows, BLOCK_D] with BLOCK_D a power of two; what lies beyond a tensor's rows or its HEAD_DIM is loaded as 0.
Offsets of a batch and a head are 64 bits wide, those inside one head 32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def head_of(pointer, pair, heads, batch_stride, head_stride, VECTOR: tl.constexpr):
    """Return where the head begins that is number `pair` of batch * heads, a multiple of VECTOR elements away."""
    offset = (pair // heads).to(tl.int64) * batch_stride + (pair % heads).to(tl.int64) * head_stride
    return pointer + tl.multiple_of(offset, VECTOR)


@triton.jit
def tile(head_ptr, first, row_stride, dim_stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return pointers to [ROWS, BLOCK_D] from row `first` of a head on."""
    rows = first + tl.arange(0, ROWS)
    return head_ptr + rows[:, None] * row_stride + tl.arange(0, BLOCK_D)[None, :] * dim_stride


@triton.jit
def inside(first, length, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return the mask of a tile of a head with `length` rows."""
    rows = first + tl.arange(0, ROWS)
    return (rows[:, None] < length) & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)


@triton.jit
def load_tile(
    head_ptr, first, length, row_stride, dim_stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Load [ROWS, BLOCK_D] of a head."""
    mask = inside(first, length, ROWS, BLOCK_D, HEAD_DIM)
    return tl.load(tile(head_ptr, first, row_stride, dim_stride, ROWS, BLOCK_D), mask, 0.0)


@triton.jit
def load_rows(
    source, pair, heads, first, length, batch_stride, row_stride, head_stride, dim_stride, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Load [ROWS, BLOCK_D] of head number `pair` from a pointer, or if DESCRIBED from a descriptor of [B, T, H, D].

    A descriptor is read by the copy engine of a GPU that has one: a block takes no registers and no address arithmetic.
    """
    if DESCRIBED:
        return source.load([pair // heads, first, pair % heads, 0]).reshape(ROWS, BLOCK_D)
    else:
        head = head_of(source, pair, heads, batch_stride, head_stride, VECTOR)
        return load_tile(head, first, length, row_stride, dim_stride, ROWS, BLOCK_D, HEAD_DIM)


@triton.jit
def store_tile(
    head_ptr, value, first, length, row_stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Store [ROWS, BLOCK_D] in a head whose numbers lie together."""
    mask = inside(first, length, ROWS, BLOCK_D, HEAD_DIM)
    tl.store(tile(head_ptr, first, row_stride, 1, ROWS, BLOCK_D), value.to(head_ptr.dtype.element_ty), mask)


@triton.jit
def scores(q, k, scale, first_key, keys, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """Return scale * q k^T, minus infinity for keys that do not exist."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    return tl.where((first_key + tl.arange(0, BLOCK_N) < keys)[None, :], s, float("-inf"))


@triton.jit
def score_gradient(
    q, k, v, do, lse, delta, scale, first_key, keys, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Return P = exp(S - lse) and dS = P (dO V^T - delta), [queries, keys].

    S is rounded as in the forward, and the logarithm's base changed after the difference, which is small where P is
    not: in fp32, roundings before it would be twice the error of a softmax.
    """
    s = scores(q, k, scale, first_key, keys, BLOCK_N, PRECISION)
    p = tl.exp2((s - lse[:, None]) * LOG2_E)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    return p, p * (dp - delta[:, None])


@triton.jit
def score_gradient_of_keys(
    q, k, v, do, lse, delta, scale, first_query, queries, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ALL_KEYS: tl.constexpr,
):  # fmt: skip
    """Return P and dS as `score_gradient`, [keys, queries] and in the inputs' dtype, for the keys' gradients.

    A row is a key: with 64 of them the products are those of a warp group, and none is transposed. Of heads over 128
    wide that would spill, and they are formed as rows of queries. Keys that do not exist get values, which nobody
    stores. With ALL_KEYS here delta is formed from P: the sum of o do has the rounding of o, which shows where a row of
    P is nearly one-hot.
    """
    # Beyond the queries lse is infinite; there 0 times an infinite key would be NaN.
    exists = first_query + tl.arange(0, BLOCK_M) < queries
    if BLOCK_D > 128:
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        p = tl.where(exists[:, None], tl.exp2((s - lse[:, None]) * LOG2_E), 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        return tl.trans(p.to(do.dtype)), tl.trans(ds.to(q.dtype))
    else:
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        p = tl.where(exists[None, :], tl.exp2((s - lse[None, :]) * LOG2_E), 0.0)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if ALL_KEYS:
            p = tl.where((tl.arange(0, BLOCK_N) < keys)[:, None], p, 0.0)
            delta = tl.sum(p * dp, axis=0)
        return p.to(do.dtype), (p * (dp - delta[None, :])).to(q.dtype)
