"""`python -m benchmarks run --suite e2e`: which cases and ops, at what pace, and where the rows go."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch

from benchmarks import tables
from benchmarks.commands.arguments import pace_name
from benchmarks.end_to_end.cases import DTYPES, LOSS_CURVE, SUITE, choose_cases
from benchmarks.end_to_end.loss_curve import REFERENCE
from benchmarks.end_to_end.providers import Contender, contenders
from benchmarks.end_to_end.suite import MODES, case_ops, end_to_end_rows
from benchmarks.journal import Journal, Part
from benchmarks.providers import OURS
from benchmarks.suite import PACES

_LONGER: dict[str, dict[str, Any]] = {
    "full": {"budget_s": 12.0, "min_rounds": 5}, "brief": {"budget_s": 4.0, "min_rounds": 4}, "quick": {}
}  # fmt: skip
"""Than of a kernel: steps take from 50 ms to seconds, and the full pace is some forty rounds of the smallest case and
five of the largest."""


def run_end_to_end(options: argparse.Namespace, device: torch.device, dtype: str, journal: Journal) -> None:
    """Measure what the journal lacks.

    Raises:
        ValueError: an option has no meaning here.
    """
    if options.layouts is not None:
        raise ValueError(f"--layouts is {','.join(options.layouts)}; the suite {SUITE} runs rivals in both")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype}; the suite {SUITE} has {' and '.join(DTYPES)}")

    def chosen(op: str, dtype: str) -> list[Contender]:
        ways, names = contenders(op, dtype), options.providers
        return [way for way in ways if (way.by_default if names is None else way.provider in names)]

    cases = choose_cases(options.cases, device.type)
    wanted = []
    for case in cases:
        for op in case_ops(case, options.ops, dtype):
            measured_as = "train_step" if op == LOSS_CURVE else op
            part = Part(SUITE, op, case.to_dict(measured_as, dtype), MODES[op])
            names = (OURS, REFERENCE) if op == LOSS_CURVE else [way.provider for way in chosen(op, dtype)]
            wanted += [(each, part) for each in journal.wanted({(case.name, op): part}, names)]
    keys = {key for key, _ in wanted}
    name = pace_name(options)
    pace = dataclasses.replace(PACES[name], **_LONGER[name])
    measured = end_to_end_rows(
        cases, options.ops, device, dtype, pace, tables.show_progress, chosen,
        wanted=lambda case, op: (case.name, op) in keys,
    )  # fmt: skip
    try:
        for _, part in wanted:
            journal.take(part, measured)
    finally:
        tables.end_progress()
