"""Which kernel a step really ran, from PyTorch's profiler."""

from __future__ import annotations

import os

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.steps import Step

_SDPA = "aten::_scaled_dot_product"


def longest_kernel(step: Step, device: torch.device) -> str:
    """Run a step and name the CUDA kernel that took longest; on a CPU the aten op, of SDPA's own where there is one.

    The branch for a GPU was not yet run on one.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines at each start and stop
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = profiled.key_averages()
    if on_gpu:
        kernels = [event for event in events if event.device_type == DeviceType.CUDA]
        return max(kernels, key=lambda event: event.self_device_time_total).key
    of_sdpa = [event for event in events if event.key.startswith(_SDPA)]
    if of_sdpa:
        return max(of_sdpa, key=lambda event: event.cpu_time_total).key
    return max(events, key=lambda event: event.self_cpu_time_total).key
