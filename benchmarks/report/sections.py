"""A report's sections: one for each file, with its tables, pictures and lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.end_to_end.cases import LOSS_CURVE
from benchmarks.providers import BASELINE, OURS
from benchmarks.report import pictures
from benchmarks.report.contents import (
    Table,
    case_table,
    describe,
    losses_of,
    means_table,
    noise_sentence,
    not_timed,
    rates_table,
)  # fmt: skip
from benchmarks.report.figures import Picture
from benchmarks.result_files import ResultFile, Row, is_rate, newest_rows
from benchmarks.speed_ups import SpeedUp, fastest_rows, own_provider, speed_ups


@dataclass(kw_only=True)
class Part:
    """Rows of one op, layout, dtype and timer."""

    title: str
    table: Table
    pictures: list[Picture]


@dataclass(kw_only=True)
class Section:
    """What is said of one file."""

    title: str
    file_name: str
    description: str
    noise: str = ""
    means: Table | None = None
    losses: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


def section_of(file: ResultFile) -> Section:
    """Gather what is said of a file."""
    rows = newest_rows(file.rows)
    timed = [row for row in rows if row["op"] != LOSS_CURVE and not is_rate(row)]
    gains = speed_ups(timed)
    suites = ", ".join(dict.fromkeys(row["suite"] for row in rows))
    title = f"{file.folder}: {suites}"
    section = Section(
        title=title, file_name=file.path.name, description=describe(file), noise=noise_sentence(timed),
        means=means_table(gains) if gains else None, losses=losses_of(gains), missing=not_timed(rows),
    )  # fmt: skip
    groups = dict.fromkeys(_group(row) for row in timed)
    for group in groups:
        part_rows = [row for row in timed if _group(row) == group]
        part_gains = [gain for gain in gains if _group(gain.own) == group]
        section.parts.append(_part(group, part_rows, part_gains))
    rates = [row for row in file.rows if is_rate(row)]  # every evaluation of a run
    if rates:
        section.parts.append(Part(title="images a second", table=rates_table(rates), pictures=[]))
    section.pictures = [
        picture for picture in (
            pictures.roofline(f"{title}: roofline", timed), *_loss_pictures(title, rows)
        ) if picture
    ]  # fmt: skip
    return section


def _group(row: Row) -> tuple[str, ...]:
    case = row["case"]
    return tuple(str(part) for part in (row["op"], case.get("dtype"), case.get("layout"), row["timer"]) if part)


def _part(group: tuple[str, ...], rows: Sequence[Row], gains: Sequence[SpeedUp]) -> Part:
    title = ", ".join(group)
    drawn: list[Picture | None] = []
    for mode in dict.fromkeys(gain.own["mode"] for gain in gains):
        of_mode = [gain for gain in gains if gain.own["mode"] == mode]
        drawn.append(pictures.speed_up_bars(f"{title}, {mode}: speed-ups", of_mode))
    drawn.append(pictures.size_sweep(f"{title}: speed-ups by size", gains))
    for kind, name in (("peak_mib", "peak memory"), ("saved_for_backward_mib", "saved for backward")):
        kept = fastest_rows(rows)
        if kind != "peak_mib":  # as the tables: ours beside the baseline
            kept = [row for row in kept if row["provider"] in (own_provider(rows), BASELINE)]
        for mode in dict.fromkeys(row["mode"] for row in kept):
            of_mode = [row for row in kept if row["mode"] == mode]
            drawn.append(pictures.memory_bars(f"{title}, {mode}: {name}", of_mode, kind))
    return Part(title=title, table=case_table(rows, gains), pictures=[picture for picture in drawn if picture])


def _loss_pictures(prefix: str, rows: Sequence[Row]) -> list[Picture]:
    """Lay the losses of one case's providers over one another."""
    by_case: dict[str, dict[str, list[float | None]]] = {}
    for row in rows:
        if row["op"] == LOSS_CURVE and row["status"] == "ok":
            by_case.setdefault(row["case"]["id"], {})[row["provider"]] = row["losses"]
    for curves in by_case.values():  # ours above the others
        curves |= {name: curves.pop(name) for name in [OURS] if name in curves}
    return [pictures.loss_overlay(f"{prefix}, {case_id}: losses", curves) for case_id, curves in by_case.items()]
