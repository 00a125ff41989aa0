"""What a training step would launch and move on a GPU, counted where the answer can be worked out by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.training.launches import LEAST_US, Launches, multi_tensor_launches
from benchmarks.training.optimizer import rows
from benchmarks.training.phases import gpu_rows
from benchmarks.training.saved import block_rows, saved_by_way
from soda_engine.presets import PRESETS
from soda_engine.roofline.step import count_step
from tests.harness.host_sync import HostSyncError


def test_bytes_are_inputs_read_and_outputs_written() -> None:
    x, row = torch.empty(1000, 8, device="meta"), torch.empty(8, device="meta")
    with Launches() as counted:
        y = x * row  # reads 32000 + 32, writes 32000
        y.add_(row.expand(1000, 8))  # the same, since an expanded tensor is as small as what it repeats
        y.view(8, 1000).t()  # nothing
    assert (counted.launches, counted.num_bytes) == (2, 2 * (32000 + 32 + 32000))
    assert counted.us == 2 * LEAST_US


def test_flops_and_the_time_of_a_large_product() -> None:
    a, b = torch.empty(4096, 4096, device="meta"), torch.empty(4096, 4096, device="meta")
    with Launches() as counted:
        a @ b
    assert counted.flops == 2 * 4096**3
    assert counted.us == pytest.approx(1e6 * 2 * 4096**3 / 790e12)


def test_waiting_is_an_error() -> None:
    with Launches(), pytest.raises((HostSyncError, RuntimeError)):
        torch.empty(3, device="meta").sum().item()


@pytest.mark.parametrize(
    ("sizes", "lists", "launches"),
    [
        ([10] * 110, 1, 1), ([10] * 111, 1, 2), ([10] * 36, 4, 1), ([10] * 73, 4, 3), ([65536 * 320], 2, 1),
        ([65536 * 320 + 1], 2, 2), ([65536 * 200] * 3, 2, 2),
    ],
)  # fmt: skip
def test_lists_of_tensors_go_in_few_launches(sizes: list[int], lists: int, launches: int) -> None:
    tensors = [torch.empty(size, device="meta") for size in sizes]
    assert multi_tensor_launches([tensors] * lists) == launches


def test_ways_to_step_an_optimizer() -> None:
    units = {row["way"]: row["units"] for row in rows("digits", seconds=0)}
    # Norm 1, step 4 + 3, clip 1 + 1, average 2 + 1; the engine's clip writes gradients and is no pass of its own.
    assert units["fused AdamW, clip and EMA foreach"] == pytest.approx(13, rel=0.01)
    assert units["engine: fused AdamW with clip, fused EMA"] == pytest.approx(12, rel=0.01)
    assert units["for-loop"] > units["fused AdamW, clip and EMA foreach"]


def test_the_engines_model_of_a_step_agrees() -> None:
    """It attributes the same counts to layers, and has a formula for the optimizer, whose code runs here."""
    costs = count_step(PRESETS["digits"], batch_size=PRESETS["digits"].batch_size, dtype="bf16")
    for row in gpu_rows(PRESETS["digits"]):
        phase = {"optimizer, EMA": "optimizer"}.get(row["phase"], row["phase"])
        work = [each for each in costs.work if each.phase == phase and each.kind != "casts"]
        assert sum(each.flops for each in work) == row["flops"]
        # Scalars and batch norms' statistics are left out of the formula.
        few = 0.03 if phase == "optimizer" else 0
        assert sum(each.num_bytes for each in work) == pytest.approx(row["bytes"], rel=few)


def test_what_blocks_keep_for_the_backward() -> None:
    preset = PRESETS["digits"]
    *rows, total, held = block_rows(saved_by_way(preset, batch_size=64))
    blocks = {row["block"]: row for row in rows}
    assert total["engine_bytes"] < total["copies_bytes"] < 0.7 * total["eager_bytes"]
    channels, side = preset.model.denoiser.channels, preset.model.denoiser.image_size
    large, small = 2 * 64 * channels * side**2, 2 * 64 * 2 * channels * (side // 2) ** 2
    conv = 2 * 9 * (2 * channels) ** 2
    # A block without attention keeps four images: the sum it begins with, and what two norms and the first convolution
    # returned. The rest is no image: casts of weights, modulations, statistics.
    images = blocks["denoiser.middle.1"]["engine_bytes"] - 2 * conv
    assert 4 * small < images < 5 * small
    saved = {name: blocks[name]["copies_bytes"] - blocks[name]["engine_bytes"] for name in blocks}
    # The block that halves: what its first norm returned. The one that doubles: a copy four times as large as that,
    # beside the cast of a weight, which the list does not see where an image is made again.
    expected = {"denoiser.down.1": large, "denoiser.up.2": 4 * small + conv}
    assert {name: size for name, size in saved.items() if size} == expected
    # Nor does it see the image from which the copy is made.
    assert held["copies_bytes"] - held["engine_bytes"] == large + 3 * small
    assert held["eager_bytes"] > 1.4 * held["engine_bytes"]


def test_phases_of_a_step() -> None:
    found = {row["phase"]: row for row in gpu_rows(PRESETS["digits"])}
    assert list(found) == ["views", "forward", "backward", "optimizer, EMA"]
    assert sum(row["share"] for row in found.values()) == pytest.approx(1)
    assert found["backward"]["flops"] == pytest.approx(2 * found["forward"]["flops"], rel=0.1)
