"""`pytest benchmarks/`: a case's providers in one group, checked before they are timed, and not among the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.checkout import ROOT


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    # As a worker's child pytest-benchmark would time nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


def test_times_go_to_json_by_case_with_what_the_check_found(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    result = run_pytest(
        "benchmarks/bench_norm.py", "--cases", "tiny", "--modes", "fwd", "--providers", "ours,eager,liger",
        "--benchmark-json", str(path), "--benchmark-max-time", "0.02", "--benchmark-min-rounds", "2",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "4 passed, 2 skipped" in result.stdout
    found = json.loads(path.read_text())["benchmarks"]
    assert [(each["group"], each["extra_info"]["provider"]) for each in found] == [
        (f"tiny/2x16@8x8-g4-m2 {layout} fwd", provider) for layout in ("nchw", "nhwc") for provider in ("ours", "eager")
    ]
    assert all(each["extra_info"]["check"]["pass"] and each["stats"]["median"] > 0 for each in found)


WRONG = """
import dataclasses
from benchmarks import families
norm = families.SUITES["norm"]
def wrong(*arguments):
    return norm.plain(*arguments) * 1.01
ours = dataclasses.replace(norm.providers[0], build=lambda: wrong)
families.SUITES["norm"] = dataclasses.replace(norm, providers=(ours,))
"""


def test_what_computes_wrongly_fails_and_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_norm.py").write_text(WRONG)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    result = run_pytest("-p", "wrong_norm", "benchmarks/bench_norm.py", "--cases", "tiny", "--modes", "fwd",
                        "--benchmark-json", str(tmp_path / "times.json"))  # fmt: skip
    assert result.returncode == 1 and "2 failed" in result.stdout
    assert "times that of PyTorch's own" in result.stdout
    assert not (tmp_path / "times.json").exists() or not json.loads((tmp_path / "times.json").read_text())["benchmarks"]
