"""The file that `run` adds its rows to, and goes on with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks.records import new_row
from benchmarks.resuming import Attempts, Row, append_lines, measured_here, mend, read_lines

Key = TypeVar("Key", bound=Hashable)


class Part(NamedTuple):
    """What is measured in one go, and is done or not: one case of an op in one mode, by every provider."""

    suite: str
    op: str
    case: dict[str, Any]
    mode: str

    @property
    def name(self) -> str:
        """In one line, the same each time."""
        return json.dumps(self, sort_keys=True)


class Journal:
    """A file of rows.

    Attributes:
        rows: what has been measured in this environment, now and, if that is asked for, before.
    """

    def __init__(self, path: Path | None, environment: Row, *, resume: bool) -> None:
        """Open a file, or none.

        Args:
            resume: go on with what the file holds of this environment.
        """
        self._path, self._environment = path, environment
        self._attempts = None
        self.rows: list[Row] = []
        if path is not None and resume:
            self._attempts = Attempts(path)
            self.rows = measured_here(read_lines(path), environment, "tables")  # what is no file of rows stays as it is
            mend(path)

    def rows_of(self, suite: str) -> list[Row]:
        """Return the rows of a suite."""
        return [row for row in self.rows if row["suite"] == suite]

    def wanted(self, parts: Mapping[Key, Part], providers: Sequence[str]) -> list[Key]:
        """Return which parts have still to be measured, having kept rows that say so of those that are given up."""
        there: dict[str, set[tuple[str, str]]] = {}
        for row in self.rows:
            name = Part(row["suite"], row["op"], row["case"], row["mode"]).name
            there.setdefault(name, set()).add((row["provider"], row["timer"]))
        wanted = []
        for key, part in parts.items():
            if part.name in there and _is_whole(there[part.name], providers):
                continue
            reason = self._attempts and self._attempts.given_up(part.name)
            if reason is None:
                wanted.append(key)
                continue
            row = new_row(**part._asdict(), timer="wall", status="failed", reason=reason, env=self._environment)
            self._keep([row | {"provider": provider} for provider in providers])
        return wanted

    def take(self, part: Part, measured: Iterator[list[Row]]) -> None:
        """Measure the next part and keep its rows.

        Raises:
            RuntimeError: a provider's failure has taken this process's GPU with it; what comes next would fail too.
        """
        with self._attempts.of(part.name) if self._attempts else contextlib.nullcontext():
            rows = next(measured)
            self._keep(rows)
        if torch.cuda.is_initialized() and any(row["status"] == "failed" for row in rows):
            torch.cuda.synchronize()

    def _keep(self, rows: Sequence[Row]) -> None:
        if self._path is not None:
            append_lines(self._path, rows)
        self.rows += rows


def _is_whole(there: set[tuple[str, str]], providers: Sequence[str]) -> bool:
    """Tell whether rows are there of every provider by every timer."""
    return there.issuperset((provider, timer) for provider in providers for timer in {timer for _, timer in there})
