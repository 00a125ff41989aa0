"""The command `compare`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.commands.arguments import add_command
from benchmarks.comparison import Change, Comparison, compare
from benchmarks.report.contents import name_of
from benchmarks.result_files import Row, chosen_files
from benchmarks.tables import table


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands, "compare", run,
        "Compare two files of results, row by row, and list what became slower or faster by more than noise; exits 1 "
        "where something became slower or wrong. A row counts where its median, its least time and its median over the "
        "baseline's say so together.",
    )  # fmt: skip
    for name, which in (("before", "first"), ("after", "second")):
        parser.add_argument(name, type=Path, metavar=name.upper(),
                            help=f"the {which}: a file of `run --json`, or a folder of them")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="list every row, noise too")


def run(options: argparse.Namespace) -> int:
    """Compare and print; 1 where something became slower or wrong."""
    found = compare(chosen_files([options.before]), chosen_files([options.after]))
    print(describe(found, everything=options.all))
    return 1 if found.is_regression else 0


def describe(found: Comparison, *, everything: bool = False) -> str:
    """Write what a comparison found.

    Args:
        everything: list every row.
    """
    noise = len(found.changes) - len(found.slower) - len(found.faster)
    parts = [
        f"{len(found.changes)} rows compared: {len(found.slower)} slower, {len(found.faster)} faster, {noise} noise"
    ]
    if found.usual_threshold is not None:
        parts[0] += f"; below {math.expm1(found.usual_threshold):.1%} all is noise in the median row"
    if found.others_baseline:
        parts[0] += "; the versions of PyTorch differ, so that times are compared without the baseline's"
    elif found.drift:
        parts[0] += f"; the baseline takes {math.exp(found.drift):.2f}x as long everywhere, which is taken out of times"
    for each in found.together:
        if each.is_slower or each.is_faster:
            parts[0] += (
                f"\nall {each.num_rows} rows of {each.provider} together: {math.expm1(each.agreed):+.1%}, where "
                f"{math.expm1(each.threshold):.1%} would be noise"
            )
    for title, changes in (("slower", found.slower), ("faster", found.faster)):
        if changes:
            parts.append(f"{title}:\n{_table(changes)}")
    if everything and noise:
        parts.append(f"noise:\n{_table([each for each in found.changes if not (each.is_slower or each.is_faster)])}")
    for title, rows in (
        ("timed before, and now wrong", found.broken), ("of too few rounds to judge", found.unjudged),
        ("timed in the first alone", found.gone), ("timed in the second alone", found.added),
    ):  # fmt: skip
        if rows:
            parts.append("\n".join([f"{title}:", *(f"  {_row(row)}" for row in rows)]))
    return "\n\n".join(parts)


def _row(row: Row) -> str:
    reason = f": {row['reason']}" if row["reason"] else ""
    return f"{row['provider']} {name_of(row)}{reason}"


def _table(changes: Sequence[Change]) -> str:
    header = ["row", "before, us", "after, us", "time", "least", "vs baseline", "all say", "noise below"]
    return table(header, (
        [
            _row(change.before), *(f"{row['stats']['p50']:,.1f}" for row in (change.before, change.after)),
            *("-" if value is None else f"{math.expm1(value):+.1%}" for value in
              (change.time, change.least, change.relative, change.agreed)), f"{math.expm1(change.threshold):.1%}",
        ]
        for change in changes
    ))  # fmt: skip
