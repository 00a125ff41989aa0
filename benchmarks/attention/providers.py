"""Who computes attention: this project, PyTorch's SDPA as its users write it and by each backend, and other libraries.

Each takes a packed projection (B, T, 3, H, D), or q (B, T, H, D), k and v (B, S, H, D), and returns a contiguous
(B, T, H, D), which the output projection views as (B, T, H * D).
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.providers import BASELINE, OURS, Provider, Refused, compiled, is_installed
from benchmarks.steps import Forward, Problem
from soda_kernels import attention, attention_qkvpacked


def own_attention(*inputs: Tensor) -> Tensor:
    """Compute it with this project's op for what comes."""
    return attention_qkvpacked(*inputs) if len(inputs) == 1 else attention(*inputs)


def eager_attention(*inputs: Tensor) -> Tensor:
    """Compute it with SDPA, by the backend that PyTorch chooses."""
    return _heads_inside(functional.scaled_dot_product_attention(*_heads_outside(*inputs)))


def sdpa(backend: SDPBackend) -> Forward:
    """Return SDPA by one backend; the choice costs each forward call some microseconds of Python.

    Raises:
        Refused: by what is returned, where the backend does not take the tensors.
    """

    def forward(*inputs: Tensor) -> Tensor:
        q, k, v = _heads_outside(*inputs)
        try:
            with sdpa_kernel(backend):
                return _heads_inside(functional.scaled_dot_product_attention(q, k, v))
        except RuntimeError as error:
            if not str(error).startswith(("No available kernel", "No viable backend")):
                raise
            raise Refused(_why_refused(backend, q, k, v) or str(error).splitlines()[0]) from error

    return forward


math_attention = sdpa(SDPBackend.MATH)
"""Products and a softmax of their own: the chain whose error is the measure of everyone's."""


def _why_refused(backend: SDPBackend, *parts: Tensor) -> str:
    """Ask again: PyTorch says why as warnings, which tell of the backends that were switched off too."""
    with warnings.catch_warnings(record=True) as said, contextlib.suppress(RuntimeError), sdpa_kernel(backend):
        warnings.simplefilter("always")
        functional.scaled_dot_product_attention(*parts)
    reasons = (str(warning.message).partition(" (Triggered")[0] for warning in said)
    return "; ".join(text for text in reasons if "disabled" not in text and "not used because" not in text)


def _heads_outside(*inputs: Tensor) -> tuple[Tensor, ...]:
    """View what comes as the q, k and v (B, H, T, D) of SDPA."""
    parts = inputs[0].unbind(2) if len(inputs) == 1 else inputs
    return tuple(part.transpose(1, 2) for part in parts)


def _heads_inside(o: Tensor) -> Tensor:
    return o.transpose(1, 2).contiguous()


def _xformers() -> Forward:
    operators = importlib.import_module("xformers.ops")

    def forward(*inputs: Tensor) -> Tensor:
        q, k, v = inputs[0].unbind(2) if len(inputs) == 1 else inputs
        return operators.memory_efficient_attention(q, k, v)

    return forward


def _flash_attention() -> Forward:
    library = importlib.import_module("flash_attn")

    def forward(*inputs: Tensor) -> Tensor:
        one = len(inputs) == 1
        return library.flash_attn_qkvpacked_func(*inputs) if one else library.flash_attn_func(*inputs)

    return forward


def _on_cuda_alone(name: str, module: str, dtypes: tuple[torch.dtype, ...]) -> Callable[[Problem], str | None]:
    """Return what says why a library for GPUs cannot run."""

    def reason(problem: Problem) -> str | None:
        if not is_installed(module):
            return f"{name} is not installed"
        if problem.gradient.device.type != "cuda":
            return f"{name} runs on CUDA alone"
        if problem.gradient.dtype not in dtypes:
            return f"{name} does not take {str(problem.gradient.dtype).removeprefix('torch.')}"
        return None

    return reason


def _backend(name: str, backend: SDPBackend, *, on_cpu: bool = False) -> Provider:
    """Return SDPA by one backend as a provider."""

    def unavailable(problem: Problem) -> str | None:
        there = on_cpu or problem.gradient.device.type == "cuda"
        return None if there else "PyTorch has this backend on CUDA alone"

    return Provider(name=name, build=lambda: sdpa(backend), unavailable=unavailable, names_kernel=True)


_HALVES = (torch.float16, torch.bfloat16)

ATTENTION_PROVIDERS = (
    Provider(name=OURS, build=lambda: own_attention),
    Provider(name=BASELINE, build=lambda: eager_attention, names_kernel=True),
    Provider(name="compile", build=lambda: compiled(eager_attention), compiled=True, names_kernel=True),
    _backend("sdpa-math", SDPBackend.MATH, on_cpu=True),
    _backend("sdpa-flash", SDPBackend.FLASH_ATTENTION, on_cpu=True),
    _backend("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
    _backend("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    Provider(
        name="xformers", build=_xformers, names_kernel=True,
        unavailable=_on_cuda_alone("xformers", "xformers", (torch.float32, *_HALVES)),
    ),
    Provider(
        name="flash-attention", build=_flash_attention, names_kernel=True,
        unavailable=_on_cuda_alone("flash-attention", "flash_attn", _HALVES),
    ),
)  # fmt: skip
