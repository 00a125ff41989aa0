"""SODA pretraining and inference: `load` a trained model, or build one as `Soda(config)`.

Names are imported when they are first used, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
import tomllib
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soda_engine.config import SodaConfig, TrainConfig
    from soda_engine.models.soda import Soda
    from soda_engine.presets import PRESETS
    from soda_engine.train.checkpoint import load
    from soda_engine.train.trainer import Trainer

__all__ = ["PRESETS", "Soda", "SodaConfig", "TrainConfig", "Trainer", "load"]


def _version() -> str:
    try:
        return metadata.version("soda-engine")
    except metadata.PackageNotFoundError:  # a checkout on the path, which was not installed
        project = Path(__file__).parents[2] / "pyproject.toml"
        return tomllib.loads(project.read_text())["project"]["version"]


__version__ = _version()

_HOMES = {
    "PRESETS": "presets",
    "Soda": "models.soda",
    "SodaConfig": "config",
    "TrainConfig": "config",
    "Trainer": "train.trainer",
    "load": "train.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'soda_engine' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"soda_engine.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"soda_engine needs {error.name}: pip install 'soda-engine[engine]'") from error
