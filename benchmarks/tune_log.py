"""What the tuner has timed: a file of one JSON object a line, from which it goes on and tables are made again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.resuming import Attempts, Row, append_lines, measured_here, mend, read_lines
from soda_kernels import _tuning

CANDIDATE, TUNED = "candidate", "tuned"


class Log:
    """Times of candidates, and the best of each problem.

    Attributes:
        environment: the machine, versions and commit, as they stand in every line and every table.
    """

    def __init__(self, path: Path | None, environment: Row, *, resume: bool = False) -> None:
        """Open a file, or none.

        Args:
            resume: take what the file holds of this environment as measured. Tuned tables may differ: they are what
                comes of it.
        """
        self._path, self.environment = path, environment
        self._attempts = Attempts(path) if path is not None and resume else None
        self._known: dict[str, Row] = {}
        if path is not None and resume:
            self._known = {_name(row): row for row in measured_here(read_lines(path), environment)}
            mend(path)

    def time(
        self, subject: Row, measure: Callable[[Any, Sequence[Any]], float], config: Any,
        steps: Callable[[], Sequence[Any]],
    ) -> float | str:  # fmt: skip
        """Return a candidate's time in microseconds, or why it does not run in one line, from the file if it is there.

        Args:
            subject: family, arch and key of the problem.
            measure: as `benchmarks.tune.measure_on_gpu`.
            steps: makes what is measured.
        """
        row = {"kind": CANDIDATE, **subject, "config": dataclasses.asdict(config), "us": None, "reason": None}
        name = _name(row)
        if name not in self._known:
            given_up = self._attempts and self._attempts.given_up(name)
            try:
                if given_up:
                    raise RuntimeError(given_up)
                row["us"] = self._attempt(name, lambda: measure(config, steps()))
            except Exception as error:  # one that asks for more than the GPU has raises what Triton's driver likes
                row["reason"] = (str(error) or type(error).__name__).splitlines()[0]
            self._keep(row)
        found = self._known[name]
        return found["reason"] if found["us"] is None else found["us"]

    def keep_best(self, subject: Row, config: Any, us: float) -> None:
        """Note which config is the best for a problem."""
        row = {"kind": TUNED, **subject, "config": dataclasses.asdict(config), "us": us}
        if _name(row) not in self._known:
            self._keep(row)

    def _attempt(self, name: str, measure: Callable[[], float]) -> float:
        if self._attempts is None:
            return measure()
        with self._attempts.of(name):
            return measure()

    def _keep(self, row: Row) -> None:
        self._known[_name(row)] = row
        if self._path is not None:
            append_lines(self._path, [row | {"env": self.environment}])


def _name(row: Row) -> str:
    return json.dumps([row[part] for part in ("kind", "family", "arch", "key", "config")], sort_keys=True)


def tables_from(path: Path, folder: Path | None = None) -> Iterator[tuple[Path, str]]:
    """Keep in tables the best configs that a file tells of, and yield for each its table and its key.

    Args:
        folder: where tables are kept, the package's if not given.

    Raises:
        ValueError: the file tells of none.
    """
    best = {(row["family"], row["arch"], row["key"]): row for row in read_lines(path) if row.get("kind") == TUNED}
    if not best:
        raise ValueError(f"{path} has no tuned config; `python -m benchmarks tune --json` writes them")
    for (family, arch, key), row in best.items():
        yield _tuning.save_table(family, arch, {key: row["config"]}, row["env"], folder), key
