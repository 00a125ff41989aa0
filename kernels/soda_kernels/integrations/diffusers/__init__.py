"""The kernels in diffusers: a scheduler over the fused sampler steps."""

from soda_kernels.integrations.diffusers.scheduler import SodaScheduler

__all__ = ["SodaScheduler"]
