"""Sections of z, their pairing with blocks, their masks, and the time embedding."""

from __future__ import annotations

import math

import pytest
import torch

from soda_engine.config import DenoiserConfig
from soda_engine.models.modulation import (
    TimeEmbedding,
    build_section_map,
    draw_section_mask,
    mask_sections,
    section_indices,
    section_slices,
    sinusoidal_embedding,
)


@pytest.mark.parametrize(
    ("dim", "num_sections", "sizes"),
    [(8, 4, [2, 2, 2, 2]), (11, 4, [2, 2, 2, 5]), (128, 3, [42, 42, 44]), (3, 3, [1, 1, 1]), (5, 1, [5])],
)
def test_sections_are_equal_and_the_middle_takes_the_remainder(dim: int, num_sections: int, sizes: list[int]) -> None:
    slices = section_slices(dim, num_sections)
    assert [cut.stop - cut.start for cut in slices] == sizes
    assert [i for cut in slices for i in range(dim)[cut]] == list(range(dim))


def test_fewer_numbers_than_sections_are_refused() -> None:
    with pytest.raises(ValueError, match="latent dim is 3; it must be at least the number of sections, 4"):
        section_slices(3, 4)


# Two levels of one block: the down path is [block, resampling, block], the up path [block, block, resampling, block,
# block] where the resampling is a residual block, and takes the skips of [block, resampling], [block, input].
# Two levels of two blocks: down [0, 1, down 2, 3, 4], up [4, 3, 2, up 2, 1, 0, input 0].
MAPS = {
    "level-1x1": ("level", (1,), 1, True, (0,), (0, 0)),
    "level-2x1": ("level", (1, 2), 1, True, (0, 0, 1), (1, 1, 0, 0, 0)),
    "level-2x1-conv": ("level", (1, 2), 1, False, (0, 1), (1, 1, 0, 0)),
    "level-3x1": ("level", (1, 2, 2), 1, True, (0, 0, 1, 1, 2), (2, 2, 1, 1, 1, 0, 0, 0)),
    "block-1x2": ("block", (1,), 2, True, (0, 1), (1, 0, 0)),
    "block-2x1": ("block", (1, 2), 1, True, (0, 1, 2), (2, 1, 1, 0, 0)),
    "block-2x2": ("block", (1, 2), 2, True, (0, 1, 2, 3, 4), (4, 3, 2, 2, 1, 0, 0)),
    "block-2x2-conv": ("block", (1, 2), 2, False, (0, 1, 2, 3), (3, 2, 1, 1, 0, 0)),
}


@pytest.mark.parametrize("case", MAPS)
def test_section_map(case: str) -> None:
    pairing, multipliers, blocks, in_block, down, up = MAPS[case]
    config = DenoiserConfig(multipliers=multipliers, blocks=blocks, resample_in_block=in_block)
    section_map = build_section_map(config, pairing)
    assert (section_map.down, section_map.up) == (down, up)
    paired = len(multipliers) if pairing == "level" else len(down)
    assert section_map.names == (*(f"{pairing}{i}" for i in range(paired)), "middle")
    assert set(down) == set(up) == set(range(paired)), "each section but the middle's is on both paths"


def test_unknown_pairing_is_refused() -> None:
    with pytest.raises(ValueError, match="pairing is 'layer'; it must be 'level' or 'block'"):
        build_section_map(DenoiserConfig(), "layer")


def test_section_indices() -> None:
    names = ("level0", "level1", "middle")
    assert section_indices(["middle", 0, "level1"], names) == [2, 0, 1]
    for wrong in ("level2", 3, -1, True):
        with pytest.raises(ValueError, match=f"section {wrong!r} does not exist; it must be one of .*'middle'"):
            section_indices([wrong], names)


def test_mask_rates() -> None:
    num = 20_000
    mask = draw_section_mask(4, 0.2, 0.3, seed=1, sample_ids=torch.arange(num), step=0)
    assert mask.shape == (num, 4) and mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    kept, empty = 0.8 * 0.7, 0.2 + 0.8 * 0.3**4
    both = 0.8 * 0.7**2  # of two sections: the whole is dropped at once, each section on its own
    for share, expected in (
        *((mask[:, i].mean().item(), kept) for i in range(4)),
        ((mask.sum(1) == 0).float().mean().item(), empty),
        ((mask[:, 1] * mask[:, 3]).mean().item(), both),
    ):
        # five standard errors: a right mask fails one time in 1.7 million
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / num)


@pytest.mark.parametrize(("drop_all", "drop_section", "value"), [(0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)])
def test_mask_at_the_ends(drop_all: float, drop_section: float, value: float) -> None:
    mask = draw_section_mask(3, drop_all, drop_section, seed=0, sample_ids=torch.arange(100), step=0)
    assert (mask == value).all()


def test_mask_depends_on_seed_sample_and_step_alone() -> None:
    ids = torch.tensor([5, 1, 99, 1])
    steps = torch.tensor([0, 3, 2, 3])
    mask = draw_section_mask(40, 0.0, 0.5, seed=3, sample_ids=ids, step=steps)
    assert torch.equal(mask[1], mask[3])
    for row in range(3):
        alone = draw_section_mask(40, 0.0, 0.5, seed=3, sample_ids=ids[row : row + 1], step=int(steps[row]))
        assert torch.equal(alone[0], mask[row])
    for seed, step in ((4, 3), (3, 4)):
        assert not torch.equal(draw_section_mask(40, 0.0, 0.5, seed=seed, sample_ids=ids[1:2], step=step)[0], mask[1])
    assert draw_section_mask(40, 0.0, 0.5, seed=3, sample_ids=ids[:0], step=0).shape == (0, 40)


@pytest.mark.parametrize(("name", "values"), [("drop_all", (1.5, 0.0)), ("drop_section", (0.0, -0.1))])
def test_wrong_probability(name: str, values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {sum(values)}; it must be in \[0, 1\]"):
        draw_section_mask(3, *values, seed=0, sample_ids=torch.arange(2), step=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 3)], ids=str)
def test_mask_sections(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    slices = section_slices(8, 3)  # 2, 2, 4
    z = torch.randn(2, 8)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])[: shape[0] if len(shape) == 2 else 1].reshape(shape).to(dtype)
    expected = z.clone()
    expected[0, 2:4] = 0
    if shape == (2, 3):
        expected[1, 0:2] = 0
    else:
        expected[1, 2:4] = 0
    masked = mask_sections(z, mask, slices)
    assert masked.dtype == z.dtype and torch.equal(masked, expected)


@pytest.mark.parametrize("shape", [(2,), (3, 3), (2, 2), (1, 1, 3)], ids=str)
def test_wrong_mask_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"section_mask has shape .*; it must be \(3,\), \(1, 3\) or \(2, 3\)"):
        mask_sections(torch.randn(2, 8), torch.ones(shape), section_slices(8, 3))


def test_sinusoids_are_cosines_first_over_a_thousand_times_t() -> None:
    t = torch.tensor([0.0, 0.001, 0.5])
    expected = [
        [f(1000 * time * 10000 ** (-i / 4)) for f in (math.cos, math.sin) for i in range(4)] for time in t.tolist()
    ]
    torch.testing.assert_close(sinusoidal_embedding(t, 8), torch.tensor(expected), atol=1e-4, rtol=0)


def test_sinusoids_tell_neighbouring_steps_apart() -> None:
    steps = sinusoidal_embedding(torch.arange(1000) / 1000, 64)
    assert (steps[1:] - steps[:-1]).norm(dim=1).min() > 1.0
    unstretched = sinusoidal_embedding(torch.arange(1000) / 1000 / 1000, 64)
    assert (unstretched[1:] - unstretched[:-1]).norm(dim=1).max() < 0.01


@pytest.mark.parametrize("channels", [8, 7, 1])
def test_time_embedding(channels: int) -> None:
    embed = TimeEmbedding(channels, 12)
    out = embed(torch.tensor([0.25, 0.25, 0.75]))
    assert out.shape == (3, 12)
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])
    assert embed.to(torch.bfloat16)(torch.rand(2)).dtype == torch.bfloat16
