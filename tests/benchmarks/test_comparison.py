"""`compare` finds what became slower, and nothing in two runs of one thing."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.comparison import FEWEST_ROUNDS, compare
from tests.benchmarks.result_rows import Machine, made_file, made_row, write_rows

SEEDS = range(10)


@pytest.mark.parametrize("seed", SEEDS)
def test_two_runs_of_one_thing_are_noise(seed: int) -> None:
    machine = Machine(seed)
    found = compare([machine.run()], [machine.run()])
    assert len(found.changes) == 8 and len(found.together) == 1
    assert found.is_quiet and not found.is_regression


@pytest.mark.parametrize("seed", SEEDS)
def test_a_slowdown_of_20_percent_is_caught_and_undoing_it_is_an_improvement(seed: int) -> None:
    machine = Machine(seed)
    before, after = machine.run(), machine.run(slower=0.2)
    there, back = compare([before], [after]), compare([after], [before])
    assert there.is_regression and there.together[0].is_slower and there.slower and not there.faster
    assert not back.is_regression and back.together[0].is_faster and back.faster


@pytest.mark.parametrize("seed", SEEDS)
def test_a_slowdown_of_one_case_is_caught_alone(seed: int) -> None:
    machine = Machine(seed)
    found = compare([machine.run()], [machine.run(slower=0.4, slow_cases="c")])
    assert [change.before["case"]["id"] for change in found.slower] == ["c"]
    assert not found.together[0].is_slower


def test_what_moves_all_rows_is_caught_before_it_shows_in_one() -> None:
    machine = Machine(0)
    found = compare([machine.run()], [machine.run(slower=0.1)])
    assert not found.slower and found.together[0].is_slower and found.is_regression


@pytest.mark.parametrize("drift", [0.7, 1.4])
def test_a_machine_that_drifts_hides_nothing_and_invents_nothing(drift: float) -> None:
    machine = Machine(0)
    before = machine.run(drift=1.0)
    equal = compare([before], [machine.run(drift=drift)])
    slow = compare([before], [machine.run(drift=drift, slower=0.2)])
    assert equal.drift == pytest.approx(math.log(drift), abs=0.1)
    assert equal.is_quiet
    assert slow.is_regression and slow.together[0].is_slower


def changed(rows: list[dict[str, Any]], **parts: Any) -> list[dict[str, Any]]:
    """Return rows with some of ours changed: parts of stats, or keys of the row."""
    rows = copy.deepcopy(rows)
    for row in rows:
        if row["provider"] == "ours":
            stats = {key: value for key, value in parts.items() if key in row["stats"]}
            row["stats"] |= stats
            row |= {key: value for key, value in parts.items() if key not in stats}
    return rows


ROWS = [made_row("ours", 10.0), made_row("eager", 40.0)]
SLOW = {"p50": 14.0, "p20": 13.3, "p80": 15.4, "min": 12.6}


def test_median_least_time_and_ratio_must_agree() -> None:
    (all_three,) = compare([made_file(ROWS)], [made_file(changed(ROWS, **SLOW))]).changes
    assert all_three.is_slower and all_three.agreed == min(all_three.time, all_three.least, all_three.relative or 0)
    (median_alone,) = compare([made_file(ROWS)], [made_file(changed(ROWS, **SLOW | {"min": 9.0}))]).changes
    assert median_alone.agreed == 0
    both = [made_row("ours", 14.0), made_row("eager", 56.0)]
    (machine_alone,) = compare([made_file(ROWS)], [made_file(both)]).changes
    assert machine_alone.time > 0.3 and machine_alone.agreed == 0


def test_the_threshold_is_the_data_s() -> None:
    def threshold(**parts: Any) -> float:
        rows = changed(ROWS, **parts)
        return compare([made_file(rows)], [made_file(rows)]).changes[0].threshold

    assert threshold(aa_spread=0.3) == pytest.approx(0.262, abs=1e-3)  # ln 1.3
    paired = {"to": "eager", "p50": 0.25, "p20": 0.2, "p80": 0.3, "n": 50}
    assert threshold(paired=paired) == pytest.approx(0.4055, abs=1e-3)  # twice half of ln 1.5
    assert threshold(paired=paired, n=5) == pytest.approx(0.573, abs=1e-3)  # three errors of a difference


def test_what_cannot_be_judged_is_said() -> None:
    found = compare([made_file(ROWS)], [made_file(changed(ROWS, **SLOW, n=FEWEST_ROUNDS - 1))])
    assert not found.changes and len(found.unjudged) == 1
    untimed = dict.fromkeys(ROWS[0]["stats"])
    invalid = changed(ROWS, **untimed, status="invalid", reason="it is wrong")
    found = compare([made_file(ROWS)], [made_file(invalid)])
    assert found.is_regression and [row["reason"] for row in found.broken] == ["it is wrong"]
    found = compare([made_file(ROWS + [made_row("ours", 5.0, case="b")])], [made_file(ROWS)])
    assert [row["case"]["id"] for row in found.gone] == ["b"] and not found.added


def test_another_pytorch_s_baseline_is_no_yardstick() -> None:
    slower_eager = [made_row("ours", 10.0), made_row("eager", 20.0)]
    newer = [row | {"env": row["env"] | {"torch": "2.14.0"}} for row in slower_eager]
    found = compare([made_file(ROWS)], [made_file(newer)])
    assert found.others_baseline and found.changes[0].relative is None and not found.slower


def test_variants_of_others_are_rows_of_their_own_and_the_fastest_is_the_yardstick() -> None:
    rows = [
        made_row("ours", 10.0, variant="native"), made_row("eager", 80.0, variant="nchw"),
        made_row("eager", 40.0, variant="channels_last"),
    ]  # fmt: skip
    slow = changed(rows, **SLOW, variant="reference")
    slow[1]["stats"]["p50"] *= 4
    (change,) = compare([made_file(rows)], [made_file(slow)]).changes
    assert change.is_slower and change.relative == pytest.approx(math.log(1.4))


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {
        name: str(write_rows(tmp_path / name / "rows.jsonl", rows))
        for name, rows in {
            "before": ROWS, "slow": changed(ROWS, **SLOW), "other": [made_row("ours", 1.0, case="z")],
            "elsewhere": [row | {"env": row["env"] | {"device": "Other CPU"}} for row in ROWS],
        }.items()
    }  # fmt: skip
    assert main(["compare", paths["before"], paths["before"]]) == 0
    assert "1 rows compared: 0 slower, 0 faster, 1 noise" in capsys.readouterr().out
    assert main(["compare", paths["before"], paths["slow"]]) == 1
    assert "1 slower" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "slow"), str(tmp_path / "before")]) == 0
    assert "1 faster" in capsys.readouterr().out
    for after, said in (
        ("other", "no timed row in common"), ("elsewhere", "other devices"), ("gone", "does not exist"),
    ):  # fmt: skip
        assert main(["compare", paths["before"], paths.get(after, str(tmp_path / after))]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and said in error
