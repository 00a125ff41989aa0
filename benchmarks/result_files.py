"""Files of results read back: their rows, and which file is the newest of its suite and device."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.providers import OURS

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class ResultFile:
    """The rows of one file."""

    path: Path
    rows: list[Row]

    @property
    def folder(self) -> str:
        """The device's, by its name."""
        return self.path.resolve().parent.name

    @property
    def utc(self) -> str:
        """When its last row was measured."""
        return max(row["env"]["utc"] for row in self.rows)

    @property
    def environment(self) -> Row:
        """The machine and the versions, as its last row tells them."""
        return max((row["env"] for row in self.rows), key=lambda env: env["utc"])

    @property
    def subjects(self) -> set[tuple[str, str | None]]:
        """The suites and dtypes that it has rows of."""
        return {(row["suite"], row["case"].get("dtype")) for row in self.rows}


def read_results(path: Path) -> ResultFile:
    """Read a file of rows; a last line that was cut short is left out, as that of a machine that was taken away.

    Raises:
        ValueError: there is no row, or a line is none.
        OSError: the file cannot be read.
    """
    rows = []
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and rows:
                break
            raise ValueError(f"{path}: line {number} is not JSON") from error
        if not _is_row(row):
            raise ValueError(f"{path}: line {number} is no row of `python -m benchmarks run --json`")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no row")
    return ResultFile(path=path, rows=rows)


def _is_row(value: Any) -> bool:
    """Tell whether a value has what is read of a row everywhere."""
    return (
        isinstance(value, dict)
        and value.keys() >= {"schema", "suite", "op", "provider", "mode", "timer", "stats", "status", "reason"}
        and isinstance(value.get("case"), dict) and "id" in value["case"]
        and isinstance(value.get("env"), dict) and value["env"].keys() >= {"device", "torch", "git", "utc"}
    )  # fmt: skip


def files_in(folder: Path) -> list[ResultFile]:
    """Read the files of rows in a folder and in those in it; other JSONL, as of a run's metrics, is passed by."""
    found = []
    for path in sorted(folder.rglob("*.jsonl")):
        with path.open() as file:
            try:
                is_rows = _is_row(json.loads(file.readline()))
            except json.JSONDecodeError:
                is_rows = False
        if is_rows:
            found.append(read_results(path))
    return found


def newest_files(folder: Path = RESULTS) -> list[ResultFile]:
    """Return the newest file of each suite, dtype and device, by the times in their rows; devices from a to z.

    Raises:
        ValueError: there is none.
    """
    newest: dict[tuple[str, str, str | None], ResultFile] = {}
    for file in files_in(folder):
        for subject in file.subjects:
            key = (file.folder, *subject)
            if key not in newest or newest[key].utc < file.utc:
                newest[key] = file
    if not newest:
        raise ValueError(f"{folder} has no file of rows; `python -m benchmarks run --json` writes one")
    chosen = {file.path: file for file in newest.values()}
    return sorted(chosen.values(), key=lambda file: (file.folder, file.path.name))


def chosen_files(paths: Sequence[Path]) -> list[ResultFile]:
    """Read what was named: files, and every file of rows in folders.

    Raises:
        ValueError: a file is none of rows, or a folder has none.
        OSError: one cannot be read.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        files = files_in(path) if path.is_dir() else [read_results(path)]
        if not files:
            raise ValueError(f"{path} has no file of rows")
        found += files
    return found


def on_gpu(row: Row) -> bool:
    """Tell whether a row was measured on a GPU."""
    return row["env"].get("driver") is not None


def is_rate(row: Row) -> bool:
    """Tell whether a row counts images a second of a pipeline or a run, and has no times of calls."""
    return row["stats"]["p50"] is None and row.get("images_per_s") is not None


def newest_rows(rows: Iterable[Row]) -> list[Row]:
    """Keep of each case, provider, mode and timer the last row, since the same command again appends."""
    return list({row_key(row): row for row in rows}.values())


def row_key(row: Row) -> tuple[str, ...]:
    """Return what a row is of: suite, op, case, layout, dtype, provider, mode and timer; of others also the variant.

    Ours is the backend or the kernel that was chosen, which another version may choose differently.
    """
    case, provider = row["case"], row["provider"]
    return tuple(
        str(part)
        for part in (row["suite"], row["op"], case["id"], case.get("layout"), case.get("dtype"), provider,
                     None if provider == OURS else row["variant"], row["mode"], row["timer"])
    )  # fmt: skip
