"""What a command goes on with: what is whole counts, what is half written or of other sources does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.families import GROUP_NORM
from benchmarks.journal import Journal, Part
from benchmarks.records import describe_environment, new_row
from benchmarks.resuming import Attempts, append_lines, mend, read_lines
from benchmarks.tune import made_up, tune_family
from benchmarks.tune_log import Log
from soda_kernels import _tuning

pytest_plugins = "pytester"

ENVIRONMENT = describe_environment(torch.device("cpu"))
PARTS = {mode: Part("norm", "modulated_group_norm", {"id": "a", "sizes": (1, 2)}, mode) for mode in ("fwd", "bwd")}
PROVIDERS = ("ours", "eager")


def rows(part: Part, environment: dict[str, Any] = ENVIRONMENT, timers: Sequence[str] = ("graph", "wall")) -> Any:
    row = new_row(**part._asdict(), status="ok", env=environment)
    return [row | {"provider": provider, "timer": timer} for provider in PROVIDERS for timer in timers]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def journal(path: Path, **changed: Any) -> Journal:
    return Journal(path, ENVIRONMENT | changed, resume=True)


def test_what_was_measured_is_not_wanted_again(path: Path) -> None:
    assert journal(path).wanted(PARTS, PROVIDERS) == ["fwd", "bwd"]
    journal(path).take(PARTS["bwd"], iter([rows(PARTS["bwd"])]))
    assert journal(path).wanted(PARTS, PROVIDERS) == ["fwd"]
    assert journal(path).wanted(PARTS, [*PROVIDERS, "compile"]) == ["fwd", "bwd"]
    assert Journal(path, ENVIRONMENT, resume=False).wanted(PARTS, PROVIDERS) == ["fwd", "bwd"]


@pytest.mark.parametrize("name", ["device", "torch", "triton", "sources", "tables"])
def test_rows_of_another_environment_do_not_count(path: Path, name: str) -> None:
    journal(path).take(PARTS["fwd"], iter([rows(PARTS["fwd"])]))
    assert journal(path, **{name: "other"}).wanted(PARTS, PROVIDERS) == ["fwd", "bwd"]
    assert journal(path, git="other", utc="later").wanted(PARTS, PROVIDERS) == ["bwd"]


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("half", ["", '{"schema": 1, "sui'])
def test_a_part_that_is_written_in_part_is_measured_again(path: Path, kept: int, half: str) -> None:
    append_lines(path, rows(PARTS["fwd"]))
    append_lines(path, rows(PARTS["bwd"])[:kept])
    with path.open("a") as file:
        file.write(half)
    assert journal(path).wanted(PARTS, PROVIDERS) == ([] if kept == 4 else ["bwd"])
    journal(path).take(PARTS["bwd"], iter([rows(PARTS["bwd"])]))
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 4 + kept + 4


def test_a_half_line_is_cut_off_and_nothing_else(path: Path) -> None:
    mend(path)
    assert not path.exists() and read_lines(path) == []
    for text, left in (('{"a": 1}\n{"b', '{"a": 1}\n'), ('{"a', ""), ('{"a": 1}\n', '{"a": 1}\n'), ("", "")):
        path.write_text(text)
        assert read_lines(path) == ([{"a": 1}] if left else [])
        mend(path)
        assert path.read_text() == left


def dying(reason: BaseException) -> Iterator[list[Any]]:
    raise reason
    yield []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"a": 1,\n', "line 1 is not JSON"),
        (b"\xff\xfe\n", "line 1 is not JSON"),
        (b"{}\n[]\nhalf", "line 2 is no object"),
    ],
    ids=["broken", "binary", "a list"],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(
    path: Path, capsys: pytest.CaptureFixture[str], text: bytes, said: str
) -> None:
    path.write_bytes(text)
    assert main(["run", "--cases", "tiny", "--quick", "--resume", "--json", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}: {said}; name a file of results or a new one" in error and len(error.splitlines()) == 1
    assert path.read_bytes() == text


def test_objects_without_an_environment_are_nobodys_rows(path: Path) -> None:
    path.write_text('{"a": 1}\n')
    assert Journal(path, ENVIRONMENT, resume=True).rows == []


def test_what_ends_its_process_twice_becomes_rows_that_say_so(path: Path) -> None:
    for _ in range(2):
        assert journal(path).wanted(PARTS, PROVIDERS) == ["fwd", "bwd"]
        with pytest.raises(RuntimeError):
            journal(path).take(PARTS["fwd"], dying(RuntimeError("illegal\naddress")))
    assert journal(path).wanted(PARTS, PROVIDERS) == ["bwd"]
    assert journal(path).wanted(PARTS, PROVIDERS) == ["bwd"]
    found = read_lines(path)
    assert [(row["provider"], row["status"], row["reason"]) for row in found] == [
        (provider, "failed", "given up after 2 attempts: RuntimeError: illegal") for provider in PROVIDERS
    ]


def test_interruptions_do_not_count_and_deaths_do(path: Path) -> None:
    attempts = Attempts(path)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt), attempts.of("a"):
            raise KeyboardInterrupt
    assert attempts.given_up("a") is None
    for _ in range(2):
        assert attempts.given_up("a") is None
        attempts.of("a").__enter__()  # and the process dies
    assert "its process died" in (attempts.given_up("a") or "")
    assert attempts.given_up("b") is None
    with attempts.of("b"):
        pass
    assert attempts.given_up("a") is None


def test_the_command_resumes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(modes: str, *more: str) -> int:
        return main(["run", "--cases", "tiny", "--layouts", "nhwc", "--modes", modes, "--quick", "--providers",
                     "ours,eager", "--json", str(path), *more])  # fmt: skip

    assert run("fwd") == run("fwd,bwd", "--resume") == run("fwd,bwd", "--resume") == 0
    assert [(row["mode"], row["provider"]) for row in read_lines(path)] == [
        ("fwd", "ours"), ("fwd", "eager"), ("bwd", "ours"), ("bwd", "eager"),
    ]  # fmt: skip
    assert "geometric mean, fwd" in capsys.readouterr().out.split("median us")[-1], "what was there is in the table"
    assert main(["run", "--resume"]) == main(["tune", "--resume"]) == main(["tune", "--rehearse"]) == 2


def test_several_suites_take_each_what_it_has(path: Path) -> None:
    arguments = ["--suite", "norm,attention", "--cases", "tiny", "--layouts", "nhwc,packed", "--modes", "fwd"]
    assert main(["run", *arguments, "--quick", "--providers", "ours,eager", "--json", str(path)]) == 0
    assert [(row["suite"], row["case"]["layout"]) for row in read_lines(path)] == [
        ("norm", "nhwc"), ("norm", "nhwc"), ("attention", "packed"), ("attention", "packed"),
    ]  # fmt: skip


def tune(path: Path, folder: Path, measure: Callable[..., float] = made_up) -> list[str]:
    log = Log(path, ENVIRONMENT, resume=True)

    def save(*arguments: Any) -> Path:
        return _tuning.save_table(*arguments, folder=folder)

    cases = GROUP_NORM.cases(["tiny"], ["nhwc"], "bf16")
    return list(tune_family(GROUP_NORM, cases, torch.device("cpu"), measure=measure, save=save, log=log))


def test_the_tuner_goes_on_within_a_problem_and_makes_its_tables_again(path: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    def interrupted(config: Any, steps: Sequence[Any]) -> float:
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(config)
        return made_up(config, steps)

    with pytest.raises(KeyboardInterrupt):
        tune(path, tmp_path / "a", interrupted)
    assert len(read_lines(path)) == 5

    def counted(config: Any, steps: Sequence[Any]) -> float:
        seen.append(config)
        return made_up(config, steps)

    lines = tune(path, tmp_path / "a", counted)
    measured, kept = len(seen), path.read_text()
    assert tune(path, tmp_path / "b", counted) == lines
    assert len(seen) == measured and path.read_text() == kept
    (first,), (second,) = ((tmp_path / name).iterdir() for name in "ab")
    assert json.loads(first.read_text())["configs"] == json.loads(second.read_text())["configs"]
    assert main(["tune", "--from", str(path), "--tables", str(tmp_path / "c")]) == 0
    (third,) = (tmp_path / "c").iterdir()
    assert json.loads(third.read_text())["configs"] == json.loads(first.read_text())["configs"]
    (tmp_path / "empty").touch()
    assert main(["tune", "--from", str(tmp_path / "empty")]) == 2


TESTS = """
import os, pytest
def test_passes(): pass
@pytest.mark.skip
def test_is_skipped(): pass
def test_fails(): assert "OK" in os.environ
def test_dies():
    if "DIE" in os.environ: os._exit(9)
    if "STOP" in os.environ: raise KeyboardInterrupt
"""


def test_tests_that_passed_are_left_out(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pytester.makepyfile(TESTS).parent / "outcomes.jsonl"

    def run() -> Any:
        return pytester.runpytest_inprocess(
            "-p", "benchmarks.gpu.recorded_tests", "--outcomes", str(path), "-p", "no:cacheprovider",
            no_reraise_ctrlc=True,
        )  # fmt: skip

    monkeypatch.setenv("STOP", "1")
    run().assert_outcomes(passed=1, skipped=1, failed=1)
    monkeypatch.delenv("STOP")
    run().assert_outcomes(passed=1, failed=1)  # the one that was interrupted, and the one that failed again
    monkeypatch.setenv("OK", "1")
    run().assert_outcomes(passed=1)
    assert run().ret == pytest.ExitCode.NO_TESTS_COLLECTED
    last = {row["test"]: row["outcome"] for row in read_lines(path)}
    assert set(last.values()) == {"passed", "skipped"} and len(last) == 4


def test_a_test_that_kills_its_process_is_left_out_after_two(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pytester.makepyfile(TESTS).parent / "outcomes.jsonl"
    (test,) = (f"{each.name}::test_dies" for each in path.parent.glob("test_*.py"))
    begun = {"test": test, "outcome": "begun"}
    arguments = ("-p", "benchmarks.gpu.recorded_tests", "--outcomes", str(path), "-p", "no:cacheprovider")
    monkeypatch.setenv("OK", "1")
    pytester.runpytest_inprocess(*arguments, "-k", "passes")
    versions = {name: read_lines(path)[0][name] for name in ("sources", "torch", "gpu")}
    append_lines(path, [begun | versions, begun | versions])
    result = pytester.runpytest_inprocess(*arguments)
    result.assert_outcomes(passed=1, skipped=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert read_lines(path)[-1]["outcome"] != "begun"
    assert {row["test"]: row["outcome"] for row in read_lines(path)}[test] == "crashed"
