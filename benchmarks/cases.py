"""What the cases of every family share; the shapes themselves are in each family's `cases.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

MODES = ("fwd", "bwd", "fwd+bwd")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MEASURED_SETS = ("cifar", "soda-64", "soda-128", "sd15", "lengths")
"""What the traffic table shows and the tuner tunes unless asked for others; of each family the sets that it has."""
CPU_SETS = ("cifar", "cifar-small", "soda-64")
"""What a suite times unless asked for others; of each family the sets that it has."""


class ShapeSet(NamedTuple):
    """The shapes that one family has in one model."""

    cpu_batch: int
    """The batch is cut down to this where a suite runs on a CPU."""
    shapes: tuple[Any, ...]


def cut_down(cases: Sequence[Any], shape_sets: Mapping[str, ShapeSet]) -> list[Any]:
    """Give cases the batches that a CPU can bear, which can make two cases one."""
    fewer = (case.with_batch(min(case.shape.batch, shape_sets[case.shape_set].cpu_batch)) for case in cases)
    return list(dict.fromkeys(fewer))
