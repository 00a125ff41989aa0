"""Who computes a 3x3 convolution: this project where it has kernels for it, and PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from benchmarks.providers import BASELINE, OURS, Provider, compiled
from benchmarks.steps import Problem
from soda_kernels import conv3x3, explain, native_status


def eager_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute it with PyTorch's own function: oneDNN's on a CPU, cuDNN's on a GPU."""
    return functional.conv2d(x, weight, bias, padding=1)


def _is_pytorchs(problem: Problem) -> str | None:
    """Say where `conv3x3` would call the function that it is compared with."""
    if explain(problem.call, conv3x3).choices:
        return None
    status = native_status()
    why = "it takes fp32 in nhwc on a CPU" if status.available else str(status)
    return f"conv3x3 calls PyTorch's own convolution here: {why}"


CONVOLUTION_PROVIDERS = (
    Provider(name=OURS, build=lambda: conv3x3, unavailable=_is_pytorchs),
    Provider(name=BASELINE, build=lambda: eager_convolution),
    # PyTorch's own error too: Inductor takes nchw to channels_last, where that of oneDNN's gradient of x is 1.3 to 3.84
    # times as large (EPYC with AVX2, the models' cases).
    Provider(name="compile", build=lambda: compiled(eager_convolution), compiled=True, most_times_torch=10.0),
)
