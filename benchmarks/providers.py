"""Who computes an op: this project, PyTorch as its users write it, and other libraries."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.accuracy import MOST_TIMES_TORCH
from benchmarks.problems import EPS, Forward
from soda_kernels import modulated_group_norm

BASELINE = "eager"


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One implementation of an op."""

    name: str
    build: Callable[[], Forward]
    """Makes the function that is timed, with the signature of this project's own; called once a case and mode."""
    unavailable: Callable[[torch.device], str | None] = lambda _device: None
    """Says why it cannot run here, if so."""
    compiled: bool = False
    """Whether torch.compile made it: it then recompiles whenever PyTorch's global state changes."""
    most_times_torch: float = MOST_TIMES_TORCH
    """How many times the error of PyTorch's chain its results may have."""


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


def _compiled() -> Forward:
    # Else every case of one process would count towards one limit of recompilations, and the last ones run eagerly.
    torch._dynamo.reset()
    return torch.compile(eager_norm, dynamic=False)


def _not_installed(module: str, name: str) -> Callable[[torch.device], str | None]:
    def reason(_device: torch.device) -> str | None:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # a package on the way to the module
            found = None
        return f"{name} is not installed" if found is None else f"{name} has no adapter in this suite yet"

    return reason


def _nothing() -> Any:
    raise NotImplementedError("a provider that is unavailable is never built")


NORM_PROVIDERS = (
    Provider(name="ours", build=lambda: modulated_group_norm),
    Provider(name=BASELINE, build=lambda: eager_norm),
    # PyTorch's own error too, but of sums in another order: 3.7 times eager's in shifts' gradients over 32 x 32 in fp32
    # (Intel Xeon, scratch measurement). Without its times there would be nothing to compare with.
    Provider(name="compile", build=_compiled, compiled=True, most_times_torch=10.0),
    # The package named apex on the index is another project: NVIDIA's has this module.
    Provider(name="apex", build=_nothing, unavailable=_not_installed("apex.contrib.group_norm", "NVIDIA's apex")),
    Provider(name="liger", build=_nothing, unavailable=_not_installed("liger_kernel.ops.group_norm", "Liger-Kernel")),
)
