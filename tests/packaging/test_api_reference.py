"""kernels/API.md: current, whole, and written as Markdown."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import soda_kernels
from tests.packaging.source_tree import ROOT


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_reference", ROOT / "kernels" / "api_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_current(generator: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert generator.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_one_is_told_and_written(
    generator: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "API.md"
    page.write_text("old")
    assert generator.main(["--check", "--out", str(page)]) == 1
    assert capsys.readouterr().err == f"{page} is stale: run `make api`\n" and page.read_text() == "old"
    assert generator.main(["--out", str(page)]) == 0 and generator.main(["--check", "--out", str(page)]) == 0


def test_every_public_name_has_a_heading_that_links_reach(generator: ModuleType) -> None:
    page = generator.page()
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), flags=re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert set(soda_kernels.__all__) <= set(headings) and len(set(anchors)) == len(anchors)
    assert set(re.findall(r"\]\(#(.+?)\)", page)) <= set(anchors)


def documented(x: int, *, scale: float | None = None) -> str:
    """Compute [N, *spatial] from `a * b`.

        y = a * b

    Args:
        x: one thing,
            and more of * it.

    Raises:
        ValueError, TypeError: never.
    """
    return f"{x}{scale}"


def test_a_docstring_becomes_markdown(generator: ModuleType) -> None:
    assert generator.signature("documented", documented) == "documented(x: int, *, scale: float | None = None) -> str"
    described = "\n".join(generator._described("documented", documented))
    assert r"Compute [N, \*spatial] from `a * b`." in described and "\n    y = a * b\n" in described
    assert "**Args**\n\n- `x`: one thing,\n  and more of \\* it.\n" in described
    assert "- `ValueError, TypeError`: never." in described
