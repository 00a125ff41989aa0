"""The command `run`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.cases import CPU_SETS, DTYPES, MODES
from benchmarks.commands.arguments import add_case_arguments, add_command, check_writable, names
from benchmarks.families import LOOPS, SUITES, choose_cases


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "run", run, "Time a suite: every provider, checked first, in turn with the others.")
    add_case_arguments(parser, CPU_SETS)
    parser.add_argument("--suite", choices=(*SUITES, LOOPS), default="norm",
                        help="norm: modulated group norm; attention; diffusion: noising and loss, sampler steps; "
                             "sampling: whole loops, graphed and not; "
                             "%(default)s if not given")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="%(default)s if not given; on a CPU batches are cut down")  # fmt: skip
    parser.add_argument("--modes", type=names("mode", MODES), default=MODES, metavar="MODES",
                        help=f"of {', '.join(MODES)}; all if not given; bwd repeats one graph's backward")  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES),
                        help="the activations'; fp32 on a CPU, bf16 on a GPU if not given")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few repetitions: to see that it works, not how fast")
    parser.add_argument("--json", type=Path, metavar="PATH",
                        help="append one JSON object a line there, as rows come in")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Time and print; 1 where a row is invalid or failed."""
    check_writable(options.json)
    import torch

    from benchmarks.records import append_row
    from benchmarks.suite import PACES, case_modes, suite_rows
    from benchmarks.summary import summarize_rows

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and PyTorch finds no CUDA device")
    device = torch.device(options.device)
    on_cpu = device.type == "cpu"
    dtype = options.dtype or ("fp32" if on_cpu else "bf16")
    if options.suite == LOOPS:
        return _run_loops(options, device, dtype)
    family = SUITES[options.suite]
    chosen = choose_cases([family], options.cases, options.layouts, dtype, usual=CPU_SETS, timed=True, on_cpu=on_cpu)
    (cases,) = chosen.values()
    parts = [(case, mode) for case in cases for mode in case_modes(case, options.modes)]
    rows: list[dict[str, Any]] = []
    measured = suite_rows(family, cases, options.modes, device, PACES["quick" if options.quick else "full"])
    try:
        for index, (case, mode) in enumerate(parts):
            tables.show_progress(f"{index + 1}/{len(parts)} {case.id} {case.layout} {mode}")
            new = next(measured)
            for row in new if options.json is not None else ():
                append_row(options.json, row)
            rows += new
    finally:
        tables.end_progress()
    print(summarize_rows(rows))
    return 1 if any(row["status"] in ("invalid", "failed") for row in rows) else 0


def _run_loops(options: argparse.Namespace, device: Any, dtype: str) -> int:
    from benchmarks.diffusion.loop import loop_cases, loop_rows, loop_table
    from benchmarks.records import append_row
    from benchmarks.suite import PACES

    if options.layouts is not None:
        raise ValueError(f"--layouts is {','.join(options.layouts)}; the suite {options.suite} has none")
    pace, rows = PACES["quick" if options.quick else "full"], []
    cases = loop_cases(options.cases, device)
    for new in loop_rows(cases, device, dtype, budget_s=pace.budget_s, min_rounds=pace.min_rounds):
        for row in new if options.json is not None else ():
            append_row(options.json, row)
        rows += new
    print(loop_table(rows))
    return 1 if any(row["status"] == "invalid" for row in rows) else 0
