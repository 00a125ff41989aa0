"""Fused kernels for diffusion models: modulated group norm, attention, noise-schedule sampling,
and 3x3 convolution on a CPU.

Importing this package needs PyTorch alone: no GPU, no Triton, no compiler.
"""

from soda_kernels import _native
from soda_kernels._backend import explain, use_backend
from soda_kernels._flops import register_flop_formulas
from soda_kernels._native import native_status
from soda_kernels._ranges import span, use_ranges
from soda_kernels.attention.api import attention, attention_qkvpacked
from soda_kernels.convolution.api import conv3x3
from soda_kernels.diffusion.api import add_noise, denoising_loss
from soda_kernels.diffusion.api_random import draw_step_index, philox_normal, philox_uniform
from soda_kernels.diffusion.api_sampler import sampler_step
from soda_kernels.diffusion.schedule import NoiseSchedule
from soda_kernels.group_norm.api import ModulatedGroupNorm, modulated_group_norm

__all__ = [
    "ModulatedGroupNorm",
    "NoiseSchedule",
    "add_noise",
    "attention",
    "attention_qkvpacked",
    "conv3x3",
    "denoising_loss",
    "draw_step_index",
    "explain",
    "modulated_group_norm",
    "native_status",
    "philox_normal",
    "philox_uniform",
    "register_flop_formulas",
    "sampler_step",
    "span",
    "use_backend",
    "use_ranges",
]

_native.load()
