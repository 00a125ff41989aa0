"""The command `traffic`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from benchmarks import tables
from benchmarks.cases import DTYPES, MEASURED_SETS
from benchmarks.commands.arguments import add_case_arguments, add_command, names, result_file
from benchmarks.families import TRITON_FAMILIES, choose_cases

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands, "traffic", run,
        "Print the bytes that each kernel moves over the least it could, metered in Triton's interpreter, and what it "
        "compiles to; needs no GPU.",
    )  # fmt: skip
    add_case_arguments(parser, TRITON_FAMILIES.values(), MEASURED_SETS)
    parser.add_argument("--family", type=names("family with Triton kernels", TRITON_FAMILIES),
                        default=tuple(TRITON_FAMILIES), metavar="FAMILIES",
                        help=f"of {', '.join(TRITON_FAMILIES)}; all if not given")  # fmt: skip
    parser.add_argument("--modes", type=names("mode", ("fwd", "bwd")), default=("fwd", "bwd"), metavar="MODES",
                        help="of fwd, bwd; both if not given")  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16",
                        help="the activations'; %(default)s if not given")  # fmt: skip
    parser.add_argument("--arch", type=names("architecture", ARCHITECTURES), default=("sm_90",), metavar="ARCHS",
                        help=f"of {', '.join(ARCHITECTURES)}; sm_90 if not given")  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="meter the bytes, and compile nothing")
    parser.add_argument("--json", type=result_file, metavar="PATH", help="write a list of rows there")


def run(options: argparse.Namespace) -> int:
    """Meter, compile and print; 1 where a kernel does not compile."""
    # Triton reads it when it is first imported; what is compiled here is compiled in another process.
    os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.traffic import traffic_rows, traffic_table
    from soda_engine.records import write_json
    from tests.harness.compilation import CompileError

    families = [TRITON_FAMILIES[name] for name in options.family]
    chosen = choose_cases(families, options.cases, options.layouts, options.dtype, usual=MEASURED_SETS)
    cases = [(TRITON_FAMILIES[name], case) for name, cases in chosen.items() for case in cases]
    rows = []
    try:
        for row in traffic_rows(cases, options.modes, () if options.no_compile else options.arch):
            rows.append(row)
    except CompileError as error:
        print(" ".join(f"python -m benchmarks: {error}".splitlines()), file=sys.stderr)
        return 1
    finally:
        tables.end_progress()
    print(traffic_table(rows))
    if options.json is not None:
        write_json(options.json, rows)
    return 0
