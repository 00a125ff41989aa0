"""Timers go round their providers, and their statistics are what they say."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import timers

CPU = torch.device("cpu")


def test_providers_take_turns() -> None:
    calls: list[str] = []

    def step(name: str) -> None:
        calls.append(name)
        time.sleep(0.002)  # above the shortest sample: one call each

    steps = {name: lambda name=name: step(name) for name in "abc"}
    times = timers.wall(steps, device=CPU, budget_s=0.0, min_rounds=4)
    assert "".join(calls) == "abc" + "abc" "cba" "abc" "cba"  # the first round counts how often to repeat
    assert all(len(samples) == 4 and min(samples) >= 2000 for samples in times.values())


class Clock:
    """In place of the module `time`: seconds pass where a step says so, whatever else the machine does."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, 0

    def perf_counter(self) -> float:
        return self.now

    def perf_counter_ns(self) -> int:
        return round(self.now * 1e9)

    def step(self, seconds: float) -> None:
        self.now, self.calls = self.now + seconds, self.calls + 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timers, "time", clock)
    return clock


def test_short_calls_are_repeated_and_divided(clock: Clock) -> None:
    times = timers.wall({"a": lambda: clock.step(1e-4)}, device=CPU, budget_s=0.0, min_rounds=2)
    assert clock.calls == 1 + 2 * round(timers.SHORTEST_SAMPLE_US / 100)
    assert times["a"] == pytest.approx([100.0, 100.0])


def test_rounds_that_warm_up_do_not_count(clock: Clock) -> None:
    slow: list[bool] = []

    def step() -> None:
        slow.append(clock.now < 0.05)
        clock.step(0.02 if slow[-1] else 0.002)

    times = timers.wall({"a": step}, device=CPU, budget_s=0.0, min_rounds=3, warm_up_s=0.05)
    assert sum(slow) == 3
    assert times["a"] == pytest.approx([2000.0] * 3)


def test_the_budget_ends_the_rounds(clock: Clock) -> None:
    times = timers.wall({"a": lambda: clock.step(0.01)}, device=CPU, budget_s=0.095, min_rounds=2)
    assert times["a"] == pytest.approx([1e4] * 10)
    slow = timers.wall({"a": lambda: clock.step(1.0)}, device=CPU, budget_s=0.1, min_rounds=2)
    assert len(slow["a"]) == 2


def test_statistics() -> None:
    assert timers.summarize([float(value) for value in range(10, 0, -1)]) == {
        "p50": 5.5, "p20": pytest.approx(2.8), "p80": pytest.approx(8.2), "min": 1.0, "n": 10,
    }  # fmt: skip
    assert timers.summarize([3.0])["p80"] == 3.0
    assert timers.spread([1.0, 1.0, 9.0], [1.1]) == pytest.approx(0.1)


@pytest.mark.parametrize(("size", "sets"), [(10, 11), (50, 3), (100, 2), (1000, 1)])
def test_input_sets_exceed_twice_the_cache(size: int, sets: int) -> None:
    assert timers.num_input_sets(size, 50) == sets
    assert sets * size > 2 * 50


def test_ratios_are_of_one_round() -> None:
    slow_round = [10.0, 10.0, 40.0, 10.0, 10.0]  # the machine was busy in the third
    baseline = [4 * us for us in slow_round]
    found = timers.pair(slow_round, baseline, [us / 16 for us in baseline])
    assert found == {key: pytest.approx(1.0) for key in ("p50", "p20", "p80")} | {"n": 5}
