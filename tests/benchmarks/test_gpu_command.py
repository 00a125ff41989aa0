"""The command `gpu`, rehearsed: interrupted, it goes on where it was; a chunk ends in time; what is short is said."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.checkout import ROOT
from benchmarks.commands import gpu
from benchmarks.gpu.chunks import run_chunk
from benchmarks.gpu.preflight import environment_of_parts, shortages
from benchmarks.gpu.rounds import Round, alone_in, folder_name
from benchmarks.gpu.stages import STAGES, Part, Places, list_parts


def file_in(folder: Path, kind: str = "") -> Path | None:
    """The suites' rows, or those of the tuner or of tests."""
    kinds = {"": folder.glob("20*-*.jsonl"), **{each: folder.glob(f"20*-{each}.jsonl") for each in ("tune", "tests")}}
    found = {name: set(paths) for name, paths in kinds.items()}
    found[""] -= found["tune"] | found["tests"]
    return next(iter(found[kind]), None)


def lines_of(path: Path | None) -> list[dict[str, Any]]:
    assert path is not None
    return [json.loads(line) for line in path.read_text().splitlines()]


def state_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("gpu-*.json")
    return json.loads(path.read_text())["parts"]


@pytest.mark.slow
def test_a_rehearsal_that_is_interrupted_goes_on_and_measures_nothing_twice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    arguments = ["gpu", "--rehearse", "--out", str(out)]
    first = subprocess.Popen([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, env=environment_of_parts(rehearse=True))  # fmt: skip
    try:
        wait_for(lambda: (path := file_in(out)) is not None and path.stat().st_size > 0, first)
        first.send_signal(signal.SIGINT)
        output, _ = first.communicate()
    finally:
        first.kill()
    assert first.returncode == 130, output
    status = {name: part["status"] for name, part in state_of(out).items()}
    assert status["tests"] == status["tune"] == "done" and status["suites"] == "unfinished"
    path = file_in(out)
    assert path is not None
    num_rows = path.read_text().count("\n")
    with path.open("a") as file:
        file.write('{"schema": 1, "suite": "no')  # as of a machine that was taken away

    assert main(arguments) == 0
    rows, candidates, tests = (lines_of(file_in(out, kind)) for kind in ("", "tune", "tests"))
    assert num_rows < len(rows)
    times = Counter(json.dumps([row[part] for part in ("suite", "op", "case", "mode", "provider", "variant", "timer")])
                    for row in rows)  # fmt: skip
    assert set(times.values()) == {1}
    assert {row["suite"] for row in rows} == {"norm", "attention", "diffusion", "sampling", "e2e"}
    assert {row["status"] for row in rows if row["provider"] == "ours"} == {"ok"}
    assert set(Counter(json.dumps([row["key"], row["kind"], row["config"]]) for row in candidates).values()) == {1}
    assert sorted(path.name for path in (out / "tables").iterdir()) == [
        "attention.cpu.json", "diffusion.cpu.json", "group_norm.cpu.json",
    ]  # fmt: skip
    passed = Counter(row["test"] for row in tests if row["outcome"] == "passed")
    assert len(passed) > 5 and set(passed.values()) == {1}
    assert {part["status"] for part in state_of(out).values()} == {"done"}
    assert [row["images"] for row in lines_of(next(out.glob("*-train/ours.jsonl")))] == [256]

    capfd.readouterr()
    assert main([*arguments, "--minutes", "0.01"]) == 0, "nothing is left to do"
    assert "==" not in capfd.readouterr().out


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


GOES_ON = """
import pathlib, sys, time
path, wanted = pathlib.Path(sys.argv[1]), int(sys.argv[2])
for _ in range(wanted - (len(path.read_text()) if path.exists() else 0)):
    time.sleep(0.25)
    path.open("a").write("x")
"""


@pytest.fixture
def do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command with these parts instead of its own."""

    def run(*parts: Part, minutes: float | None = None, stage_minutes: float = 0.1) -> int:
        monkeypatch.setattr(gpu, "list_parts", lambda *_args, **_options: list(parts))
        limit = [] if minutes is None else ["--minutes", str(minutes)]
        return main(["gpu", "--rehearse", "--out", str(tmp_path), "--stage-minutes", str(stage_minutes), *limit])

    return run


def part(name: str, code: str, *arguments: object) -> Part:
    return Part(name=name, stage="suites", arguments=("-c", code, *map(str, arguments)))


def test_a_part_that_takes_longer_than_a_chunk_goes_on_in_the_next(tmp_path: Path, do: Callable[..., int]) -> None:
    stem = Round(tmp_path, gpu._commit(), examined_device()).places.stem
    result = tmp_path / f"{stem}.jsonl"
    assert do(part("long", GOES_ON, result, 16)) == 0
    assert result.read_text() == "x" * 16
    long = state_of(tmp_path)["long"]
    assert long["chunks"] >= 2 and long["status"] == "done"


def test_a_call_ends_in_time_and_the_next_goes_on(tmp_path: Path, do: Callable[..., int]) -> None:
    result = tmp_path / f"{Round(tmp_path, gpu._commit(), examined_device()).places.stem}.jsonl"
    begun = time.monotonic()
    assert do(part("long", GOES_ON, result, 400), part("next", "pass"), minutes=0.1) == gpu.WORK_REMAINS
    assert time.monotonic() - begun < 60, "and all of it takes 100 s"
    assert {name: each["status"] for name, each in state_of(tmp_path).items()} == {
        "long": "unfinished", "next": "unfinished",
    }  # fmt: skip
    result.write_text("x" * 400)
    assert do(part("long", GOES_ON, result, 400), part("next", "pass")) == 0


def examined_device() -> str:
    return gpu.examine(None, rehearse=True).device


def test_what_went_wrong_is_done_and_said(
    tmp_path: Path, do: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    failing = dataclasses.replace(part("absent", "pass"), missing="no data")
    assert do(part("bad rows", "raise SystemExit(1)"), part("fine", "pass"), failing) == 1
    assert ["absent", "skipped", "0", "0.0", "no", "data"] in [
        line.split() for line in capfd.readouterr().out.splitlines()
    ]
    assert do(part("bad rows", "raise SystemExit(1)"), part("fine", "pass"), failing) == 1
    assert state_of(tmp_path)["bad rows"] == {
        "status": "done", "reason": "ended with 1", "code": 1, "chunks": 1, "fruitless": 0,
        "seconds": state_of(tmp_path)["bad rows"]["seconds"],
    }  # fmt: skip


def test_a_part_that_breaks_off_again_and_again_is_given_up(tmp_path: Path, do: Callable[..., int]) -> None:
    assert do(part("broken", "import os; os._exit(70)"), part("fine", "pass")) == 1
    state = state_of(tmp_path)
    assert state["broken"]["status"] == "failed" and "3 chunks added nothing" in state["broken"]["reason"]
    assert state["broken"]["chunks"] == 3 and state["fine"]["status"] == "done"


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, file=open(sys.argv[1], "w"), flush=True)
time.sleep(60)
"""


def test_what_does_not_heed_an_interrupt_is_killed_with_what_it_started(tmp_path: Path) -> None:
    begun = time.monotonic()
    ended = run_chunk([sys.executable, "-c", STUBBORN, str(tmp_path / "pid")], environment=os.environ, seconds=2,
                      grace_s=0.5)  # fmt: skip
    assert (ended.code, ended.was_cut) == (-signal.SIGKILL, True)
    assert 1.5 < time.monotonic() - begun < 40, "and it would take 60 s"
    child = Path("/proc") / (tmp_path / "pid").read_text().strip() / "status"
    time.sleep(0.2)
    assert not child.exists() or "zombie" in child.read_text()


def test_two_do_not_work_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone_in(tmp_path):
        assert main(["gpu", "--rehearse", "--out", str(tmp_path)]) == 2
    assert "another run is at work" in capsys.readouterr().err


def test_a_round_is_of_one_state_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Round(tmp_path, "abc+", "A GPU")
    first.part("tests")["status"] = "done"
    first.keep()
    assert Round(tmp_path, "abc+", "A GPU").part("tests")["status"] == "done"
    assert Round(tmp_path, "abc+", "Another").part("tests")["status"] == "unfinished"
    monkeypatch.setattr("benchmarks.gpu.rounds.sources_digest", lambda: "other")
    assert Round(tmp_path, "abc+", "A GPU").part("tests")["status"] == "unfinished"


def test_what_is_too_old_is_said_in_a_line_each() -> None:
    assert shortages({"torch": "2.11.0+cu130", "triton": "3.6.0"}, (3, 11)) == []
    assert shortages({"torch": "2.9.1", "triton": None}, (3, 10)) == [
        "Python is 3.10, and must be 3.11 or newer",
        "torch is 2.9.1, and must be 2.11 or newer",
        "triton is not installed, and must be 3.6 or newer",
    ]


def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["gpu"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "PyTorch finds no CUDA device" in error


def test_the_parts_on_a_gpu_come_in_order_and_resume(tmp_path: Path) -> None:
    places = Places(folder=tmp_path, stem="2026-01-02-abc")
    (training,) = list_parts(places, stages=["train"], data=None, train_minutes=1, rehearse=False)
    assert training.missing and "--data" in training.missing
    parts = list_parts(places, stages=STAGES, data=tmp_path, train_minutes=10, rehearse=False)
    assert [each.stage for each in parts] == ["tests", "tune", "suites", "e2e", "train"]
    by_stage = {each.stage: each.arguments for each in parts}
    assert "--resume" in by_stage["tune"] and "group_norm,attention,diffusion" in by_stage["tune"]
    assert "norm,attention,diffusion,sampling" in by_stage["suites"] and "cuda" in by_stage["e2e"]
    assert str(tmp_path / "2026-01-02-abc.jsonl") in by_stage["e2e"]
    assert [each.name for each in list_parts(places, stages=["tune"], data=None, train_minutes=1, rehearse=True)] == [
        "tune"
    ]


def test_a_devices_folder() -> None:
    assert folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
