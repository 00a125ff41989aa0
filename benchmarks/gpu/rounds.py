"""How far a round has come: a file beside its results, written before and after each chunk."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.checkout import sources_digest
from benchmarks.gpu.stages import Places
from benchmarks.tables import table
from soda_engine.records import write_json

DONE, UNFINISHED, FAILED, SKIPPED = "done", "unfinished", "failed", "skipped"

Record = dict[str, Any]


class Round:
    """What one state of the sources has been asked for on one machine, over any number of calls.

    Attributes:
        places: where its results go.
    """

    def __init__(self, folder: Path, commit: str | None, device: str) -> None:
        """Go on with the folder's newest round of these sources and this device, or begin one."""
        self._facts = {"device": device, "sources": sources_digest()}
        folder.mkdir(parents=True, exist_ok=True)
        found = [_read(path) for path in sorted(folder.glob("gpu-*.json"))]
        rounds = [each for each in found if each is not None and self._facts.items() <= each.items()]
        if rounds:
            self._record = max(rounds, key=lambda each: each["begun"])
        else:
            now = datetime.now(UTC)
            git = (commit or f"sources-{self._facts['sources']}").removesuffix("+")
            stem = f"{now:%Y-%m-%d}-{git}"
            self._record = {"begun": now.isoformat(timespec="seconds"), "stem": stem, "git": commit, **self._facts,
                            "parts": {}}  # fmt: skip
        self.places = Places(folder=folder.resolve(), stem=self._record["stem"])
        self._path = folder / f"gpu-{self._record['stem']}.json"

    def part(self, name: str) -> Record:
        """Return what is known of a part: its status and reason, how many chunks and seconds it has had."""
        blank = {"status": UNFINISHED, "reason": None, "code": None, "chunks": 0, "seconds": 0.0, "fruitless": 0}
        return self._record["parts"].setdefault(name, blank)

    def keep(self) -> None:
        """Write the file."""
        write_json(self._path, self._record)

    def results_size(self) -> int:
        """Count the bytes of results: they grow with what has been done."""
        return sum(path.stat().st_size for path in self.places.folder.rglob(f"{self.places.stem}*") if path.is_file())

    def describe(self, names: list[str]) -> str:
        """Write a table of some parts."""
        found = [self._record["parts"].get(name) or self.part(name) for name in names]
        return table(["part", "status", "chunks", "minutes", "note"], (
            [name, part["status"], str(part["chunks"]), f"{part['seconds'] / 60:.1f}", part["reason"] or ""]
            for name, part in zip(names, found, strict=True)
        ))  # fmt: skip


def _read(path: Path) -> Record | None:
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) and {"begun", "stem", "parts"} <= found.keys() else None


@contextmanager
def alone_in(folder: Path) -> Iterator[int]:
    """Keep others from working on the same results, and yield the open file that does so in whoever holds it.

    Raises:
        ValueError: another process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".gpu.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is at work in {folder}: wait for it, or name another --out") from None
        yield file.fileno()


def folder_name(device: str) -> str:
    """Return a device's folder under results: `NVIDIA H200` is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
