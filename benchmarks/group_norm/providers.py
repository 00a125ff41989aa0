"""Who computes modulated group norm: this project, PyTorch as its users write it, and other libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.group_norm.problems import EPS
from benchmarks.providers import BASELINE, OURS, Provider, compiled, is_installed
from benchmarks.steps import Forward, Problem
from soda_kernels import modulated_group_norm


def eager_norm(
    x: Tensor | tuple[Tensor, Tensor], num_groups: int, weight: Tensor, bias: Tensor,
    modulations: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:  # fmt: skip
    """Compute it with PyTorch's own functions, in the activations' dtype, as models that have no kernel for it do."""
    x = torch.cat(x, dim=1) if isinstance(x, tuple) else x
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    # On CUDA group norm takes parameters of the activations' dtype only, and returns NCHW whatever came in.
    h = functional.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), EPS)
    for scale, shift in modulations:
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return functional.silu(h).contiguous(memory_format=layout)


def _no_adapter(module: str, name: str) -> Callable[[Problem], str | None]:
    def reason(_problem: Problem) -> str | None:
        return f"{name} has no adapter in this suite yet" if is_installed(module) else f"{name} is not installed"

    return reason


def _nothing() -> Forward:
    raise NotImplementedError("a provider that is unavailable is never built")


NORM_PROVIDERS = (
    Provider(name=OURS, build=lambda: modulated_group_norm),
    Provider(name=BASELINE, build=lambda: eager_norm),
    # PyTorch's own error too, but of sums in another order: 3.7 times eager's in shifts' gradients over 32 x 32 in fp32
    # (Intel Xeon, scratch measurement). Without its times there would be nothing to compare with.
    Provider(name="compile", build=lambda: compiled(eager_norm), compiled=True, most_times_torch=10.0),
    # The package named apex on the index is another project: NVIDIA's has this module.
    Provider(name="apex", build=_nothing, unavailable=_no_adapter("apex.contrib.group_norm", "NVIDIA's apex")),
    Provider(name="liger", build=_nothing, unavailable=_no_adapter("liger_kernel.ops.group_norm", "Liger-Kernel")),
)
