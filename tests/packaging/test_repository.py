"""What every file owes its readers: no machine's paths, no dead links, one version, a readable length."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.packaging.source_tree import PROJECT, ROOT, tracked_files

MACHINE_PATH = re.compile(r"(?<![\w.~:/)}\]-])/(?:work|root|home/\w+|Users/\w+)(?![\w.-])")
REGISTRY_HOST = re.compile(r"\b(?:py(?:pi|thonhosted)|npmjs|debian)\.(?:org|com)\b|pytorch\.org/whl|\bindex[-_]url\b")
LINK = re.compile(r"""(?:\]\(|<(?:img|a)\s[^>]*?(?:src|href)=["'])([^)\s"'#]+)""")
MOST_LINES = 450


def breaches_of_text(text: str) -> list[str]:
    """List the paths of one machine and the addresses of package registries in a text, as `line: what`."""
    return [
        f"{number}: {found[0]}"
        for number, line in enumerate(text.splitlines(), start=1)
        for pattern in (MACHINE_PATH, REGISTRY_HOST)
        for found in pattern.finditer(line)
    ]


def dead_links(path: Path, text: str) -> list[str]:
    """List the local files that a Markdown text links to and that do not exist."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = [target for target in LINK.findall(prose) if not re.match(r"[a-z]+:", target)]
    return [target for target in targets if not (path.parent / target).exists()]


def test_no_machine_path_or_registry_host() -> None:
    texts = {path: path.read_bytes().decode(errors="replace") for path in tracked_files()}
    breaches = {str(path.relative_to(ROOT)): breaches_of_text(text) for path, text in texts.items()}
    assert not {path: found for path, found in breaches.items() if found}


@pytest.mark.parametrize(
    ("text", "breaks"),
    [
        ("cd " + "/".join(["", "work", "main"]), True),
        ("cache in " + "/".join(["", "home", "ada", "x"]), True),
        ("pip install --extra-index" + "-url=x", True),
        ("https://" + ".".join(["pypi", "org"]), True),
        ("see docs/work/plan.md and ./work and a/home/ada", False),
        ("$(BUILD)/work", False),
        ("/workshop", False),
    ],
)
def test_rule_of_text(text: str, breaks: bool) -> None:
    assert bool(breaches_of_text(text)) == breaks


def test_links_lead_somewhere() -> None:
    documents = tracked_files(".md")
    assert documents
    dead = {str(path.relative_to(ROOT)): dead_links(path, path.read_text()) for path in documents}
    assert not {path: links for path, links in dead.items() if links}


def test_rule_of_links(tmp_path: Path) -> None:
    (tmp_path / "here.md").touch()
    text = "[a](here.md#part) [b](#part) [c](https://example.org/x.md)\n```\n[d](gone.md)\n```\n![e](gone.png)"
    assert dead_links(tmp_path / "README.md", text) == ["gone.png"]
    assert dead_links(tmp_path / "README.md", '<img width="9" src="lost.png">') == ["lost.png"]


def test_files_are_short_enough_to_read() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in tracked_files(".py")}
    assert not {str(path): n for path, n in lengths.items() if n > MOST_LINES and path.parts[0] != "tests"}


def test_one_version() -> None:
    newest = re.search(r"^## ([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert newest and cited
    assert newest[1] == cited[1] == PROJECT["version"]
