"""`pytest benchmarks/`: the cases and providers of the suites under pytest-benchmark, checked before they are timed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.cases import CPU_SETS, MODES
from benchmarks.end_to_end.cases import OPS, EndToEndCase, choose_cases
from benchmarks.end_to_end.problems import make_problem
from benchmarks.end_to_end.providers import contenders
from benchmarks.end_to_end.suite import Yardsticks, prepare
from benchmarks.families import SUITES, Family
from benchmarks.providers import Provider
from benchmarks.suite import Gate, case_modes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = "bf16" if DEVICE.type == "cuda" else "fp32"
COMPILED = "compile"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the choice among cases."""
    group = parser.getgroup("soda-engine's cases")
    for name, usual in (
        ("cases", f"shape sets; {','.join(CPU_SETS)}, and tiny with --benchmark-disable"),
        ("modes", f"of {','.join(MODES)}, and of {','.join(OPS)} end to end; fwd,fwd+bwd and all of these"),
        ("providers", f"all, and with --benchmark-disable all but {COMPILED}"),
    ):
        group.addoption(f"--{name}", metavar=name.upper(), help=f"with commas between; if not given {usual}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a module's function the cases of its `SUITE`."""
    suite = getattr(metafunc.module, "SUITE", None)
    if suite is None:
        return
    asked = _Asked(metafunc.config)
    params = asked.of_family(SUITES[suite]) if suite in SUITES else asked.of_end_to_end()
    metafunc.parametrize(
        ("case", "mode", "provider"), params,
        ids=[f"{_group(case, mode)} {provider.name}" for case, mode, provider in params],
    )  # fmt: skip


class _Asked:
    """What the options ask for."""

    def __init__(self, config: pytest.Config) -> None:
        self._disabled = config.getoption("benchmark_disable")
        self._cases, self._modes, self._providers = (
            text and tuple(text.split(",")) for text in map(config.getoption, ("cases", "modes", "providers"))
        )

    def of_family(self, family: Family) -> list[tuple[Any, str, Provider]]:
        sets = self._cases or (("tiny",) if self._disabled else CPU_SETS)
        cases = family.cases(sets, family.layouts, DTYPE, timed=True, on_cpu=DEVICE.type == "cpu")
        return [
            (case, mode, provider)
            for case in cases
            for mode in case_modes(case, self._modes or ("fwd", "fwd+bwd"))
            for provider in family.providers
            if self._takes(provider.name)
        ]

    def of_end_to_end(self) -> list[tuple[EndToEndCase, str, Any]]:
        there = {case.name: case for case in [*choose_cases(None, DEVICE.type), *choose_cases(["tiny"], DEVICE.type)]}
        sets = self._cases or (("tiny",) if self._disabled else ("digits",))
        return [
            (there[name], op, way)
            for name in sets
            if name in there
            for op in OPS
            if op in (self._modes or OPS)
            for way in contenders(op, DTYPE)
            if self._takes(way.provider)
        ]

    def _takes(self, provider: str) -> bool:
        if self._providers:
            return provider in self._providers
        return not (self._disabled and provider == COMPILED)


def _group(case: Any, mode: str) -> str:
    """Name what providers are compared on."""
    return f"{case.name} {mode}" if isinstance(case, EndToEndCase) else f"{case.id} {case.layout} {mode}"


class Prepared:
    """Providers' steps, checked; what a case's results are held against is made once, its tests being neighbours."""

    def __init__(self) -> None:
        self._key: Any = None
        self._kept: Any = None

    def step(self, suite: str, case: Any, mode: str, provider: Any) -> tuple[str, str | None, Any, Any]:
        """Return a provider's status and reason as in its row, its step and what the check found."""
        if suite in SUITES:
            gate = self._once((suite, case), lambda: Gate(SUITES[suite], case, DEVICE))
            ready = gate.prepare(provider, mode)
            return ready.status, ready.reason, ready.step, ready.check and ready.check.to_dict()
        problem, yardsticks = self._once((suite, case.name, mode), lambda: self._end_to_end(case, mode))
        ready: dict[str, Any] = {}
        row = prepare(provider, problem, mode, yardsticks, ready)
        return row["status"], row.get("reason"), ready and ready[provider.name].call, row.get("check")

    def close(self) -> None:
        """Remove what is on disk."""
        if isinstance(self._kept, tuple):
            shutil.rmtree(self._kept[0].folder)
        self._key = self._kept = None

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if self._key != key:
            self.close()
            self._kept = make()
            self._key = key
        return self._kept

    def _end_to_end(self, case: EndToEndCase, op: str) -> Any:
        problem = make_problem(case, DEVICE, DTYPE)
        return problem, Yardsticks(problem, op)


@pytest.fixture(scope="session")
def prepared() -> Iterator[Prepared]:
    """Keep what the tests of a case share."""
    found = Prepared()
    yield found
    found.close()


@pytest.fixture
def time_case(
    request: pytest.FixtureRequest, case: Any, mode: str, provider: Any, prepared: Prepared, benchmark: Any
) -> Callable[[], None]:
    """Return what checks a provider on a case, and times it in the group of all that run it."""

    def run() -> None:
        status, reason, step, check = prepared.step(request.module.SUITE, case, mode, provider)
        if status == "unavailable":
            pytest.skip(str(reason))
        if status != "ok":
            pytest.fail(f"{status}: {reason}")
        benchmark.group = _group(case, mode)
        benchmark.extra_info |= {"provider": provider.name, "check": check}
        step()  # compiles, and makes an optimizer's state
        benchmark(step if DEVICE.type == "cpu" else lambda: (step(), torch.cuda.synchronize()))

    return run
