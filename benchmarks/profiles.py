"""What PyTorch's profiler sees of a step: which kernel really ran, and a trace to look at."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.steps import Step
from soda_kernels import span, use_ranges

_SDPA = "aten::_scaled_dot_product"


def longest_kernel(step: Step, device: torch.device) -> str:
    """Run a step and name the CUDA kernel that took longest; on a CPU the aten op, of SDPA's own where there is one.

    The branch for a GPU was not yet run on one.
    """
    on_gpu = device.type == "cuda"
    with _profiler(device) as profiled:
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
    # Nodes of autograd are events too, which on small tensors can take longer than what they call.
    ops = [event for event in events if event.key.startswith("aten::")] or events
    return max(ops, key=lambda event: event.self_cpu_time_total).key


def write_trace(steps: Mapping[str, Step], path: Path, device: torch.device, *, calls: int = 3) -> None:
    """Call each step some times under the profiler, each call a range of its name, and write the trace as Chrome JSON.

    Within them every kernel call of soda_kernels is a range of its own, for NVTX too, but for the backward of a graph
    that was recorded before.

    Args:
        steps: by name; they have run before.
        path: the file; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with use_ranges(), _profiler(device) as profiled:
        for name, step in steps.items():
            for _ in range(calls):
                with span(name):
                    step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    profiled.export_chrome_trace(str(path))


def _profiler(device: torch.device) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines at each start and stop
    return profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])])
