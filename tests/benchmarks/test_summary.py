"""What is printed after a run says where this project loses and what is noise."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.records import new_row
from benchmarks.summary import speed_up, summarize_rows
from benchmarks.tables import geometric_mean, table


def row(
    provider: str, us: float | None, *, case: str = "a", status: str = "ok", reason: str | None = None,
    kernel: str | None = None,
) -> Any:  # fmt: skip
    stats = dict.fromkeys(("p50", "p20", "p80", "min", "n"), us) | {"aa_spread": None if us is None else 0.1}
    return new_row(
        op="norm", case={"id": case, "layout": "nhwc", "dtype": "fp32"}, provider=provider, mode="fwd", timer="wall",
        stats=stats, status=status, reason=reason, variant="native" if provider == "ours" else None,
        config={"kernel": kernel} if kernel else {},
    )  # fmt: skip


ROWS = [
    row("ours", 10.0), row("eager", 40.0), row("compile", 10.5),
    row("ours", 10.0, case="b"), row("eager", 5.0, case="b"),
    row("compile", None, case="b", status="invalid", reason="it is wrong"),
    row("apex", None, case="b", status="unavailable", reason="it is not installed"),
]  # fmt: skip


def test_speed_up_is_the_rivals_time_over_ours() -> None:
    assert speed_up(ROWS, "a", "fwd", "eager") == (4.0, 0.1)
    assert speed_up(ROWS, "b", "fwd", "eager") == (0.5, 0.1)
    assert speed_up(ROWS, "b", "fwd", "compile") is None
    assert speed_up(ROWS, "b", "bwd", "eager") is None


def test_the_summary_shows_losses_noise_and_what_was_not_timed() -> None:
    lines = [line.split() for line in summarize_rows(ROWS).splitlines()]
    a, b, mean = (next(line for line in lines if line[:1] == [first]) for first in ("a", "b", "geometric"))
    assert a[2:8] == ["10.0", "40.0", "10.5", "4.00x", "noise", "1.05x"]
    assert b[2:7] == ["10.0", "5.0", "invalid", "0.50x", "-"]
    assert mean == ["geometric", "mean,", "fwd", "1.41x", "1.05x"]
    text = summarize_rows(ROWS)
    assert "slower than a rival by more than the A/A spread:\n  b nhwc fwd (wall): 0.50x of eager\n" in text
    assert "compile: invalid in 1 rows: it is wrong" in text
    assert "apex: unavailable in 1 rows: it is not installed" in text


def test_every_rival_that_ran_has_its_columns_and_kernels_their_names() -> None:
    rows = [
        row("ours", 10.0), row("sdpa-flash", 20.0, kernel="flash_fwd"), row("eager", 40.0, kernel="flash_fwd"),
        row("ours", 10.0, case="b"), row("eager", 5.0, case="b", kernel="math"),
        row("apex", None, case="b", status="unavailable", reason="it is not installed"),
    ]  # fmt: skip
    lines = [line.split() for line in summarize_rows(rows).splitlines()]
    assert lines[1][:9] == ["case", "mode", "ours", "sdpa-flash", "eager", "vs", "sdpa-flash", "vs", "eager"]
    a, b = (next(line for line in lines if line[:1] == [case]) for case in "ab")
    assert a[2:7] == ["10.0", "20.0", "40.0", "2.00x", "4.00x"]
    assert b[2:7] == ["10.0", "-", "5.0", "-", "0.50x"]
    text = summarize_rows(rows)
    assert "eager fwd: flash_fwd (1), math (1)\n  sdpa-flash fwd: flash_fwd (1)" in text
    assert "kernel" not in summarize_rows(ROWS)


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_columns_are_aligned() -> None:
    assert table(["name", "us"], [["a", "1.0"], ["longer", "10.0"]]) == "name      us\na        1.0\nlonger  10.0"
