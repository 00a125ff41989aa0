"""The public function and module of modulated group norm, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from soda_kernels import _checks
from soda_kernels._autograd import first_derivative_only, is_differentiated
from soda_kernels._backend import current_ops, runs_native
from soda_kernels._checks import image_memory_format
from soda_kernels.group_norm import ops as _ops  # noqa: F401  registers the ops
from soda_kernels.group_norm.checks import (
    ACTIVATIONS,
    check_numbers,
    check_options,
    check_tensors,
    flatten_modulations,
)

# Number of groups, scale_offset, eps, whether SiLU follows, dropout_p, seed, residual_scale: as the op takes them.
_Options: TypeAlias = tuple[int, float, float, bool, float, Tensor | None, float]


def modulated_group_norm(
    x: Tensor | tuple[Tensor, Tensor],
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    modulations: Sequence[tuple[Tensor, Tensor]] = (),
    *,
    scale_offset: float = 1.0,
    eps: float = 1e-5,
    activation: str | None = "silu",
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalize over groups of channels, apply modulations in order, then SiLU, then dropout.

        h = weight * (x - mean) / sqrt(var + eps) + bias
        h = h * (scale + scale_offset) + shift          for each modulation
        y = dropout(silu(h))

    Args:
        x: [N, C, *spatial] in fp32, bf16, fp16 or fp64, contiguous or channels_last; or a pair (h, skip) of such, which
            is normalized as their concatenation along C.
        num_groups: divides C.
        weight, bias: [C] each, of any float dtype.
        modulations: up to two (scale, shift) pairs, [N, C] each, of any float dtype.
        scale_offset: added to every scale in fp32, so that a zero scale is the identity.
        eps: added to the variance.
        activation: "silu" or None.
        residual: like x; y is then computed from the sum (x + residual) * residual_scale, and the sum returned too.
        residual_scale: factor on the sum. In fp32 and fp64 the sum is PyTorch's (x + residual) * residual_scale bit for
            bit; in 16 bits it is that of fp32, rounded once, where PyTorch would round x + residual too.
        dropout_p: in [0, 1), rounded to a multiple of 1/65536 below 1. The mask is regenerated in the backward, never
            stored.
        seed: needed with dropout: an int or 0-d tensor, with which sample n's mask depends on (seed, n, element), or an
            [N] tensor, with which it depends on (seed[n], element), wherever the sample lies in the batch.

    Returns:
        y, with x's dtype and layout; or (y, the sum).

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is not as above, or a factor has no residual.
        RuntimeError: a second derivative is asked for.

    Reference:
        Wu and He 2018 (group norm); Dhariwal and Nichol 2021 (AdaGN); Hudson et al. 2023 (two modulations).
    """
    x, skip = x if isinstance(x, (tuple, list)) and len(x) == 2 else (x, None)
    flat = flatten_modulations(modulations)
    check_options(scale_offset, eps, dropout_p, residual_scale, residual, activation)
    # The native library looks at its tensors itself, and is let: of a small image's 20 us the checks here took 7.
    unchecked = type(num_groups) is int and dropout_p == 0.0 and runs_native(x, skip, residual, weight, bias, *flat)
    if not unchecked:
        check_tensors(x, skip, residual, weight, bias, flat, num_groups)
    key = None
    if dropout_p > 0.0:
        if seed is None:
            raise ValueError("seed is None; dropout_p > 0 needs a seed (an int, a 0-d tensor or one for each sample)")
        key = _checks.int64_scalar_or_vector("seed", seed, x.shape[0], x.device)
    try:
        options = num_groups, scale_offset, eps, activation == "silu", dropout_p, key, residual_scale
        y, summed = _run(x, skip, residual, weight, bias, flat, options)
    except RuntimeError as error:
        if not unchecked:
            raise
        refusal = error
    else:
        return y if residual is None else (y, summed)
    check_tensors(x, skip, residual, weight, bias, flat, num_groups)
    raise refusal


def _run(
    x: Tensor, skip: Tensor | None, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    modulations: list[Tensor], options: _Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if is_differentiated(x, skip, residual, weight, bias, *modulations):
        # The options as one: autograd looks at every argument.
        return _ModulatedGroupNorm.apply(options, x, skip, residual, weight, bias, *modulations)
    op = current_ops().modulated_group_norm.default
    return op(x, skip, residual, weight, bias, modulations, *options)[:2]


class _ModulatedGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: _Options, x: Tensor, skip: Tensor | None, residual: Tensor | None, weight: Tensor | None,
        bias: Tensor | None, *modulations: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ops = current_ops()
        _, scale_offset, _, silu, dropout_p, seed, residual_scale = options
        y, summed, mean, rstd = ops.modulated_group_norm.default(x, skip, residual, weight, bias, modulations, *options)
        normalized = x if residual is None else summed
        ctx.save_for_backward(normalized, skip, weight, bias, mean, rstd, seed, *modulations)
        ctx.ops, ctx.has_residual = ops, residual is not None
        ctx.scale_offset, ctx.silu, ctx.dropout_p, ctx.residual_scale = scale_offset, silu, dropout_p, residual_scale
        if residual is None:
            ctx.mark_non_differentiable(summed)
        # The gradient of what nobody read is None: no zeros of an image's size are written and read.
        ctx.set_materialize_grads(False)
        return y, summed

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor | None, dsummed: Tensor | None) -> tuple[Any, ...]:
        x, skip, weight, bias, mean, rstd, seed, *modulations = ctx.saved_tensors
        if dy is None:  # nothing depends on y: the sum's gradient passes on, and the others are zero
            dx = torch.zeros_like(x) if dsummed is None else dsummed.contiguous(memory_format=image_memory_format(x))
            if ctx.residual_scale != 1.0:
                dx = dx * ctx.residual_scale
            dskip, dweight, dbias, *dmodulations = (
                None if tensor is None else torch.zeros_like(tensor) for tensor in (skip, weight, bias, *modulations)
            )
        else:
            dx, dskip, dweight, dbias, dmodulations = ctx.ops.modulated_group_norm_backward.default(
                dy, dsummed if ctx.has_residual else None, x, skip, weight, bias, modulations, mean, rstd,
                ctx.scale_offset, ctx.silu, ctx.dropout_p, seed, ctx.residual_scale,
            )  # fmt: skip
        return (
            None, dx, None if skip is None else dskip, dx if ctx.has_residual else None,
            None if weight is None else dweight, None if bias is None else dbias, *dmodulations,
        )  # fmt: skip


class ModulatedGroupNorm(nn.GroupNorm):
    """An `nn.GroupNorm`, with the same state dict, followed by modulations, SiLU and dropout in one op.

    Args:
        num_groups, num_channels, eps, affine, device, dtype: as in `nn.GroupNorm`.
        activation, scale_offset, dropout_p: as in `modulated_group_norm`; dropout is active in training mode only.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        activation: str | None = "silu",
        scale_offset: float = 1.0,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checks.check_choice("activation", activation, ACTIVATIONS)
        check_numbers(scale_offset, eps, dropout_p)
        super().__init__(num_groups, num_channels, eps=eps, affine=affine, device=device, dtype=dtype)
        self.activation, self.scale_offset, self.dropout_p = activation, scale_offset, dropout_p

    def forward(  # type: ignore[override]
        self,
        x: Tensor | tuple[Tensor, Tensor],
        *modulations: tuple[Tensor, Tensor],
        residual: Tensor | None = None,
        residual_scale: float = 1.0,
        seed: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Apply `modulated_group_norm` with this module's parameters."""
        dropout_p = self.dropout_p if self.training else 0.0
        return modulated_group_norm(
            x, self.num_groups, self.weight, self.bias, modulations, scale_offset=self.scale_offset, eps=self.eps,
            activation=self.activation, residual=residual, residual_scale=residual_scale, dropout_p=dropout_p,
            seed=seed,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}, dropout_p={self.dropout_p}"
