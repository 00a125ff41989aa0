"""Arguments that commands share, and what is found out before minutes of work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.families import Family, layouts_of, shape_sets_of

Command = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def add_command(commands: Any, name: str, function: Command, text: str) -> argparse.ArgumentParser:
    """Add a command's parser to those of `argparse`; the text is its line in the list and the head of its help."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=function)
    return parser


def add_case_arguments(
    parser: argparse.ArgumentParser, families: Collection[Family], usual: Sequence[str],
    others: Mapping[str, Sequence[str]] | None = None,
) -> None:  # fmt: skip
    """Add the choice among some families' cases.

    Args:
        usual: shape sets where none are named.
        others: names of cases that are no family's, by what has them.
    """
    others = others or {}
    shapes, layouts = (
        "; ".join(f"{family.name} has {', '.join(getattr(family, kind))}" for family in families)
        for kind in ("shapes", "layouts")
    )
    shapes = "; ".join((shapes, *(f"{name} has {', '.join(cases)}" for name, cases in others.items())))
    accepted = (*shape_sets_of(families), *(case for cases in others.values() for case in cases))
    parser.add_argument(
        "--cases", type=names("shape set", accepted), metavar="SETS",
        help=f"shape sets with commas between: {shapes}; {','.join(usual)} if not given",
    )  # fmt: skip
    parser.add_argument("--layouts", type=names("layout", layouts_of(families)), metavar="LAYOUTS",
                        help=f"{layouts}; all if not given")  # fmt: skip


def names(kind: str, accepted: Sequence[str] | dict[str, Any]) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of names with commas between."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in found:
            if name not in accepted:
                raise argparse.ArgumentTypeError(f"{name!r} is no {kind}; accepted are {', '.join(accepted)}")
        return found

    return parse


def pace_name(options: argparse.Namespace) -> str:
    """Return which of `benchmarks.suite.PACES` the options ask for."""
    return "quick" if options.quick else "brief" if options.brief else "full"


def result_file(text: str) -> Path:
    """Parse the path of a file of results: found out before minutes of work whether they can be kept there."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; it must be a file")
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be written: {error.strerror}") from error
    if is_new:
        path.unlink()
    return path
