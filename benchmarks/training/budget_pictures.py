"""What evaluations of a budgeted pretraining say, as a table and as a picture."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import table
from soda_engine.evaluation.pictures import curves
from soda_engine.records import to_json

Row = dict[str, Any]

_PROBES = {"linear_probe": "linear probe", "knn": "k-NN"}


def budget_table(rows: Sequence[Row]) -> str:
    """Lay evaluations out, a line each."""
    return table(
        ("path", "minutes", "images", "images/s", "linear probe", "k-NN", "loss"),
        (
            (row["provider"], f"{row['train_seconds'] / 60:.2f}", f"{row['images']:,}", f"{row['images_per_s']:.0f}",
             *(f"{100 * row[name]:.2f}%" for name in _PROBES),
             "-" if row["loss"] is None else f"{row['loss']:.4f}")
            for row in rows
        ),
    )  # fmt: skip


def draw_budget(rows: Sequence[Row], path: Path) -> Path:
    """Draw accuracy against minutes of training, a panel a probe and a line a path, and return the file's path."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    panels = {f"{title}, %": [f"{title}: {each}" for each in providers] for title in _PROBES.values()}
    minutes = "minutes of training"
    points = [
        {minutes: row["train_seconds"] / 60}
        | {f"{title}: {row['provider']}": 100 * row[name] for name, title in _PROBES.items()}
        for row in rows
    ]
    last = rows[-1]
    title = f"{last['case']['set']} on {last['env']['device']}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "points.jsonl"
        file.write_text("".join(to_json(point) + "\n" for point in points))
        return curves(file, path, panels=panels, x_key=minutes, title=title)
