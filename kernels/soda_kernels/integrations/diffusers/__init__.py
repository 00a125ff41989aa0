"""The kernels in diffusers: a scheduler over the fused sampler steps.

diffusers is imported when a name is taken from here.
"""

from __future__ import annotations

from typing import Any

__all__ = ["SodaScheduler"]


def __getattr__(name: str) -> Any:
    if name == "SodaScheduler":  # a class of diffusers' classes, so that it needs them when it is made
        from soda_kernels.integrations.diffusers.scheduler import SodaScheduler

        return SodaScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
