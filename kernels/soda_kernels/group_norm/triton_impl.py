"""Launchers of modulated group norm: which kernels run over which grid, and what they write.

`plan_forward` and `plan_backward` decide and allocate; `forward` and `backward` are the ops' implementations on a GPU.
The kernels are in triton_resident.py (one launch) and triton_split.py (three launches forward, four backward).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from soda_kernels._checks import image_memory_format
from soda_kernels._launch import Launch, Plan
from soda_kernels._philox import keep_threshold
from soda_kernels.group_norm import triton_resident as resident
from soda_kernels.group_norm import triton_split as split
from soda_kernels.group_norm.config import GroupNormConfig, Problem, choose

# Rows that one program of the last reduction reads at a time, and its channels: whole sectors, four warps.
_REDUCE_ROWS, _REDUCE_SLAB = 16, 64
# Chunks that the fold reads at a time; fewer where a group is so wide that a thread would hold too many channels.
_FOLD_CHUNKS, _FOLD_ELEMENTS = 16, 16384


def plan_forward(
    x: Tensor, skip: Tensor | None, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    modulations: list[Tensor], num_groups: int, scale_offset: float, eps: float, silu: bool, dropout_p: float,
    seed: Tensor | None, residual_scale: float = 1.0, *, config: GroupNormConfig | None = None,
) -> Plan:  # fmt: skip
    """Plan the op `modulated_group_norm`, whose arguments these are; x must not be empty."""
    layout = image_memory_format(x)
    x, (skip, residual) = x.contiguous(memory_format=layout), _in_layout(layout, skip, residual)
    problem = Problem.of(x, skip, num_groups, backward=False, dropout=dropout_p > 0.0)
    config = config or choose(problem, x.device)
    y = _image_like(x, problem.all_channels, layout)
    summed = x.new_empty(0) if residual is None else _image_like(x, problem.channels, layout)
    mean, rstd = (x.new_empty((len(x), num_groups), dtype=torch.float32) for _ in range(2))
    parameters = _parameters(weight, bias, modulations, scale_offset)
    dropout, dropout_constants = _dropout(problem, config, dropout_p, seed)
    image = _image_arguments(problem, config, x, skip)
    constants = _tile_constants(problem, config)
    sums = {
        "residual_ptr": residual, "summed_ptr": None if residual is None else summed,
        "residual_scale": _factor(residual_scale),
    }  # fmt: skip
    finish = {"SILU": silu, **dropout_constants}
    if config.variant != "split":
        launch = Launch(
            kernel=resident._modulated_group_norm_fwd_resident_kernel,
            grid=(config.num_programs(problem),),
            arguments={
                **image, **parameters, **dropout, **sums, "y_ptr": y, "mean_ptr": mean, "rstd_ptr": rstd,
                "num_samples": len(x), "eps": eps,
            },
            constants={**constants, **_group_constants(problem, config), **_walk_constants(config), **finish},
            num_warps=config.num_warps,
        )  # fmt: skip
        return Plan(launches=(launch,), outputs=(y, summed, mean, rstd), config=config)

    chunks = _chunk_arguments(problem, config)
    partials = x.new_empty((len(x), chunks["num_chunks"], 2, problem.all_channels), dtype=torch.float32)
    coefficients = x.new_empty((len(x), 2, problem.all_channels), dtype=torch.float32)
    grid = (config.num_programs(problem),)
    # The sum is written once, and read by the last pass.
    apply_source = image if residual is None else {**image, "x_ptr": summed}
    launches = (
        Launch(
            kernel=split._modulated_group_norm_fwd_statistics_kernel,
            grid=grid,
            arguments={**image, **chunks, **sums, "partials_ptr": partials},
            constants={**constants, "TILES": config.tiles},
            num_warps=config.num_warps,
        ),
        Launch(
            kernel=split._modulated_group_norm_fwd_fold_kernel,
            grid=(len(x) * (num_groups // config.groups),),
            arguments={
                **parameters, **_fold_arguments(problem, config), "num_chunks": chunks["num_chunks"],
                "chunk_rows": config.rows * config.tiles, "partials_ptr": partials, "mean_ptr": mean,
                "rstd_ptr": rstd, "coefficients_ptr": coefficients, "eps": eps,
            },
            constants=_fold_constants(problem, config),
            num_warps=_fold_warps(problem, config),
        ),
        Launch(
            kernel=split._modulated_group_norm_fwd_apply_kernel,
            grid=grid,
            arguments={
                **apply_source, **chunks, **dropout, "mean_ptr": mean, "coefficients_ptr": coefficients, "y_ptr": y,
                "num_programs": grid[0],
            },
            constants={**constants, "TILES": config.tiles, "GROUP_CHANNELS": problem.group_channels, **finish},
            num_warps=config.num_warps,
        ),
    )  # fmt: skip
    return Plan(launches=launches, outputs=(y, summed, mean, rstd), config=config)


def plan_backward(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, skip: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    modulations: list[Tensor], mean: Tensor, rstd: Tensor, scale_offset: float, silu: bool, dropout_p: float,
    seed: Tensor | None, residual_scale: float = 1.0, *, config: GroupNormConfig | None = None,
) -> Plan:  # fmt: skip
    """Plan the op `modulated_group_norm_backward`, whose arguments these are; x must not be empty."""
    layout = image_memory_format(x)
    # A compiled backward may hand on a gradient in another layout.
    x, dy, (skip, dsummed) = *(t.contiguous(memory_format=layout) for t in (x, dy)), _in_layout(layout, skip, dsummed)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    problem = Problem.of(x, skip, rstd.shape[1], backward=True, dropout=dropout_p > 0.0)
    config = config or choose(problem, x.device)
    dx = _image_like(x, problem.channels, layout)
    dskip = x.new_empty(0) if skip is None else _image_like(x, problem.skip_channels, layout)
    dweight, dbias = (x.new_empty(0) if p is None else torch.empty_like(p) for p in (weight, bias))
    dmodulations = [torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in modulations]
    outputs = (dx, dskip, dweight, dbias, dmodulations)
    wants_sums = weight is not None or bias is not None
    parameters = _parameters(weight, bias, modulations, scale_offset)
    absent = [None] * (4 - len(dmodulations))
    names = ("dscale1_ptr", "dshift1_ptr", "dscale2_ptr", "dshift2_ptr")
    gradients = dict(zip(names, (*dmodulations, *absent), strict=True))
    dropout, dropout_constants = _dropout(problem, config, dropout_p, seed)
    image = {**_image_arguments(problem, config, x, skip), "dy_ptr": dy}
    targets = {
        "dx_ptr": dx, "dskip_ptr": None if skip is None else dskip, "dsummed_ptr": dsummed,
        "residual_scale": _factor(residual_scale),
    }  # fmt: skip
    constants = _tile_constants(problem, config)
    finish = {"SILU": silu, **dropout_constants}
    statistics = {"mean_ptr": mean, "rstd_ptr": rstd}

    def reduction(sums: Tensor) -> tuple[Launch, ...]:
        num_blocks = sums.shape[1]
        return (Launch(
            kernel=split._modulated_group_norm_bwd_reduce_kernel,
            grid=(math.ceil(problem.all_channels / _REDUCE_SLAB),),
            arguments={
                "sums_ptr": sums, "dweight_ptr": None if weight is None else dweight,
                "dbias_ptr": None if bias is None else dbias, "num_blocks": num_blocks,
                "all_channels": problem.all_channels,
            },
            constants={"ROWS": _REDUCE_ROWS, "SLAB": _REDUCE_SLAB},
            num_warps=4,
        ),) if wants_sums else ()  # fmt: skip

    num_blocks = math.ceil(len(x) / config.samples)
    sums = x.new_empty((2, num_blocks, problem.all_channels), dtype=torch.float32) if wants_sums else None
    if config.variant != "split":
        launch = Launch(
            kernel=resident._modulated_group_norm_bwd_resident_kernel,
            grid=(config.num_programs(problem),),
            arguments={
                **image, **parameters, **statistics, **dropout, **targets, **gradients, "sums_ptr": sums,
                "num_samples": len(x), "num_blocks": num_blocks,
            },
            constants={**constants, **_group_constants(problem, config), **_walk_constants(config), **finish},
            num_warps=config.num_warps,
        )  # fmt: skip
        return Plan(launches=(launch, *(reduction(sums) if sums is not None else ())), outputs=outputs, config=config)

    chunks = _chunk_arguments(problem, config)
    partials = x.new_empty((len(x), chunks["num_chunks"], 2, problem.all_channels), dtype=torch.float32)
    coefficients = {
        "coefficients_ptr": x.new_empty((len(x), 2, problem.all_channels), dtype=torch.float32),
        "group_coefficients_ptr": x.new_empty((len(x), problem.num_groups, 2), dtype=torch.float32),
    }
    grid = (config.num_programs(problem),)
    launches = (
        Launch(
            kernel=split._modulated_group_norm_bwd_sums_kernel,
            grid=grid,
            arguments={**image, **parameters, **statistics, **dropout, **chunks, "partials_ptr": partials},
            constants={**constants, "TILES": config.tiles, "GROUP_CHANNELS": problem.group_channels, **finish},
            num_warps=config.num_warps,
        ),
        Launch(
            kernel=split._modulated_group_norm_bwd_fold_kernel,
            grid=(len(x) * (problem.num_groups // config.groups),),
            arguments={
                **parameters, **gradients, **coefficients, **_fold_arguments(problem, config),
                "num_chunks": chunks["num_chunks"], "num_samples": len(x), "partials_ptr": partials,
                "rstd_ptr": rstd, "sums_ptr": sums,
            },
            constants=_fold_constants(problem, config),
            num_warps=_fold_warps(problem, config),
        ),
        Launch(
            kernel=split._modulated_group_norm_bwd_apply_kernel,
            grid=grid,
            arguments={
                **image, **targets, **dropout, **chunks, **coefficients, "mean_ptr": mean, "num_programs": grid[0],
            },
            constants={**constants, "TILES": config.tiles, "GROUP_CHANNELS": problem.group_channels, **finish},
            num_warps=config.num_warps,
        ),
        *(reduction(sums) if sums is not None else ()),
    )  # fmt: skip
    return Plan(launches=launches, outputs=outputs, config=config)


def forward(*arguments: Any) -> tuple[Any, ...]:
    """Run the op `modulated_group_norm` on a GPU."""
    return plan_forward(*arguments).run()


def backward(*arguments: Any) -> tuple[Any, ...]:
    """Run the op `modulated_group_norm_backward` on a GPU."""
    return plan_backward(*arguments).run()


def _in_layout(layout: torch.memory_format, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous(memory_format=layout) for t in tensors]


def _image_like(x: Tensor, channels: int, layout: torch.memory_format) -> Tensor:
    return torch.empty((len(x), channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=layout)


def _image_arguments(problem: Problem, config: GroupNormConfig, x: Tensor, skip: Tensor | None) -> dict[str, Any]:
    """Return what says where the image tensors lie and how slabs of channels cover them."""
    width = config.slab if config.variant == "split" else config.groups * problem.group_channels
    slabs_of_x = math.ceil(problem.channels / width)
    return {
        "x_ptr": x, "skip_ptr": skip, "spatial": problem.spatial, "channels": problem.channels,
        "skip_channels": problem.skip_channels, "slabs_of_x": slabs_of_x,
        "num_slabs": slabs_of_x + math.ceil(problem.skip_channels / width),
    }  # fmt: skip


def _parameters(
    weight: Tensor | None, bias: Tensor | None, modulations: list[Tensor], scale_offset: float
) -> dict[str, Any]:
    """Return weight, bias and the modulations; those are read where they lie if their channels are neighbours."""
    arguments: dict[str, Any] = {"scale_offset": scale_offset}
    for name, parameter in (("weight", weight), ("bias", bias)):
        arguments[f"{name}_ptr"] = None if parameter is None else parameter.contiguous()
    for index in range(2):
        for name, position in ((f"scale{index + 1}", 2 * index), (f"shift{index + 1}", 2 * index + 1)):
            tensor = modulations[position] if position < len(modulations) else None
            if tensor is not None and tensor.stride(1) != 1:
                tensor = tensor.contiguous()
            arguments[f"{name}_ptr"] = tensor
            arguments[f"{name}_stride"] = 0 if tensor is None else tensor.stride(0)
    return arguments


def _factor(residual_scale: float) -> float | None:
    """Return the factor on the sum as a kernel takes it: with none at all where it is 1, it is not compiled in."""
    return None if residual_scale == 1.0 else float(residual_scale)


def _dropout(
    problem: Problem, config: GroupNormConfig, dropout_p: float, seed: Tensor | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments and constants of dropout."""
    threshold = keep_threshold(dropout_p)
    seed = None if seed is None else seed.contiguous()
    arguments = {"seed_ptr": seed, "threshold": threshold, "keep_scale": 65536 / (65536 - threshold)}
    constants = {
        "DROPOUT": problem.dropout,
        "SEED_PER_SAMPLE": seed is not None and seed.ndim == 1,
        "EIGHTS": problem.spatial % 8 == 0 and config.rows % 8 == 0,
    }
    return arguments, constants


def _tile_constants(problem: Problem, config: GroupNormConfig) -> dict[str, Any]:
    span = config.rows * problem.all_channels if problem.channels_last else config.slab * problem.spatial
    return {
        "SLAB": config.slab, "ROWS": config.rows, "CHANNELS_LAST": problem.channels_last, "WIDE": span >= 2**31
    }  # fmt: skip


def _group_constants(problem: Problem, config: GroupNormConfig) -> dict[str, Any]:
    return {
        "GROUP_CHANNELS": problem.group_channels, "GROUPS": config.groups,
        "GROUPS_PADDED": 1 << (config.groups - 1).bit_length(),
    }  # fmt: skip


def _walk_constants(config: GroupNormConfig) -> dict[str, Any]:
    return {"HELD": config.variant == "resident", "SAMPLES": config.samples}


def _chunk_arguments(problem: Problem, config: GroupNormConfig) -> dict[str, Any]:
    return {"num_chunks": math.ceil(problem.spatial / (config.rows * config.tiles))}


def _fold_arguments(problem: Problem, config: GroupNormConfig) -> dict[str, Any]:
    return {
        "spatial": problem.spatial, "all_channels": problem.all_channels,
        "num_slabs": problem.num_groups // config.groups,
    }  # fmt: skip


def _fold_constants(problem: Problem, config: GroupNormConfig) -> dict[str, Any]:
    slab = 1 << (config.groups * problem.group_channels - 1).bit_length()
    chunks = max(1, min(_FOLD_CHUNKS, _FOLD_ELEMENTS // slab))
    return {**_group_constants(problem, config), "SLAB": slab, "CHUNKS": chunks}


def _fold_warps(problem: Problem, config: GroupNormConfig) -> int:
    """Return enough warps for four elements a thread of a tile of partial sums."""
    slab = 1 << (config.groups * problem.group_channels - 1).bit_length()
    return min(8, max(1, slab * _FOLD_CHUNKS // 128))
