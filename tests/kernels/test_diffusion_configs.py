"""Which tiles problems of noise-schedule sampling get: unmeasured, and as candidates for a measurement."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from soda_kernels.diffusion.checks import check_key
from soda_kernels.diffusion.config import Problem, TileConfig, candidates, choose, heuristic


def problem(batch: int, positions: int, channels: int = 1, **options: Any) -> Problem:
    return Problem(
        kernel="k", batch=batch, positions=positions, channels=channels, element_bytes=(1, 2), **options
    )  # fmt: skip


def test_tiles_fill_the_chip_or_grow() -> None:
    assert heuristic(problem(1, 3 * 32 * 32)).positions == 1024
    assert heuristic(problem(256, 3 * 64 * 64)).positions == 8192
    wide, step = heuristic(problem(64, 32 * 32, 256)), heuristic(problem(64, 32 * 32, 256, many_registers=True))
    assert wide.channels == 64 and wide.positions * wide.channels == 8192
    assert step.channels == 64 and step.positions * step.channels == 4096


def test_tiles_are_large_beside_their_scalars() -> None:
    """Where samples are few tiles stay larger for them; of a small sample's sum a program takes two."""

    def chosen(batch: int, elements: int, **options: Any) -> tuple[int, int]:
        config = heuristic(problem(batch, elements, moved=2, **options))
        return config.positions, config.samples

    assert chosen(1, 4 * 64 * 64, scalars=1) == (1024, 1)
    assert chosen(1, 4 * 64 * 64, scalars=2) == (2048, 1)
    assert chosen(1, 4 * 64 * 64, scalars=3, scalars_of_a_sample=2, sums=True) == (4096, 1)
    small = {"scalars": 3, "scalars_of_a_sample": 2}
    assert chosen(128, 3 * 32 * 32, **small, sums=True) == (4096, 2)
    assert chosen(127, 3 * 32 * 32, **small, sums=True) == chosen(128, 3 * 32 * 32, **small) == (4096, 1)


def test_a_tile_holds_a_whole_sample_where_that_is_wanted_and_can_be() -> None:
    assert heuristic(problem(256, 4 * 64 * 64, draws=False, whole=True)).positions == 4 * 64 * 64
    assert heuristic(problem(256, 4 * 64 * 64, draws=False)).positions == 8192
    for draws, channels in ((True, 4), (False, 5)):
        assert heuristic(problem(256, channels * 64 * 64, draws=draws, whole=True)).walkers == 1


def test_programs_that_walk_over_a_sample() -> None:
    """One of samples up to 49152 elements, and where that leaves little of the chip idle; else a launch before."""

    def walkers(batch: int, elements: int, draws: bool = True) -> int:
        return heuristic(problem(batch, elements, whole=True, draws=draws)).walkers

    assert [walkers(batch, 3 * 64 * 64) for batch in (1, 64, 132, 256)] == [1, 1, 1, 1]
    assert [walkers(batch, 4 * 64 * 64) for batch in (1, 32)] == [1, 1]
    assert [walkers(batch, 3 * 128 * 128) for batch in (1, 16)] == [1, 1]
    assert walkers(16, 3 * 128 * 128, draws=False) == 1
    assert [walkers(batch, 3 * 256 * 256) for batch in (8, 132, 140)] == [0, 1, 0]
    assert heuristic(problem(16, 3 * 128 * 128)).walkers == 0


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 24, 256])
def test_candidates_are_valid_and_have_the_heuristics_choice(channels: int, whole: bool) -> None:
    for batch in (1, 64):
        for positions in (1, 63, 1024, 12288):
            each = problem(batch, positions, channels, whole=whole)
            tiles = list(candidates(each))
            assert heuristic(each) in tiles and len(set(tiles)) == len(tiles)
            for tile in tiles:
                assert tile.positions % 4 == 0 and 1 <= tile.num_warps <= 32
                numbers = (tile.positions, tile.channels, tile.num_warps)
                assert all(number & (number - 1) == 0 for number in numbers)  # powers of two


def test_a_tuned_tile_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def look_up(family: str, key: str, device: torch.device) -> dict[str, int] | None:
        asked.append(f"{family} {key}")
        return {"positions": 8, "channels": 1, "num_warps": 2} if "c1-" in key else None

    monkeypatch.setattr("soda_kernels._tuning.look_up", look_up)
    device = torch.device("cpu")
    assert choose(problem(100, 1024), device) == TileConfig(positions=8, channels=1, num_warps=2)
    assert choose(problem(100, 1024, 3), device) == heuristic(problem(100, 1024, 3))
    assert asked == ["diffusion k-8+16bit-n128-c1-p1024", "diffusion k-8+16bit-n128-c3-p1024"]


def test_a_gpus_seed_and_step_share_a_sector() -> None:
    """Where they come as ints; tensors are taken as they lie."""
    x = torch.empty(2, 3, device="meta")
    seed, _, step = check_key(x, 1, torch.empty(2, dtype=torch.int64, device="meta"), 2)
    assert seed.untyped_storage()._cdata == step.untyped_storage()._cdata
    assert (seed.storage_offset(), step.storage_offset()) == (0, 1)
