"""The command `tune`."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from benchmarks.cases import DTYPES, MEASURED_SETS
from benchmarks.commands.arguments import add_case_arguments, add_command, names, result_file
from benchmarks.families import TRITON_FAMILIES, choose_cases


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "tune", run, "Time the candidates for each launch config on this GPU and keep the "
                         "fastest in the package's table.")  # fmt: skip
    add_case_arguments(parser, TRITON_FAMILIES.values(), MEASURED_SETS)
    parser.add_argument("--family", type=names("family with Triton kernels", TRITON_FAMILIES),
                        default=("group_norm",), metavar="FAMILIES",
                        help=f"of {', '.join(TRITON_FAMILIES)}; group_norm if not given")  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16",
                        help="the activations'; %(default)s if not given")  # fmt: skip
    parser.add_argument("--json", type=result_file, metavar="PATH",
                        help="append every candidate's time there, one JSON object a line, as it comes in")
    parser.add_argument("--resume", action="store_true",
                        help="take what the file of --json holds of these sources and versions as measured")
    parser.add_argument("--tables", type=Path, metavar="DIR",
                        help="where tables are kept; in the package if not given")  # fmt: skip
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--from", type=Path, metavar="FILE", dest="source",
                        help="time nothing: keep in tables what a file of --json tells; needs no GPU")  # fmt: skip
    source.add_argument("--rehearse", action="store_true",
                        help="make times up, on a CPU, to see that it works; needs --tables")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Tune, saying what was found as it is."""
    if options.source is not None:
        return _run_from(options)
    if options.resume and options.json is None:
        raise ValueError("--resume goes on with the file of --json, which is not given")
    if options.rehearse and options.tables is None:
        raise ValueError("--rehearse makes times up, which are not for the package's tables: --tables says where to")
    import torch

    from benchmarks.records import describe_environment
    from benchmarks.tune import made_up, measure_on_gpu, tune_family
    from benchmarks.tune_log import Log
    from soda_kernels import _tuning

    families = [TRITON_FAMILIES[name] for name in options.family]
    chosen = choose_cases(families, options.cases, options.layouts, options.dtype, usual=MEASURED_SETS)
    if not options.rehearse and not torch.cuda.is_available():
        raise ValueError("tune times kernels on a GPU, and PyTorch finds no CUDA device")
    device = torch.device("cpu" if options.rehearse else "cuda")
    log = Log(options.json, describe_environment(device), resume=options.resume)
    save = functools.partial(_tuning.save_table, folder=options.tables)
    measure = made_up if options.rehearse else measure_on_gpu
    for family in families:
        for line in tune_family(family, chosen[family.name], device, measure=measure, save=save, log=log):
            print(line, flush=True)
    return 0


def _run_from(options: argparse.Namespace) -> int:
    from benchmarks.tune_log import tables_from

    for table, key in tables_from(options.source, options.tables):
        print(f"{table}: {key}")
    return 0
