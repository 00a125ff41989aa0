"""Calls with next to nothing to compute: that both sides compute the same, and are timed as they are named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.small_calls import SmallCall, main, small_calls


@pytest.mark.parametrize("recorded", [False, True])
def test_both_sides_compute_the_same(recorded: bool) -> None:
    calls = small_calls(recorded=recorded)
    assert len(calls) == 8
    for call in calls:
        if "two modulations" not in call.name:  # which PyTorch's side has not
            # Winograd sums in another order.
            torch.testing.assert_close(call.ours(), expected(call), rtol=1e-5, atol=1e-4)
        assert call.ours().requires_grad == call.theirs().requires_grad == recorded


def expected(call: SmallCall) -> Tensor:
    y = call.theirs()
    if call.name == "attention_qkvpacked":
        return y.transpose(1, 2)
    return F.silu(y) if "group_norm" in call.name or "GroupNorm" in call.name else y


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "x"])
def test_seconds_are_a_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["small_calls", f"--seconds={seconds}"])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "argument --seconds: " in error and seconds in error


def test_the_table_and_the_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["small_calls", "--seconds", "0", "--json", str(tmp_path / "rows.json")])
    main()
    found = json.loads((tmp_path / "rows.json").read_text())
    assert len(found["rows"]) == 16 and {row["recorded"] for row in found["rows"]} == {False, True}
    for row in found["rows"]:
        us, theirs = row["us"], row["their_us"]
        assert 0 < us["min"] <= us["p50"] and 0 < theirs["min"] <= theirs["p50"] and row["times_as_long"]["p50"] > 0
    printed = capsys.readouterr().out
    assert "attention_qkvpacked" in printed and "wanted: 2.5x or less" in printed
