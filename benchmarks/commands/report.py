"""The command `report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.commands.arguments import add_command
from benchmarks.result_files import RESULTS, chosen_files, newest_files


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands, "report", run,
        "Write files of results as one HTML page with tables and pictures, which needs no network, and as Markdown.",
    )  # fmt: skip
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE",
                        help="files of `run --json`, or folders of them; the newest of each suite, dtype and device "
                             "under benchmarks/results if not given")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/report"), metavar="DIR",
                        help="where report.html and report.md go; %(default)s if not given")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Draw, write, and say where."""
    files = chosen_files(options.files) if options.files else newest_files(RESULTS)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out is {options.out}, a file; it must be a folder")
    try:
        from benchmarks.report.sections import section_of
        from benchmarks.report.writing import write_report
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install '.[bench]' brings it") from error
    sections = []
    try:
        for index, file in enumerate(files):
            tables.show_progress(f"{index + 1}/{len(files)} {file.path.name}")
            sections.append(section_of(file))
    finally:
        tables.end_progress()
    for path in write_report(sections, options.out):
        print(path)
    return 0
