"""Modulated group norm in plain PyTorch, forward and closed-form backward: the definition of the op.

With x_hat = (x - mean) * rstd, a stack of affine modulations after the norm is one scale S and shift H per (n, c):

    p = S * x_hat + H          y = dropout(silu(p))
    S = weight * prod(scale_i + offset)          H = the shifts folded in the same order

The backward needs two sums over space, dH = sum dp and dS = sum dp * x_hat, from which every parameter's gradient is
a closed form on (N, C), and with M elements a group, c1 = sum_g S dH / M and c2 = sum_g S dS / M:

    dx = rstd * (S * dp - c1 - x_hat * c2)

With a residual, x stands for the sum (x + residual) * residual_scale, and the gradient of either part is residual_scale
times the sum's: dx and what arrives at the sum itself.

Sums and statistics are in fp32, or in fp64 for fp64 inputs. No step copies the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soda_kernels._checks import image_memory_format
from soda_kernels._philox import keep_mask, keep_threshold


def forward(
    x: Tensor,
    skip: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    modulations: list[Tensor],
    num_groups: int,
    scale_offset: float,
    eps: float,
    silu: bool,
    dropout_p: float,
    seed: Tensor | None,
    residual_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (y, the sum or an empty tensor, mean, rstd); mean and rstd are (N, num_groups)."""
    layout = image_memory_format(x)
    summed = _scaled_sum(x, residual, residual_scale) if residual is not None else x.new_empty(0)
    x = summed if residual is not None else x if skip is None else torch.cat((x, skip), dim=1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Not in one pass: torch.native_group_norm forms E[x^2] - E[x]^2 of channels_last inputs on a CPU.
    space, elements = tuple(range(2, x.ndim)), max(1, x[:1].numel() // num_groups)
    mean = _group_sum(_sum(wide, space), num_groups) / elements
    centered = wide - _per_channel(_spread(mean, x), x)
    # What the mean lost when it was rounded is much beside the deviations of a nearly constant input.
    lost = _group_sum(_sum(centered, space), num_groups) / elements
    mean, centered = mean + lost, centered.sub_(_per_channel(_spread(lost, x), x))
    rstd = (_group_sum(_sum(centered.square(), space), num_groups) / elements + eps).rsqrt()
    scale, shift = _affine(x, weight, bias, modulations, scale_offset)[-1]
    y = torch.addcmul(_per_channel(shift, x), centered, _per_channel(scale * _spread(rstd, x), x))
    if silu:
        y = torch.nn.functional.silu(y, inplace=True)
    if dropout_p > 0.0:
        y = y.mul_(_dropout_factor(x, dropout_p, seed))
    y = y.to(x.dtype)
    if residual is not None:
        summed = summed.contiguous(memory_format=layout)
    return y.contiguous(memory_format=layout), summed, mean, rstd


def backward(
    dy: Tensor,
    dsummed: Tensor | None,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    modulations: list[Tensor],
    mean: Tensor,
    rstd: Tensor,
    scale_offset: float,
    silu: bool,
    dropout_p: float,
    seed: Tensor | None,
    residual_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Return (dx, dskip, dweight, dbias, the modulations' gradients); an absent argument's gradient is empty.

    `x` is the normalized tensor: the sum where there was a residual, whose gradient is then dx too.
    """
    layout, channels = image_memory_format(x), x.shape[1]
    full = x if skip is None else torch.cat((x, skip), dim=1)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    space = tuple(range(2, full.ndim))
    stages = _affine(full, weight, bias, modulations, scale_offset)
    scale, shift = stages[-1]
    rstd_c = _spread(rstd, full)

    centered = full.to(accumulate) - _per_channel(_spread(mean, full), full)
    dp = dy.to(accumulate)
    if dropout_p > 0.0:
        dp = dp * _dropout_factor(full, dropout_p, seed)
    if silu:
        p = torch.addcmul(_per_channel(shift, full), centered, _per_channel(scale * rstd_c, full))
        dp = torch.ops.aten.silu_backward(dp, p)
    dshift, dscale = _sum(dp, space), _sum(dp * centered, space) * rstd_c  # [N, C]

    num_groups = rstd.shape[1]
    elements = max(1, full[:1].numel() // num_groups)
    c1, c2 = (_group_sum(scale * sums, num_groups) / elements for sums in (dshift, dscale))
    gain = rstd * residual_scale
    gain_c, constant, slope = (_spread(each, full) for each in (gain, -c1 * gain, -c2 * (rstd * gain)))
    dx = torch.addcmul(_per_channel(constant, full), dp, _per_channel(scale * gain_c, full))
    dx = dx.addcmul_(centered, _per_channel(slope, full))
    if dsummed is not None:
        dx = dx.add_(dsummed, alpha=residual_scale)
    dx = dx.to(x.dtype)
    dx, dskip = (dx, dx.new_empty(0)) if skip is None else (dx[:, :channels], dx[:, channels:])
    if skip is not None:
        dskip = dskip.contiguous(memory_format=layout).clone(memory_format=torch.preserve_format)
        dx = dx.clone(memory_format=torch.preserve_format)

    dmodulations: list[Tensor] = []
    for index in reversed(range(len(modulations) // 2)):
        inner_scale, inner_shift = stages[index]
        factor = modulations[2 * index].to(accumulate) + scale_offset
        dmodulations = [inner_scale * dscale + inner_shift * dshift, dshift, *dmodulations]
        dscale, dshift = dscale * factor, dshift * factor
    dmodulations = [grad.to(m.dtype) for grad, m in zip(dmodulations, modulations, strict=True)]
    dweight = dscale.sum(0).to(weight.dtype) if weight is not None else dx.new_empty(0)
    dbias = dshift.sum(0).to(bias.dtype) if bias is not None else dx.new_empty(0)
    return dx.contiguous(memory_format=layout), dskip, dweight, dbias, dmodulations


def _scaled_sum(x: Tensor, residual: Tensor, scale: float) -> Tensor:
    """Return (x + residual) * scale in x's dtype, from arithmetic in fp32, or in fp64 for fp64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)) + residual
    return wide.mul_(scale).to(x.dtype)


def _affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, modulations: list[Tensor], scale_offset: float
) -> list[tuple[Tensor, Tensor]]:
    """Return the folded (scale, shift), each (N, C), after the norm's own affine and after each modulation."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    scale = x.new_ones((), dtype=accumulate) if weight is None else weight.to(accumulate)
    shift = x.new_zeros((), dtype=accumulate) if bias is None else bias.to(accumulate)
    stages = [(scale.expand(x.shape[:2]), shift.expand(x.shape[:2]))]
    for modulation_scale, modulation_shift in zip(modulations[0::2], modulations[1::2], strict=True):
        factor = modulation_scale.to(accumulate) + scale_offset
        stages.append((stages[-1][0] * factor, stages[-1][1] * factor + modulation_shift.to(accumulate)))
    return stages


def _dropout_factor(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Return 0 or 1 / (1 - p) for each element of x; a seed for each sample replaces the sample's index as its key."""
    assert seed is not None
    num = x[:1].numel()
    index = torch.arange(len(x), device=x.device)
    kept = keep_mask(num, seed, torch.zeros_like(index) if seed.ndim else index, dropout_p).view(x.shape)
    return kept.to(torch.promote_types(x.dtype, torch.float32)) * (65536 / (65536 - keep_threshold(dropout_p)))


def _sum(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sum over `dims`; over none, where torch.sum would take all of them."""
    return values.sum(dims) if dims else values.clone()


def _group_sum(per_channel: Tensor, num_groups: int) -> Tensor:
    """Sum (N, C) over the channels of each group: (N, G)."""
    return per_channel.unflatten(1, (num_groups, per_channel.shape[1] // num_groups)).sum(2)


def _spread(per_group: Tensor, x: Tensor) -> Tensor:
    """Repeat (N, G) over the channels of each group: (N, C)."""
    return per_group.repeat_interleave(x.shape[1] // max(1, per_group.shape[1]), dim=1)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Shape (N, C) to broadcast over x."""
    return values.view(values.shape + (1,) * (x.ndim - 2))
