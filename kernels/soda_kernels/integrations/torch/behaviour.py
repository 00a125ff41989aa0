"""What a module computes, found out by running a copy of it on a small input: names and attributes may mislead."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soda_kernels.integrations import norms
from soda_kernels.integrations.replacement import Fused, replace

# A norm that computes in fp32 inside is off by 1e-7 in fp64; one that computes something else by a tenth.
_TOLERANCE = 1e-4
# Small inputs, so that the epsilon of a norm is seen.
_MAGNITUDE = 0.01


def computes_silu(module: nn.Module) -> bool:
    """Tell whether a module is a SiLU: PyTorch's, or one of its name that computes the same."""
    cls: Any = type(module)
    return norms.is_silu(module) or _class_computes_silu(cls)


@functools.cache
def _class_computes_silu(cls: Any) -> bool:
    if cls.__name__.lower() not in ("silu", "swish"):
        return False
    x = torch.linspace(-4, 4, 9, device="cpu")
    try:
        return torch.allclose(cls()(x), F.silu(x), atol=1e-6)
    except Exception:  # whatever a stranger's constructor or forward raises
        return False


def computes_group_norm(module: nn.Module) -> bool:
    """Tell whether a module is a group norm, PyTorch's or one with its attributes that computes the same."""
    if norms.is_group_norm(module):
        return True
    if not isinstance(getattr(module, "num_groups", None), int) or not isinstance(getattr(module, "eps", None), float):
        return False
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or bias is None or weight.ndim != 1 or list(module.children()):
        return False
    x = _MAGNITUDE * torch.randn(2, len(weight), 3, 3, dtype=torch.float64, generator=_generator(), device="cpu")
    return disagreement(module, norms.GroupNorm, [(x,)]) is None


def disagreement(module: nn.Module, kind: type[Fused], calls: Sequence[tuple[Any, ...]]) -> str | None:
    """Say how a module of a kind would differ from what the module computes, or None.

    A copy is looked at, in fp64 on the CPU, evaluated, with weights drawn anew: zeros hide nothing.

    Args:
        calls: the arguments of each call to compare.
    """
    try:
        plain = copy.deepcopy(module).eval()
        if any(parameter.is_meta for parameter in plain.parameters()):
            plain = plain.to_empty(device="cpu")
        plain, generator = plain.to("cpu", torch.float64), _generator()
        with torch.no_grad():
            for parameter in plain.parameters():
                noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator, device="cpu")
                parameter.copy_(0.3 * noise)
            expected = [plain(*arguments) for arguments in calls]
            replace(plain, kind)
            results = [plain(*arguments) for arguments in calls]
    except Exception as error:  # whatever a stranger's forward raises when it is called in another way than it likes
        return f"trying it raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    differ = any(not _close(ours, theirs) for ours, theirs in zip(results, expected, strict=True))
    return "it computes something else than blocks with its attributes do" if differ else None


def _close(ours: Any, theirs: Any) -> bool:
    if not isinstance(theirs, Tensor) or ours.shape != theirs.shape:
        return False
    return bool((ours - theirs).norm() <= _TOLERANCE * theirs.norm())


def example(*shape: int) -> Tensor:
    """Draw a small input for a comparison, in fp64."""
    return _MAGNITUDE * torch.randn(*shape, dtype=torch.float64, generator=_generator(), device="cpu")


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
