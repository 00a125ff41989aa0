"""The command `peers`: models of diffusers with the kernels in them against the same models without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.peers import counting
from soda_kernels import ModulatedGroupNorm


def counted(model: nn.Module, *, layout: torch.memory_format, backward: bool) -> counting.Kernels:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), model).to("meta", memory_format=layout)
    x = torch.empty(2, 64, 8, 8, device="meta").to(memory_format=layout)

    class Model(nn.Module):
        def forward(self, x: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
            return (model(x),)

    return counting.count(Model(), (x,), backward=backward)


IMAGE, STATISTICS, WEIGHTS = 2 * 64 * 64 * 4, 2 * 2 * 8 * 4, 2 * 64 * 4
"""Bytes of an image, of a norm's means and rstds, and of its weight and bias."""


def test_pytorchs_group_norm_counts_as_its_kernels() -> None:
    norm = nn.Sequential(nn.GroupNorm(8, 64), nn.SiLU())
    kernels = counted(norm, layout=torch.contiguous_format, backward=False)
    assert kernels.launches["norm"] == 3 and kernels.launches["elementwise"] == 1
    assert kernels.num_bytes["norm"] == 3 * IMAGE + STATISTICS + WEIGHTS
    assert kernels.num_bytes["elementwise"] == 2 * IMAGE
    # On a GPU it takes a channels-last image as a contiguous copy.
    copied = counted(norm, layout=torch.channels_last, backward=False)
    assert copied.launches["elementwise"] == 2 and copied.num_bytes["elementwise"] == 4 * IMAGE


@pytest.mark.parametrize("layout", counting.LAYOUTS)
def test_ours_counts_as_what_is_planned(layout: str) -> None:
    norm = ModulatedGroupNorm(8, 64)
    forward = counted(norm, layout=counting.LAYOUTS[layout], backward=False)
    both = counted(norm, layout=counting.LAYOUTS[layout], backward=True)
    assert (forward.launches["norm"], both.launches["norm"]) == (1, 3)
    assert forward.num_bytes["norm"] == 2 * IMAGE + STATISTICS + WEIGHTS
    assert forward.num_bytes["elementwise"] == 0


def test_nothing_is_written_where_the_arguments_are_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, message in (
        (["--batch", "0"], "--batch is 0; it must be positive"),
        (["--seconds", "-1"], "--seconds is -1.0; it must not be negative"),
    ):
        assert main(["peers", *arguments, "--json", str(tmp_path / "rows.json")]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_counts_and_times(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert main(["peers", "--seconds", "0.1", "--batch", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    totals = [row for row in found["kernels"] if row["kind"] == "total"]
    assert len(totals) == 4
    for row in totals:
        assert row["optimized_launches"] < row["plain_launches"] and row["optimized_bytes"] < row["plain_bytes"]
    assert {row["to"] for row in found["training"]} <= {"plain, contiguous", "plain, channels_last"}
    assert all(row["stats"]["n"] >= 3 for row in found["training"])
    assert "as it would launch on a GPU" in capsys.readouterr().out
