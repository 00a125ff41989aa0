"""A run's log: metrics.jsonl, tensorboard where it is installed, and a progress bar."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from soda_engine.records import to_json

METRICS_NAME = "metrics.jsonl"


class RunLog:
    """Where a run's records go; only the main process has one that writes.

    Args:
        run: the run's folder.
        images: images seen so far; later records of an interrupted run are dropped, since they will come again.
        total_images: the length of the progress bar.
        tensorboard: also write event files, where tensorboard is installed.
        enabled: False makes every method do nothing.
    """

    def __init__(self, run: Path, *, images: int, total_images: int, tensorboard: bool, enabled: bool) -> None:
        self._enabled = enabled
        interactive = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_images, initial=images, unit="img", unit_scale=True, dynamic_ncols=interactive,
            mininterval=0.5 if interactive else 30.0, disable=not enabled, desc=run.name,
        )  # fmt: skip
        self._writer: Any = None
        if not enabled:
            return
        path = run / METRICS_NAME
        keep_records(path, images)
        self._file = path.open("a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=images + 1)

    def write(self, kind: str, images: int, record: dict[str, Any]) -> None:
        """Append one record, flushed, with its kind and the images seen."""
        if not self._enabled:
            return
        self._file.write(to_json({"kind": kind, "images": images, **record}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in record.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{kind}/{name}", value, images)

    def advance(self, images: int, **postfix: str) -> None:
        """Move the progress bar, and show numbers beside it."""
        if postfix:
            self._bar.set_postfix(postfix, refresh=False)
        self._bar.update(images)

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        if self._enabled:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Finish the bar and the files."""
        self._bar.close()
        if self._enabled:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def keep_records(path: Path, images: int) -> None:
    """Drop the records after so many images, and a last line that a crash cut short, replacing the file in one step."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record.get("images", 0) <= images:
            kept.append(line + "\n")
    rewritten = path.with_suffix(".rewritten")
    rewritten.write_text("".join(kept))
    os.replace(rewritten, path)
