"""JSON files that any reader takes: numbers that are not finite become null, and files appear whole."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def to_json(value: Any, **options: Any) -> str:
    """Write a value as JSON, with null for NaN and infinities, which JSON does not have."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def write_json(path: Path, value: Any) -> None:
    """Write a file of indented JSON in one step, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        unfinished.write_text(to_json(value, indent=2) + "\n")
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of one JSON object a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a file of one JSON object a line: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a file of one JSON object a line")
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
