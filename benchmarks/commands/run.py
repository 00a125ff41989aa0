"""The command `run`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import tables
from benchmarks.cases import CPU_SETS, DTYPES, MODES
from benchmarks.commands.arguments import add_case_arguments, add_command, names, pace_name, result_file
from benchmarks.diffusion.loop import LOOP_CASES
from benchmarks.end_to_end.cases import CASE_NAMES, OPS
from benchmarks.end_to_end.cases import PROVIDERS as END_TO_END_PROVIDERS
from benchmarks.end_to_end.cases import SUITE as END_TO_END
from benchmarks.families import LOOPS, SUITES, choose_cases
from benchmarks.providers import BASELINE

if TYPE_CHECKING:
    import torch

    from benchmarks.journal import Journal

ALL_SUITES = (*SUITES, LOOPS, END_TO_END)
PROVIDERS = tuple(
    dict.fromkeys((*(each.name for family in SUITES.values() for each in family.providers), *END_TO_END_PROVIDERS))
)


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "run", run, "Time a suite: every provider, checked first, in turn with the others.")
    add_case_arguments(parser, SUITES.values(), CPU_SETS, {END_TO_END: CASE_NAMES})
    parser.add_argument("--suite", type=names("suite", ALL_SUITES), default=("norm",), metavar="SUITES",
                        help="norm: modulated group norm; attention; diffusion: noising and loss, sampler steps; "
                             "conv: 3x3 convolutions, on a CPU; sampling: whole loops, graphed and not; e2e: training "
                             "steps, sampling and encoding; with commas between, one after the other, each with those "
                             "of --cases, --layouts and --providers that it has; norm if not given")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="%(default)s if not given; on a CPU batches are cut down")  # fmt: skip
    parser.add_argument("--modes", type=names("mode", MODES), default=MODES, metavar="MODES",
                        help=f"of {', '.join(MODES)}; all if not given; bwd repeats one graph's backward")  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES),
                        help="the activations'; fp32 on a CPU, bf16 on a GPU if not given")  # fmt: skip
    parser.add_argument("--ops", type=names("op", OPS), default=OPS, metavar="OPS",
                        help=f"of {', '.join(OPS)}, in the suite {END_TO_END}; all if not given")  # fmt: skip
    parser.add_argument("--providers", type=names("provider", PROVIDERS), metavar="PROVIDERS",
                        help=f"of {', '.join(PROVIDERS)}; each suite those that it has, all if not given")  # fmt: skip
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--brief", action="store_true", help="fewer repetitions: A/A spreads are wider")
    pace.add_argument("--quick", action="store_true", help="few repetitions: to see that it works, not how fast")
    parser.add_argument("--json", type=result_file, metavar="PATH",
                        help="append one JSON object a line there, as rows come in")  # fmt: skip
    parser.add_argument("--resume", action="store_true",
                        help="measure what the file of --json does not hold yet of these sources, versions and tuned "
                             "tables; what has ended its process twice becomes rows that say so")  # fmt: skip
    parser.add_argument("--profile", type=Path, metavar="FOLDER",
                        help="also write a profiler trace (Chrome JSON) of three calls by each provider there, taken "
                             "after a case's times, with kernel calls as NVTX ranges")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Time and print; 1 where a row is invalid or failed."""
    if options.resume and options.json is None:
        raise ValueError("--resume goes on with the file of --json, which is not given")
    import torch

    from benchmarks.journal import Journal
    from benchmarks.records import describe_environment

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and PyTorch finds no CUDA device")
    device = torch.device(options.device)
    untraced = [suite for suite in options.suite if suite not in SUITES]
    if options.profile is not None and untraced:
        raise ValueError(f"--profile is {options.profile}; the suite {untraced[0]} takes no traces")
    journal = Journal(options.json, describe_environment(device), resume=options.resume)
    for suite in options.suite:
        own = options if len(options.suite) == 1 else _options_of(suite, options)
        if own is not None:
            print(_RUNNERS.get(suite, _run_family)(suite, own, device, journal), flush=True)
    statuses = {row["status"] for row in journal.rows if row["suite"] in options.suite}
    return 1 if statuses & {"invalid", "failed"} else 0


def _options_of(suite: str, options: argparse.Namespace) -> argparse.Namespace | None:
    """Return the options with what a suite has of cases, layouts and providers; None where it has nothing of one."""
    if suite in SUITES:
        family = SUITES[suite]
        providers = [provider.name for provider in family.providers]
        there = {"cases": tuple(family.shapes), "layouts": family.layouts, "providers": providers}
    else:
        there = {"cases": {LOOPS: tuple(LOOP_CASES), END_TO_END: CASE_NAMES}[suite]}
        if suite == END_TO_END:
            there["providers"] = END_TO_END_PROVIDERS
    own = vars(options) | {"layouts": None}
    for kind, names_there in there.items():
        asked = getattr(options, kind)
        own[kind] = asked and tuple(name for name in asked if name in names_there)
        if own[kind] == ():
            return None
    return argparse.Namespace(**own)


def _dtype(options: argparse.Namespace, device: torch.device) -> str:
    return options.dtype or ("fp32" if device.type == "cpu" else "bf16")


def _run_family(suite: str, options: argparse.Namespace, device: torch.device, journal: Journal) -> str:
    """Measure the cases of one op, and return the table."""
    from benchmarks.journal import Part
    from benchmarks.suite import PACES, case_modes, suite_rows
    from benchmarks.summary import summarize_rows

    family = SUITES[suite]
    providers = [each for each in family.providers if options.providers is None or each.name in options.providers]
    if not providers:
        raise ValueError(f"--providers is {','.join(options.providers)}, of which {suite} has none")
    chosen = choose_cases([family], options.cases, options.layouts, _dtype(options, device), usual=CPU_SETS, timed=True,
                          on_cpu=device.type == "cpu")  # fmt: skip
    (cases,) = chosen.values()
    parts = {
        (case, mode): Part(suite, case.op, case.to_dict(), mode)
        for case in cases
        for mode in case_modes(case, options.modes)
    }
    wanted = journal.wanted(parts, [provider.name for provider in providers])
    pace = PACES[pace_name(options)]
    measured = suite_rows(
        family, cases, options.modes, device, pace, providers, wanted=lambda case, mode: (case, mode) in wanted,
        traces=options.profile,
    )  # fmt: skip
    try:
        for index, (case, mode) in enumerate(wanted):
            tables.show_progress(f"{index + 1}/{len(wanted)} {case.id} {case.layout} {mode}")
            journal.take(parts[case, mode], measured)
    finally:
        tables.end_progress()
    return summarize_rows(journal.rows_of(suite))


def _run_loops(suite: str, options: argparse.Namespace, device: torch.device, journal: Journal) -> str:
    """Measure whole sampling loops, and return the table."""
    from benchmarks.diffusion.loop import GRAPHED, OP, loop_cases, loop_rows, loop_table
    from benchmarks.journal import Part
    from benchmarks.suite import PACES

    if options.layouts is not None:
        raise ValueError(f"--layouts is {','.join(options.layouts)}; the suite {suite} has none")
    pace, dtype = PACES[pace_name(options)], _dtype(options, device)
    parts = {case: Part(suite, OP, case.to_dict(dtype), "fwd") for case in loop_cases(options.cases, device)}
    wanted = journal.wanted(parts, (BASELINE, GRAPHED))
    measured = loop_rows(wanted, device, dtype, budget_s=pace.budget_s, min_rounds=pace.min_rounds)
    try:
        for index, case in enumerate(wanted):
            tables.show_progress(f"{index + 1}/{len(wanted)} {case.id}")
            journal.take(parts[case], measured)
    finally:
        tables.end_progress()
    return loop_table(journal.rows_of(suite))


def _run_end_to_end(suite: str, options: argparse.Namespace, device: torch.device, journal: Journal) -> str:
    """Measure training steps, sampling and encoding, and return the table."""
    from benchmarks.end_to_end.command import run_end_to_end
    from benchmarks.end_to_end.tables import end_to_end_table

    run_end_to_end(options, device, _dtype(options, device), journal)
    return end_to_end_table(journal.rows_of(suite))


_RUNNERS = {LOOPS: _run_loops, END_TO_END: _run_end_to_end}
