"""The command `python -m benchmarks`: parses its arguments and runs one part of the suite."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from benchmarks.commands import compare, gpu, peers, readme, report, run, traffic, tune
from benchmarks.commands.arguments import Parser

DESCRIPTION = "Measure the kernels: what they move, what they compile to, how long they take."
COMMANDS = (traffic, run, report, compare, tune, peers, readme, gpu)
"""In the order of `--help`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 where a row is invalid or failed, or a kernel does not compile; 2 for wrong input; 3 where `gpu` has more
        to do; 70 after an error that nobody foresaw; 130 after Ctrl-C; 141 where what reads the output has gone.
    """
    parser = Parser(prog="python -m benchmarks", description=DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=Parser)
    for command in COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        try:
            return options.command(options)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        print(" ".join(f"python -m benchmarks: {error}".splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m benchmarks: interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return 70  # not Python's 1, which says that all was measured


if __name__ == "__main__":
    sys.exit(main())
