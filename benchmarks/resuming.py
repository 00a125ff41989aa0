"""Files of one JSON object a line that a command goes on with: what they hold is not measured again.

A machine may go away at any moment. What is half written then is dropped, and what has ended its process twice is given
up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soda_engine.records import to_json

Row = dict[str, Any]

MOST_DEATHS = 2


def read_lines(path: Path) -> list[Row]:
    """Read the objects of a file; there are none where it does not exist. What is half written is passed by.

    Raises:
        ValueError: a whole line is no object.
    """
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # of JSON or of UTF-8
            raise ValueError(f"{path}: line {number} is not JSON; name a file of results or a new one") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} is no object; name a file of results or a new one")
        rows.append(row)
    return rows


def append_lines(path: Path, rows: Sequence[Row]) -> None:
    """Add objects that belong together to a file, by one write; they are on disk when this returns."""
    text = "".join(to_json(row) + "\n" for row in rows)
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())
        os.fsync(file.fileno())


def mend(path: Path) -> None:
    """Cut off a last line that was half written, so that what is added next is not a part of it."""
    text = path.read_bytes() if path.exists() else b""
    if text.endswith(b"\n") or not text:
        return
    with path.open("r+b") as file:
        file.truncate(text.rfind(b"\n") + 1)
        os.fsync(file.fileno())


class Attempts:
    """A note beside a file of what is being measured, so that what kills its process is not tried for ever."""

    def __init__(self, path: Path) -> None:
        self._note = path.with_name(f".{path.name}.begun")

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count an attempt that comes to no end; one that is interrupted does not count."""
        before = self._read()
        deaths = before["deaths"] if before["part"] == part else 0
        self._write({"part": part, "deaths": deaths + 1, "reason": "its process died"})
        try:
            yield
        except KeyboardInterrupt:
            self._write(before)
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self._write({"part": part, "deaths": deaths + 1, "reason": reason})
            raise
        self._note.unlink()

    def given_up(self, part: str) -> str | None:
        """Return why a part is not to be tried again, if so."""
        found = self._read()
        if found["part"] != part or found["deaths"] < MOST_DEATHS:
            return None
        return f"given up after {found['deaths']} attempts: {found['reason']}"

    def _read(self) -> Row:
        try:
            return json.loads(self._note.read_text())
        except (OSError, json.JSONDecodeError):
            return {"part": None, "deaths": 0, "reason": None}

    def _write(self, found: Row) -> None:
        partial = self._note.with_suffix(".partial")
        partial.write_text(to_json(found))
        os.replace(partial, self._note)


def measured_here(rows: Sequence[Row], environment: Row, *also: str) -> list[Row]:
    """Return the rows that were measured by the same sources, versions and kind of device.

    Args:
        also: what else of the environment has to be the same.
    """
    same = ("device", "torch", "triton", "sources", *also)
    return [row for row in rows if all(row.get("env", {}).get(name) == environment[name] for name in same)]
