"""A pytest plugin that keeps each test's outcome in a file and, the next time, leaves out what has passed.

    python -m pytest -p benchmarks.gpu.recorded_tests --outcomes PATH

Tests that have not run come before those that failed; one that has ended its process twice is left out, and the run
fails. It is for one process: not for pytest-xdist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.checkout import MEASURED, sources_digest
from benchmarks.resuming import MOST_DEATHS, Row, append_lines, mend, read_lines

LONGEST_MESSAGE = 4000


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--outcomes", type=Path, metavar="PATH", help="keep outcomes there, and leave out what passed")


def pytest_configure(config: pytest.Config) -> None:
    """Take up the work where a file is named."""
    path = config.getoption("--outcomes")
    if path is not None:
        config.pluginmanager.register(_Recorder(path, config))


class _Recorder:
    """The file, and what it tells of tests of these sources."""

    def __init__(self, path: Path, config: pytest.Config) -> None:
        self._path, self._config = path, config
        self._versions = {
            "sources": sources_digest((*MEASURED, "tests")), "torch": torch.__version__,
            "gpu": torch.cuda.is_available(),
        }  # fmt: skip
        self._outcomes: dict[str, str] = {}
        self._deaths: Counter[str] = Counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        mend(path)
        for row in read_lines(path):
            if self._versions.items() <= row.items():
                self._outcomes[row["test"]] = row["outcome"]
                self._deaths[row["test"]] = self._deaths[row["test"]] + 1 if row["outcome"] == "begun" else 0

    @pytest.hookimpl(trylast=True)  # after those that leave out and skip by mark
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if self._deaths[item.nodeid] >= MOST_DEATHS:
                message = f"its process died {self._deaths[item.nodeid]} times"
                self._keep(item.nodeid, "crashed", message=message)
        left_out = {item for item in items if self._outcomes.get(item.nodeid) in ("passed", "skipped", "crashed")}
        self._config.hook.pytest_deselected(items=list(left_out))
        wanted = [item for item in items if item not in left_out]
        items[:] = sorted(wanted, key=lambda item: item.nodeid in self._outcomes)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        crashed = [test for test, outcome in self._outcomes.items() if outcome == "crashed"]
        if crashed and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._keep(item.nodeid, "begun")  # what kills the process is to be seen
        self._reports: list[pytest.TestReport] = []
        try:
            found = yield
        except BaseException:  # Ctrl-C
            self._keep(item.nodeid, "interrupted")
            raise
        outcome = next((each.outcome for each in self._reports if each.outcome != "passed"), "passed")
        message = "\n".join(each.longreprtext for each in self._reports if each.outcome != "passed")
        seconds = sum(each.duration for each in self._reports)
        self._keep(item.nodeid, outcome, seconds=round(seconds, 3), message=message[-LONGEST_MESSAGE:] or None)
        if outcome == "failed" and torch.cuda.is_initialized():
            self._check_gpu()
        return found

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def _check_gpu(self) -> None:
        """Leave where a failure has taken the process's GPU with it: every test after it would fail too."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the GPU no longer answers this process: {error}".splitlines()[0], returncode=70)

    def _keep(self, test: str, outcome: str, **more: Any) -> None:
        self._outcomes[test] = outcome
        row: Row = {"test": test, "outcome": outcome, **self._versions, **more}
        append_lines(self._path, [row])
