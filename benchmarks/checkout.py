"""Which code is here: its commit, and a digest of its sources, which tells it where git does not."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from soda_kernels import _tuning

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ROOT / "carried"
"""What `make carry` gathered for a machine that can fetch nothing."""
COMMIT = CARRIED / "commit.txt"

MEASURED = ("kernels", "engine", "benchmarks")
"""Folders whose sources can change what is measured."""
_SUFFIXES = (".py", ".cpp", ".h")


@functools.cache
def sources_digest(folders: tuple[str, ...] = MEASURED) -> str:
    """Return a digest of every source in some folders of the checkout."""
    files = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in _SUFFIXES)
    found = hashlib.sha256()
    for path in sorted([ROOT / "CMakeLists.txt", *files]):
        content = path.read_bytes()
        found.update(f"{path.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return found.hexdigest()[:12]


def tables_digest() -> str | None:
    """Return a digest of the package's tuned launch configs, whoever measured them; None where nothing was tuned."""
    tables = {path.name: json.loads(path.read_text())["configs"] for path in _tuning.TABLES.glob("*.json")}
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()[:12] if tables else None


def carried_commit() -> str | None:
    """Return the commit that was noted when the checkout was packed, with a + where it has changed since."""
    if not COMMIT.exists():
        return None
    commit, sources = COMMIT.read_text().split()
    return commit if commit.endswith("+") or sources == sources_digest() else f"{commit}+"

