"""Sections written out: one page that needs no network, and the same tables as Markdown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import jinja2

from benchmarks.report.sections import Section

_FOLDER = Path(__file__).parent


def write_report(sections: Sequence[Section], folder: Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.md` into a folder, which is made where it lacks.

    Returns:
        Their paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pages = folder / "report.html", folder / "report.md"
    for path, text in zip(pages, (to_html(sections), to_markdown(sections)), strict=True):
        unfinished = path.with_name(f".unfinished-{path.name}")
        unfinished.write_text(text)
        os.replace(unfinished, path)
    return pages


def to_html(sections: Sequence[Section]) -> str:
    """Write a page with its pictures and styles in it."""
    loader = jinja2.FileSystemLoader(_FOLDER)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("page.html").render(sections=sections)


def to_markdown(sections: Sequence[Section]) -> str:
    """Write all but the pictures."""
    parts = ["# soda-engine benchmarks"]
    for section in sections:
        parts += [f"## {section.title}", f"{section.description}; `{section.file_name}`", section.noise]
        parts.append(section.means.markdown() if section.means else "")
        for title, lines in (
            ("Slower than another by more than noise:", section.losses), ("Not timed:", section.missing)
        ):  # fmt: skip
            if lines:
                parts += [title, "\n".join(f"- {line}" for line in lines)]
        for part in section.parts:
            parts += [f"### {part.title}", part.table.markdown()]
    return "\n\n".join(filter(None, parts)) + "\n"
