"""What is measured about the kernels and the engine, and how: `python -m benchmarks --help`."""

from __future__ import annotations

import sys
from pathlib import Path

# Last, so that what is installed comes first: a GPU machine may have the checkout alone, and what `make carry` brought.
_ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(path) for name in ("kernels", "engine", "carried/packages") if (path := _ROOT / name).is_dir()]
