"""README's performance section: the newest results as tables, with device, versions and file named."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.contents import (
    Table,
    case_table,
    describe,
    losses_of,
    means_table,
    noise_sentence,
    not_timed,
    worst_of,
)
from benchmarks.result_files import RESULTS, ResultFile, Row, is_rate, newest_files, newest_rows, on_gpu
from benchmarks.speed_ups import SpeedUp, place_of, speed_ups

README = Path(__file__).parents[1] / "README.md"
START = "<!-- performance: written by `python -m benchmarks readme`, not by hand -->"
END = "<!-- end of performance -->"
_FEW = 12
"""Cases and modes that are shown one by one; means stand for more."""
NO_GPU = "No file of a GPU is under `benchmarks/results` yet: nothing has been timed on one."


def performance_section(folder: Path = RESULTS, readme: Path = README) -> str:
    """Write the newest results of a CPU and of a GPU, a part for each suite.

    Args:
        folder: of the result files. readme: what its links start from.
    """
    files = [file for file in newest_files(folder) if not all(map(is_rate, file.rows))]
    parts = []
    for gpu in (True, False):
        chosen = _newest_of_suites([file for file in files if on_gpu(file.rows[0]) == gpu])
        parts += [_part(file, Path(os.path.relpath(file.path, readme.parent))) for file in chosen]
        if gpu and not chosen:
            parts.append(NO_GPU)
    return "\n\n".join(parts)


def _newest_of_suites(files: Sequence[ResultFile]) -> list[ResultFile]:
    """Keep of each suite and dtype the newest file, whatever its device."""
    newest: dict[tuple[str, str | None], ResultFile] = {}
    for file in sorted(files, key=lambda file: file.utc):
        newest.update(dict.fromkeys(file.subjects, file))
    chosen = {file.path: file for file in newest.values()}
    return [chosen[path] for path in sorted(chosen, key=lambda path: (path.parent.name, path.name))]


def _part(file: ResultFile, link: Path) -> str:
    """Tell of one file: where and with what, how fast, how much of it is noise, and the worst rows by name."""
    rows = newest_rows(row for row in file.rows if row["stats"]["p50"] or row["status"] != "ok")
    gains = speed_ups(rows)
    suites, dtypes = (", ".join(dict.fromkeys(names)) for names in zip(
        *((row["suite"], str(row["case"].get("dtype"))) for row in _timed(rows) or rows), strict=True
    ))  # fmt: skip
    lines = [
        _wrapped(
            f"**{suites}**, {dtypes}: how many times as long others took ({describe(file)}; "
            f"[{link.name}]({link.as_posix()}))"
        ),
        _table(rows, gains).markdown(),
        _wrapped(noise_sentence(rows)),
    ]
    losses = losses_of(gains)
    if losses:
        lines.append("Slower than another by more than noise:\n\n" + "\n".join(f"- {line}" for line in losses))
    elif gains:
        least = "; ".join(worst_of(gains))
        lines.append(_wrapped(f"No row is slower than another by more than noise; the least: {least}."))
    missing = not_timed(rows)
    if missing:
        lines.append(_wrapped(f"Not timed: {'; '.join(missing)}."))
    return "\n\n".join(filter(None, lines))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _timed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["stats"]["p50"]]


def _table(rows: Sequence[Row], gains: Sequence[SpeedUp]) -> Table:
    """Choose between every row, where they are few, and means."""
    if len({place_of(row) for row in _timed(rows)}) > _FEW and gains:
        return means_table(gains)
    return case_table(rows, gains)


def with_section(text: str, section: str) -> str:
    """Return README's text with a section between its markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"README.md must have {START!r} and below it {END!r}, once each")
    before, _, rest = text.partition(START)
    return f"{before}{START}\n\n{section}\n\n{END}{rest.partition(END)[2]}"
