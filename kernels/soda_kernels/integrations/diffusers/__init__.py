"""The kernels in diffusers: `optimize(model)` and `restore(model)`, and a scheduler over the fused sampler steps.

    from soda_kernels.integrations.diffusers import SodaScheduler, optimize
    print(optimize(pipeline.unet))
    pipeline.scheduler = SodaScheduler.from_config(pipeline.scheduler.config)

diffusers is imported when one of them is called, or the scheduler is taken from here.
"""

from __future__ import annotations

from typing import Any

from soda_kernels.integrations.diffusers.attention import SodaAttnProcessor
from soda_kernels.integrations.diffusers.models import optimize, restore
from soda_kernels.integrations.replacement import Report

__all__ = ["Report", "SodaAttnProcessor", "SodaScheduler", "optimize", "restore"]


def __getattr__(name: str) -> Any:
    if name == "SodaScheduler":  # a class of diffusers' classes, so that it needs them when it is made
        from soda_kernels.integrations.diffusers.agreement import require_diffusers
        from soda_kernels.integrations.diffusers.scheduler import SodaScheduler

        require_diffusers()
        return SodaScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
