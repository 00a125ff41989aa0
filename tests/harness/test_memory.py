"""The memory checker reports each planted defect, names its tensor, and passes the twins that are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from soda_kernels._launch import Launch, Plan
from tests.harness import planted_triton as planted
from tests.harness.interpreter import is_interpreting
from tests.harness.memory import check_memory

pytestmark = pytest.mark.skipif(not is_interpreting(), reason="Triton compiles here: set TRITON_INTERPRET=1")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: int) -> Launch:
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    return Launch(kernel=kernel, grid=grid, arguments=named, constants=constants, num_warps=4)


def found(launches: list[Launch], outputs: Any, inputs: Any) -> list[tuple[str, str, int]]:
    plan = Plan(launches=tuple(launches), outputs=tuple(outputs), config=None)
    return [(item.kind, item.tensor, item.count) for item in check_memory(plan, inputs)]


def copies(kernel: Any, dtype: torch.dtype = torch.float32) -> tuple[list[tuple[str, str, int]], Tensor, Tensor]:
    """Copy 1000 elements in 4 programs."""
    x = torch.ones(1000).to(dtype)
    y = torch.zeros_like(x)
    return found([launch(kernel, (4,), x, y, 1000, BLOCK=256)], [y], [x]), x, y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_copy_passes_and_arrives_in_the_output(dtype: torch.dtype) -> None:
    findings, x, y = copies(planted.copy, dtype)
    assert not findings
    assert torch.equal(x, y)


def test_a_load_past_the_end() -> None:
    assert copies(planted.copy_reading_past_the_end)[0] == [("out of bounds", "x_ptr", 4)]


def test_a_store_past_the_end() -> None:
    assert copies(planted.copy_writing_past_the_end)[0] == [("out of bounds", "y_ptr", 4)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_unwritten_tail(dtype: torch.dtype) -> None:
    findings, x, y = copies(planted.copy_leaving_the_tail, dtype)
    assert findings == [("unwritten output", "output 0", 1)]
    assert torch.equal(y[:-1], x[:-1])
    assert (y[-1:].view(torch.uint8) == 0xFF).all(), "what nobody wrote is not poisoned"


def test_an_output_that_no_kernel_knows() -> None:
    x, y, forgotten = torch.randn(16), torch.empty(16), torch.zeros(3, 2, dtype=torch.int32)
    findings = found([launch(planted.copy, (1,), x, y, 16, BLOCK=16)], [y, [torch.empty(0), forgotten]], [x])
    assert findings == [("unwritten output", "output 2", 6)]


def test_two_programs_that_write_one_element() -> None:
    # Four programs of 256 elements that advance by 255 meet three times.
    x, y = torch.randn(1000), torch.empty(1000)
    findings = found([launch(planted.copy_overlapping, (4,), x, y, 1000, BLOCK=256)], [y], [x])
    assert findings == [("write conflict", "y_ptr", 3 * 4)]


def test_two_programs_that_write_one_row() -> None:
    x, y = torch.randn(4, 16), torch.empty(16)
    findings = found([launch(planted.copy_rows, (4,), x, y, 16, 0, 16, BLOCK=16)], [y], [x])
    assert findings == [("write conflict", "y_ptr", 3 * 64)]


@pytest.mark.parametrize("grid", [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
def test_programs_of_every_axis_are_told_apart(grid: tuple[int, int, int]) -> None:
    x, y = torch.randn(16), torch.empty(16)
    two = launch(planted.copy_rows, grid, x, y, 0, 0, 16, BLOCK=16)
    assert found([two], [y], [x]) == [("write conflict", "y_ptr", 64)]


def test_atomics_are_conflicts() -> None:
    x, y = torch.randn(256), torch.zeros(1)
    findings = found([launch(planted.sum_atomically, (2,), x, y, 256, BLOCK=128)], [y], [x])
    assert ("write conflict", "y_ptr", 4) in findings
    assert ("unwritten read", "y_ptr", 4) in findings  # a sum that nobody has set to zero


def test_a_store_to_an_input() -> None:
    findings, x, _ = copies(planted.copy_into_the_input)
    assert findings == [("input written", "x_ptr", 4000)]
    assert x.eq(1).all(), "the caller's input was changed"


def sums(num_programs: int, num_folded: int, num_slots: int = 4) -> list[tuple[str, str, int]]:
    """Sum 1000 elements through a workspace."""
    x, partial, y = torch.randn(1000), torch.zeros(num_slots), torch.zeros(())
    first = launch(planted.sum_blocks, (num_programs,), x, partial, 1000, BLOCK=256)
    findings = found([first, launch(planted.fold, (1,), partial, y, num_folded, BLOCK=16)], [y], x)
    if not findings:
        torch.testing.assert_close(y, x.sum())
    return findings


def test_a_workspace_passes() -> None:
    assert not sums(num_programs=4, num_folded=4)


def test_a_read_of_a_workspace_that_nobody_wrote() -> None:
    assert sums(num_programs=3, num_folded=4) == [("unwritten read", "partial_ptr", 4)]


def test_a_workspace_too_small() -> None:
    assert sums(num_programs=4, num_folded=3, num_slots=3) == [("out of bounds", "partial_ptr", 4)]


def test_a_read_of_what_an_earlier_program_of_the_launch_wrote() -> None:
    x, partial, y = torch.randn(1000), torch.zeros(4), torch.zeros(())
    findings = found([launch(planted.sum_and_fold, (4,), x, partial, y, 1000, 4, BLOCK=256)], [y], [x])
    assert findings == [("race", "partial_ptr", 3 * 4)]


def test_a_read_of_what_a_later_program_of_the_launch_writes() -> None:
    x, y, zero = torch.randn(64), torch.empty(64), torch.zeros(64)
    clear = launch(planted.copy, (1,), zero, y, 64, BLOCK=64)
    findings = found([clear, launch(planted.shift_in_place, (4,), x, y, 64, BLOCK=16)], [y], [x, zero])
    assert findings == [("race", "y_ptr", 3 * 4)]


def test_a_write_to_what_several_other_programs_read() -> None:
    shared, y, zero = torch.empty(1), torch.empty(3), torch.zeros(1)
    clear = launch(planted.copy, (1,), zero, shared, 1, BLOCK=16)
    findings = found([clear, launch(planted.share_then_clear, (3,), shared, y)], [y], [zero])
    assert findings == [("race", "shared_ptr", 4)]


def test_an_access_out_of_bounds_is_not_carried_out() -> None:
    x, padded = torch.ones(4, 20), torch.zeros(4, 20)
    wide = launch(planted.copy_rows, (4,), x, padded[:, :16], 20, 20, 18, BLOCK=32)
    assert found([wide], [padded[:, :16]], [x]) == [("out of bounds", "y_ptr", 4 * 2 * 4)]
    assert padded[:, :16].eq(1).all() and padded[:, 16:].isnan().all()
    astray = launch(planted.copy_rows, (2,), x, padded[:, :16], 1 << 40, 20, 16, BLOCK=16)
    # So far out that which tensor is the nearest depends on where the system put them.
    ((kind, _, count),) = found([astray], [], [x])
    assert (kind, count) == ("out of bounds", 16 * 4)


def test_a_gap_between_rows_is_out_of_bounds() -> None:
    padded, y = torch.randn(4, 20), torch.empty(4, 16)
    right = launch(planted.copy_rows, (4,), padded[:, :16], y, 20, 16, 16, BLOCK=32)
    assert not found([right], [y], [padded])
    wide = torch.empty(4, 18)
    wrong = launch(planted.copy_rows, (4,), padded[:, :16], wide, 20, 18, 18, BLOCK=32)
    assert ("out of bounds", "x_ptr", 4 * 2 * 4) in found([wrong], [wide], [padded])


@pytest.mark.parametrize("stride", [16, -16])
def test_a_pointer_that_runs_on_past_other_tensors(stride: int) -> None:
    # 512 rows of 64 bytes cover whatever lies beside a small tensor: the checker keeps other tensors further away.
    x, y = torch.randn(16), torch.empty(512, 16)
    findings = found([launch(planted.copy_rows, (512,), x, y, stride, 16, 16, BLOCK=16)], [y], [x])
    assert findings == [("out of bounds", "x_ptr", 511 * 64)]


def test_an_expanded_input_and_a_transposed_output() -> None:
    row, y = torch.randn(1, 16).expand(4, 16), torch.empty(16, 4).t()
    findings = found([launch(planted.copy_rows, (4,), row, y, 0, 1, 1, BLOCK=1)], [y], [row])
    assert findings == [("unwritten output", "output 0", 60)]


def test_a_finding_reads_as_a_sentence() -> None:
    x, y = torch.randn(1000), torch.empty(1000)
    late = launch(planted.copy_reading_past_the_end, (4,), x, y, 1000, BLOCK=256)
    (finding,) = check_memory(Plan(launches=(late,), outputs=(y,), config=None), [x])
    sentence = "copy_reading_past_the_end: out of bounds: x_ptr: 4, first in program 3, 1000 elements from the start"
    assert str(finding) == sentence
