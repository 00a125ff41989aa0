"""Data parallelism under torchrun, and the same calls in one process."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# How long the other processes wait for the main one to draw and probe.
MILESTONE_TIMEOUT = timedelta(hours=2)


warnings.filterwarnings("ignore", message=".*dist.nn.functional", category=FutureWarning)


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_parallel(self) -> bool:
        return self.world_size > 1

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Tell of each flag whether it is set in any process; every process must call it."""
        if not self.is_parallel:
            return flags
        # Between the hosts, in main memory: asking a GPU would wait for it.
        values = torch.tensor([float(flag) for flag in flags])
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return tuple(bool(value) for value in values.tolist())

    def gather(self, names: list[str]) -> list[str]:
        """Concatenate the lists of all processes; every process must call it."""
        if not self.is_parallel:
            return names
        gathered: list[list[str]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(gathered, names)
        return [name for part in gathered for name in part]

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over the processes."""
        if self.is_parallel:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait for every process."""
        if self.is_parallel:
            dist.barrier()


def start(device: str) -> Processes:
    """Join the processes that torchrun started, or stand alone.

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:0".

    Raises:
        ValueError: the device is not one that PyTorch has here.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    chosen = resolve_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank if world_size > 1 else chosen.index or 0)
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"there are {torch.cuda.device_count()} GPUs; lower torchrun's --nproc-per-node to that")
        torch.cuda.set_device(chosen)
    if world_size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=MILESTONE_TIMEOUT)
    return Processes(rank, world_size, chosen)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def resolve_device(device: str) -> torch.device:
    """Turn "auto" or a device's name into a device that exists here.

    Raises:
        ValueError: it does not.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; use auto, cpu or cuda") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but this PyTorch sees no GPU; use --device cpu")
    if chosen.type == "cuda" and chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}, but there are {torch.cuda.device_count()} GPUs")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; use auto, cpu or cuda")
    return chosen


def parallelize(model: nn.Module, processes: Processes) -> nn.Module:
    """Wrap a model whose batch norms were synchronized for data parallelism; in one process return it as it is."""
    if not processes.is_parallel:
        return model
    on_gpu = processes.device.type == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of broadcast_buffers, whose successor torch 2.11 lacks
        return DistributedDataParallel(
            model, device_ids=[processes.device.index] if on_gpu else None, broadcast_buffers=False
        )


def synchronize_batch_norms(model: nn.Module, processes: Processes) -> None:
    """Make batch norms take their statistics over the global batch, as in one process; state dicts stay the same."""
    if not processes.is_parallel:
        return
    if processes.device.type == "cuda":
        for name, child in model.named_children():
            setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _GlobalBatchNorm2d


class _GlobalBatchNorm2d(nn.BatchNorm2d):
    """A batch norm over all processes for CPUs, for which PyTorch's SyncBatchNorm has no kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dtype, x = x.dtype, x.float()  # sums and counts in bf16 would be wrong in the third digit
        moments = torch.stack([x.new_tensor(x.numel() / x.shape[1]).expand(x.shape[1]), x.sum((0, 2, 3))])
        count, total = dist_functional.all_reduce(moments)
        mean = total / count
        centered = x - mean.view(1, -1, 1, 1)
        variance = dist_functional.all_reduce(centered.square().sum((0, 2, 3))) / count
        self._update_statistics(mean.detach(), variance.detach(), count)
        assert self.weight is not None and self.bias is not None
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias.view(1, -1, 1, 1), centered, scale.view(1, -1, 1, 1)).to(dtype)

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum)
        self.num_batches_tracked.add_(1)


def synchronizing(model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """Return a context in which a backward pass averages gradients over the processes only if `enabled`."""
    if isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return nullcontext()
