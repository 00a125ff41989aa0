"""Writes API.md, the reference of `soda_kernels.__all__`, from signatures and docstrings.

`make api` runs it. With --check it writes nothing and exits with 1 where the file is stale.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import soda_kernels

PAGE = Path(__file__).with_name("API.md")
WIDTH = 100
"""Signatures that are longer are written a parameter a line."""

FAMILIES = {
    "group_norm": "Modulated group norm",
    "attention": "Attention at the lengths of U-Nets",
    "diffusion": "Noise schedules, noising, loss and sampler steps",
    "": "Choosing, asking, measuring",
}
"""The headings, by the folder that a name is from; the last for what is from none of these."""

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Reference|Args, Returns, Raises, Reference):$")
_ENTRY = re.compile(r"^([\w, ]+): ")


class _Verbatim:
    """An annotation that is written as its source has it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def page() -> str:
    """Return the whole page."""
    names: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name in soda_kernels.__all__:
        folder = getattr(soda_kernels, name).__module__.split(".")[1]
        names[folder if folder in FAMILIES else ""].append(name)
    lines = ["# Reference of soda_kernels", "", "Written by `make api` from the docstrings: edit those.", ""]
    for family, heading in FAMILIES.items():
        links = ", ".join(f"[`{name}`](#{name.lower()})" for name in names[family])
        lines += [f"- {heading}: {links}"]
    for family, heading in FAMILIES.items():
        lines += ["", f"## {heading}"]
        for name in names[family]:
            lines += ["", f"### {name}", "", *_described(name, getattr(soda_kernels, name))]
    return "\n".join(lines) + "\n"


def _described(name: str, value: Any) -> Iterator[str]:
    """Describe a function, or a class and its own public methods."""
    yield from ("```python", signature(name, value), "```", "", *markdown(inspect.getdoc(value) or ""))
    if not inspect.isclass(value):
        return
    for member, kept in vars(value).items():
        method = getattr(value, member)
        if member.startswith("_") or not inspect.isroutine(method) or not (inspect.getdoc(method) and kept.__doc__):
            continue
        yield from ("", f"#### {name}.{member}", "", "```python", signature(f"{name}.{member}", method), "```", "")
        yield from markdown(inspect.getdoc(method) or "")


def signature(name: str, value: Any) -> str:
    """Write a call's signature, on one line if it fits."""
    found = inspect.signature(value)
    parts, keyword_only = [], False
    for parameter in found.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            keyword_only = True
        elif parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
            keyword_only = True
        if isinstance(parameter.annotation, str):
            parameter = parameter.replace(annotation=_Verbatim(parameter.annotation))
        parts.append(str(parameter))
    returned = found.return_annotation
    result = "" if inspect.isclass(value) or returned is found.empty else f" -> {_name(returned)}"
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) <= WIDTH:
        return line
    return "\n".join((f"{name}(", *(f"    {part}," for part in parts), f"){result}"))


def _name(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def markdown(docstring: str) -> Iterator[str]:
    """Turn a docstring's sections into lists and paragraphs; indented blocks before them stay as they are."""
    in_section = False
    for line in docstring.splitlines():
        section = _SECTION.match(line)
        if section:
            in_section = True
            yield from (f"**{section[1]}**", "")
        elif not in_section:
            yield line if line.startswith("    ") else _escaped(line)
        elif line.startswith("     "):
            yield f"  {_escaped(line.strip())}"
        else:
            entry = _ENTRY.match(line.strip())
            text = line.strip()
            yield f"- `{entry[1]}`: {_escaped(text[entry.end() :])}" if entry else _escaped(text)


def _escaped(text: str) -> str:
    """Keep asterisks outside of code from setting text in italics."""
    parts = text.split("`")
    return "`".join(part if place % 2 else part.replace("*", r"\*") for place, part in enumerate(parts))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 where --check finds the file stale."""
    parser = argparse.ArgumentParser(description="Write the reference of soda_kernels from its docstrings.")
    parser.add_argument("--out", type=Path, default=PAGE, help="the file (API.md beside this script)")
    parser.add_argument("--check", action="store_true", help="write nothing, and exit 1 where the file is stale")
    options = parser.parse_args(arguments)
    wanted = page()
    if options.out.exists() and options.out.read_text() == wanted:
        return 0
    if options.check:
        print(f"{options.out} is stale: run `make api`", file=sys.stderr)
        return 1
    options.out.write_text(wanted)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
