"""The command `readme`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks.commands.arguments import add_command
from benchmarks.performance import README, performance_section, with_section


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "readme", run,
                         "Write the newest results under benchmarks/results between README's markers.")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing, and exit 1 where README is stale")


def run(options: argparse.Namespace) -> int:
    """Write, or check; 1 where it is stale."""
    text = README.read_text()
    wanted = with_section(text, performance_section())
    if text == wanted:
        return 0
    if options.check:
        print("python -m benchmarks: README.md is stale: run `python -m benchmarks readme`", file=sys.stderr)
        return 1
    README.write_text(wanted)
    print(README)
    return 0
