"""The byte meter counts what known kernels move, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from soda_kernels._launch import Launch, Plan
from tests.harness import planted_triton as planted
from tests.harness.interpreter import is_interpreting
from tests.harness.traffic import TensorTraffic, meter, metered

pytestmark = pytest.mark.skipif(not is_interpreting(), reason="Triton compiles here: set TRITON_INTERPRET=1")


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: int) -> Launch:
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    return Launch(kernel=kernel, grid=grid, arguments=named, constants=constants, num_warps=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8], ids=str)
def test_a_masked_copy_moves_each_byte_once(dtype: torch.dtype) -> None:
    x = torch.arange(1000).to(dtype)
    y = torch.zeros_like(x)
    traffic = meter(launch(planted.copy, (4,), x, y, 1000, BLOCK=256))
    size = 1000 * dtype.itemsize
    sectors = -(-size // 32)  # programs begin at multiples of 256 elements, so no sector is shared
    assert traffic.launches[0].tensors == {
        "x_ptr": TensorTraffic(loaded_bytes=size, loaded_sectors=sectors),
        "y_ptr": TensorTraffic(stored_bytes=size, stored_sectors=sectors),
    }
    assert (traffic.bytes_moved, traffic.bytes_dram) == (2 * size, 64 * sectors)
    assert torch.equal(x, y)


def test_a_read_repeated_in_one_program_moves_twice_and_is_fetched_once() -> None:
    x = torch.randn(512)
    once = meter(launch(planted.copy, (2,), x, torch.empty(512), 512, BLOCK=256))
    twice = meter(launch(planted.copy_twice, (2,), x, torch.empty(512), 512, BLOCK=256))
    assert twice.bytes_moved == once.bytes_moved + 2048
    assert twice.bytes_dram == once.bytes_dram == 4096


def test_a_read_by_two_programs_is_fetched_twice() -> None:
    x, y = torch.randn(512), torch.empty(512)
    loaded = meter(launch(planted.copy, (4,), x, y, 256, BLOCK=128)).launches[0].tensors["x_ptr"].loaded_sectors
    # The same 128 elements for each of four programs: a stride of zero between rows.
    repeated = meter(launch(planted.copy_rows, (4,), x, y, 0, 128, 128, BLOCK=128)).launches[0].tensors["x_ptr"]
    assert loaded == 32 and repeated.loaded_sectors == 4 * 16 and repeated.loaded_bytes == 4 * 512


def test_one_lane_of_a_sector_costs_all_of_it() -> None:
    x, y = torch.randn(2048).half(), torch.empty(1024).half()
    traffic = meter(launch(planted.gather_even, (4,), x, y, 1024, BLOCK=256)).launches[0].tensors
    assert traffic["x_ptr"] == TensorTraffic(loaded_bytes=2048, loaded_sectors=4096 // 32)
    assert traffic["y_ptr"] == TensorTraffic(stored_bytes=2048, stored_sectors=2048 // 32)


def test_scalars_and_accesses_without_masks_count() -> None:
    x, y = torch.randn(256), torch.empty(256)
    traffic = meter(launch(planted.scale_by_first, (2,), x, y, BLOCK=128)).launches[0].tensors
    # 32 sectors of blocks, and the first sector once more for the second program.
    assert traffic["x_ptr"] == TensorTraffic(loaded_bytes=1024 + 2 * 4, loaded_sectors=33)
    assert traffic["y_ptr"] == TensorTraffic(stored_bytes=1024, stored_sectors=32)
    assert torch.equal(y, x * x[0])


def test_tensor_descriptors_count() -> None:
    x, y = torch.randn(6, 24), torch.empty(6, 24)
    traffic = meter(launch(planted.copy_described, (2,), x, y, 6, 24, ROWS=4, COLUMNS=32)).launches[0].tensors
    assert traffic["x_ptr"] == TensorTraffic(loaded_bytes=576, loaded_sectors=18)
    assert traffic["y_ptr"] == TensorTraffic(stored_bytes=576, stored_sectors=18)
    assert torch.equal(x, y)


def test_atomics_count_as_a_load_and_a_store() -> None:
    x, y = torch.randn(256), torch.zeros(1)
    traffic = meter(launch(planted.sum_atomically, (2,), x, y, 256, BLOCK=128)).launches[0].tensors
    assert traffic["y_ptr"] == TensorTraffic(loaded_bytes=8, stored_bytes=8, loaded_sectors=2, stored_sectors=2)


def test_interleaved_views_of_one_storage_are_told_apart() -> None:
    both = torch.randn(4, 2, 16)
    scale, shift = both[:, 0], both[:, 1]
    traffic = meter(launch(planted.copy_rows, (4,), scale, shift, 32, 32, 16, BLOCK=16)).launches[0].tensors
    assert traffic["x_ptr"] == TensorTraffic(loaded_bytes=256, loaded_sectors=8)
    assert traffic["y_ptr"] == TensorTraffic(stored_bytes=256, stored_sectors=8)


def test_every_axis_of_the_grid_counts_as_programs() -> None:
    x = torch.randn(16)
    traffic = meter(launch(planted.copy, (1, 2, 3), x, torch.empty(16), 16, BLOCK=16))
    assert traffic.launches[0].num_programs == 6
    assert traffic.bytes_dram == 6 * 128


def test_launches_add_up_in_order() -> None:
    x, partial, y = torch.randn(1000), torch.empty(4), torch.empty(())
    first = launch(planted.sum_blocks, (4,), x, partial, 1000, BLOCK=256)
    second = launch(planted.fold, (1,), partial, y, 4, BLOCK=16)
    traffic = meter(Plan(launches=(first, second), outputs=(y,), config=None))
    assert [item.kernel for item in traffic.launches] == ["sum_blocks", "fold"]
    assert [item.bytes_moved for item in traffic.launches] == [4000 + 16, 16 + 4]
    assert [item.bytes_dram for item in traffic.launches] == [4000 + 4 * 32, 32 + 32]
    assert (traffic.bytes_moved, traffic.bytes_dram) == (4036, 4192)
    assert torch.allclose(y, x.sum(), rtol=1e-4)
    assert "partial_ptr" in str(traffic)


def test_nothing_is_watched_after_the_context() -> None:
    x, y = torch.randn(16), torch.empty(16)
    with metered() as traffic:
        launch(planted.copy, (1,), x, y, 16, BLOCK=16).run()
    launch(planted.copy, (1,), x, y, 16, BLOCK=16).run()
    assert len(traffic.launches) == 1
    with metered(), pytest.raises(RuntimeError, match="already watching"), metered():
        pass
