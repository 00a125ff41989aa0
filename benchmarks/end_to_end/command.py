"""`python -m benchmarks run --suite e2e`: which cases and ops, at what pace, and where the rows go."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch

from benchmarks import tables
from benchmarks.end_to_end.cases import DTYPES, SUITE, choose_cases
from benchmarks.end_to_end.suite import end_to_end_rows
from benchmarks.end_to_end.tables import end_to_end_table
from benchmarks.records import append_row
from benchmarks.suite import PACES

_FULL = {"budget_s": 12.0, "min_rounds": 5}
"""Steps take from 50 ms to seconds: this is some forty rounds of the smallest case and five of the largest."""


def run_end_to_end(options: argparse.Namespace, device: torch.device, dtype: str) -> int:
    """Run the suite, print its table and return the command's exit status.

    Raises:
        ValueError: an option has no meaning here.
    """
    if options.layouts is not None:
        raise ValueError(f"--layouts is {','.join(options.layouts)}; the suite {SUITE} runs rivals in both")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype}; the suite {SUITE} has {' and '.join(DTYPES)}")
    cases = choose_cases(options.cases, device.type)
    pace = PACES["quick"] if options.quick else dataclasses.replace(PACES["full"], **_FULL)
    rows: list[dict[str, Any]] = []
    try:
        for new in end_to_end_rows(cases, options.ops, device, dtype, pace, tables.show_progress):
            for row in new if options.json is not None else ():
                append_row(options.json, row)
            rows += new
    finally:
        tables.end_progress()
    print(end_to_end_table(rows))
    return 1 if any(row["status"] in ("invalid", "failed") for row in rows) else 0
