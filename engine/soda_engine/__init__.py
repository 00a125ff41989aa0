"""SODA pretraining and inference: `load` a trained model, or build one as `Soda(config)`.

Names are imported when they are first used, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soda_engine.config import SodaConfig, TrainConfig
    from soda_engine.models.soda import Soda
    from soda_engine.presets import PRESETS
    from soda_engine.train.checkpoint import load
    from soda_engine.train.trainer import Trainer

__all__ = ["PRESETS", "Soda", "SodaConfig", "TrainConfig", "Trainer", "load"]

__version__ = metadata.version("soda-engine")

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
