"""Small kernels with one planted defect each, beside twins that are right."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    """Copy a block a program."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = index < numel
    tl.store(y_ptr + index, tl.load(x_ptr + index, mask=active), mask=active)


@triton.jit
def copy_or_clear(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    """Copy a block a program, or clear it where there is nothing to copy."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if x_ptr is None:
        x = tl.zeros([BLOCK], y_ptr.dtype.element_ty)
    else:
        x = tl.load(x_ptr + index, mask=index < numel)
    tl.store(y_ptr + index, x, mask=index < numel)


@triton.jit
def copy_reading_past_the_end(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    """Defect: the mask of the load lets one element too many through."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + index, tl.load(x_ptr + index, mask=index <= numel), mask=index < numel)


@triton.jit
def copy_writing_past_the_end(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    """Defect: the mask of the store lets one element too many through."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + index, tl.load(x_ptr + index, mask=index < numel, other=0), mask=index <= numel)


@triton.jit
def copy_leaving_the_tail(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    """Defect: the last element is never written."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = index < numel - 1
    tl.store(y_ptr + index, tl.load(x_ptr + index, mask=active), mask=active)


@triton.jit
def copy_overlapping(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    """Defect: neighbouring programs both write one element."""
    index = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    active = index < numel
    tl.store(y_ptr + index, tl.load(x_ptr + index, mask=active), mask=active)


@triton.jit
def copy_into_the_input(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    """Defect: the input is cleared."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = index < numel
    tl.store(y_ptr + index, tl.load(x_ptr + index, mask=active), mask=active)
    tl.store(x_ptr + index, tl.zeros([BLOCK], x_ptr.dtype.element_ty), mask=active)


@triton.jit
def copy_rows(x_ptr, y_ptr, stride_x, stride_y, num_columns, BLOCK: tl.constexpr):
    """Copy a row a program; rows may lie apart."""
    column = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    active = column < num_columns
    tl.store(y_ptr + row * stride_y + column, tl.load(x_ptr + row * stride_x + column, mask=active), mask=active)


@triton.jit
def sum_blocks(x_ptr, partial_ptr, numel, BLOCK: tl.constexpr):
    """Write the sum of a block a program to a workspace."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < numel, other=0).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(x))


@triton.jit
def fold(partial_ptr, y_ptr, num_partials, BLOCK: tl.constexpr):
    """Add the partial sums up."""
    index = tl.arange(0, BLOCK)
    tl.store(y_ptr, tl.sum(tl.load(partial_ptr + index, mask=index < num_partials, other=0)))


@triton.jit
def sum_and_fold(x_ptr, partial_ptr, y_ptr, numel, num_partials, BLOCK: tl.constexpr):
    """Defect: the last program folds what other programs of the same launch write, with nothing to order them."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < numel, other=0).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(x))
    if tl.program_id(0) == num_partials - 1:
        partials = tl.arange(0, BLOCK)
        tl.store(y_ptr, tl.sum(tl.load(partial_ptr + partials, mask=partials < num_partials, other=0)))


@triton.jit
def shift_in_place(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    """Defect: each program reads the first element of the next program's block, which that program will write."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = index < numel - 1
    tl.store(y_ptr + index, tl.load(y_ptr + index + 1, mask=active) + tl.load(x_ptr + index, mask=active), mask=active)


@triton.jit
def share_then_clear(shared_ptr, y_ptr):
    """Defect: every program reads a number that the last one then clears, though it may well run first."""
    tl.store(y_ptr + tl.program_id(0), tl.load(shared_ptr))
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(shared_ptr, 0.0)


@triton.jit
def sum_atomically(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    """Defect: the order in which programs add is left to chance."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + index, mask=index < numel, other=0).to(tl.float32)))


@triton.jit
def copy_twice(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    """Read a block twice in one program."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = index < numel
    first = tl.load(x_ptr + index, mask=active)
    tl.store(y_ptr + index, (first + tl.load(x_ptr + index, mask=active)) / 2, mask=active)


@triton.jit
def scale_by_first(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Copy without masks, times a scalar that every program reads."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + index, tl.load(x_ptr + index) * tl.load(x_ptr))


@triton.jit
def copy_described(x_ptr, y_ptr, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Copy by tensor descriptors, which mask what lies outside the tensor by themselves."""
    x = tl.make_tensor_descriptor(x_ptr, [num_rows, num_columns], [num_columns, 1], [ROWS, COLUMNS])
    y = tl.make_tensor_descriptor(y_ptr, [num_rows, num_columns], [num_columns, 1], [ROWS, COLUMNS])
    y.store([tl.program_id(0) * ROWS, 0], x.load([tl.program_id(0) * ROWS, 0]))


@triton.jit
def gather_even(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    """Defect: a stride of two between lanes leaves one element an access."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = index < numel
    tl.store(y_ptr + index, tl.load(x_ptr + 2 * index, mask=active), mask=active)


@triton.jit
def _load_scalar(pointer):
    return tl.load(pointer)


@triton.jit
def scale_selected(x_ptr, scale_ptr, y_ptr, half, repeats, BLOCK: tl.constexpr):
    """Scale blocks, in place where they belong to the second half."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.where(index < half, x_ptr + index, y_ptr + index)
    pointer = scale_ptr + tl.program_id(0)
    x = tl.load(source)
    for _ in range(repeats):
        x *= _load_scalar(pointer).to(x.dtype)
        pointer += 1
    tl.store(y_ptr + index, x)


@triton.jit
def normalize(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    """Hold a block in registers, take its mean and standard deviation, write the normalized block."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = index < numel
    x = tl.load(x_ptr + index, mask=active, other=0).to(tl.float32)
    centred = tl.where(active, x - tl.sum(x) / BLOCK, 0)
    rstd = tl.rsqrt(tl.sum(centred * centred) / BLOCK + 1e-5)
    tl.store(y_ptr + index, (centred * rstd).to(y_ptr.dtype.element_ty), mask=active)


@triton.jit
def multiply(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Multiply two matrices in one program, in the precision of their dtype."""
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a, b = tl.load(a_ptr + m * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n)
    tl.store(c_ptr + m * N + n, tl.dot(a, b, input_precision="ieee"))
