"""What the trials plant is what they say, and what is kept of them says that `compare` was right."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks.result_files import RESULTS
from benchmarks.trials import slowed

KEPT = sorted(RESULTS.glob("*/*-comparison*.json"))


def test_a_planted_slowdown_has_its_size() -> None:
    def step() -> list[int]:
        end = time.perf_counter() + 2e-3
        while time.perf_counter() < end:
            pass
        return [1]

    start = time.perf_counter()
    assert slowed(step, 0.5)() == [1]
    assert time.perf_counter() - start >= 3e-3


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_kept_trials_were_all_quiet_and_all_caught(path: Path) -> None:
    kept = json.loads(path.read_text())
    assert kept["slowdown"] == 0.2 and kept["quiet"] == kept["caught"] == kept["of"] == len(kept["trials"]) >= 8
    for trial in kept["trials"]:
        assert not any(abs(row["agreed"]) > row["threshold"] for row in trial["equal"])
        assert any(row["agreed"] > row["threshold"] for row in trial["slowed"])
