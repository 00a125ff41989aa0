"""The command `tune`."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.cases import DTYPES, MEASURED_SETS
from benchmarks.commands.arguments import add_case_arguments, add_command
from benchmarks.families import FAMILIES, choose_cases


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "tune", run, "Time the candidates for each launch config on this GPU and keep the "
                         "fastest in the package's table.")  # fmt: skip
    add_case_arguments(parser, MEASURED_SETS)
    parser.add_argument("--family", choices=tuple(FAMILIES), default="group_norm",
                        help="of kernels; %(default)s if not given")  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16",
                        help="the activations'; %(default)s if not given")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Tune, saying what was found as it is."""
    import torch

    from benchmarks.tune import tune_family

    family = FAMILIES[options.family]
    chosen = choose_cases([family], options.cases, options.layouts, options.dtype, usual=MEASURED_SETS)
    (cases,) = chosen.values()
    if not torch.cuda.is_available():
        raise ValueError("tune times kernels on a GPU, and PyTorch finds no CUDA device")
    for line in tune_family(family, cases, torch.device("cuda")):
        print(line, flush=True)
    return 0
