"""The kernels in models of diffusers: `optimize(model)` and `restore(model)`.

    from soda_kernels.integrations.diffusers import optimize
    print(optimize(pipeline.unet))

diffusers is imported when one of them is called.
"""

from soda_kernels.integrations.diffusers.attention import SodaAttnProcessor
from soda_kernels.integrations.diffusers.models import optimize, restore
from soda_kernels.integrations.replacement import Report

__all__ = ["Report", "SodaAttnProcessor", "optimize", "restore"]
