"""Launchers of noise-schedule sampling: which kernels run over which grid, and what they write.

They decide and allocate; what they return runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soda_kernels._checks import image_memory_format
from soda_kernels._launch import Launch, Plan
from soda_kernels._philox import SHARED_ID, STREAMS
from soda_kernels.diffusion.config import Problem, TileConfig, choose
from soda_kernels.diffusion.triton_noising import (
    _add_noise_kernel,
    _denoising_loss_kernel,
    _denoising_loss_total_kernel,
    _draw_step_index_kernel,
    _philox_kernel,
    _scale_samples_kernel,
)
from soda_kernels.diffusion.triton_sampler import _guidance_moments_kernel, _sampler_step_kernel

_INDEX_BLOCK = 128
_TOTAL_BLOCK = 256
_MOMENTS_BLOCK = 2048
# The seed and the step, which lie side by side if their caller wants that, and the sample id.
_KEY_SECTORS = 2
# Of a sample whose moments are taken. Every program of the step reads all of its sample's.
_MOST_PARTS = 64


@dataclass(frozen=True, kw_only=True)
class _Geometry:
    """How a sample of some images is cut into tiles."""

    problem: Problem
    config: TileConfig

    @classmethod
    def of(
        cls, kernel: str, images: Sequence[Tensor], config: TileConfig | None, *, draws: bool = True,
        whole: bool = False, many_registers: bool = False, moved: int = 0, sums: bool = False,
        scalars: tuple[int, int] = (0, 0),
    ) -> _Geometry:  # fmt: skip
        """Cut dense images.

        Args:
            kernel: what goes over them, as a table of tuned configs calls it.
            draws: whether noise is drawn, for which elements are told apart by their channels and positions. Without it
                images of one layout are taken as they lie in memory.
            whole: whether a tile that holds a whole sample is wanted, if there is one.
            many_registers: whether the kernel needs more than others.
            moved: bytes of an element of all images, if they are more than those.
            sums: whether tiles of a sample are summed.
            scalars: the sectors of scalars of a program, and of a sample.
        """
        x = images[0]
        channels, positions = x.shape[1], x.shape[2:].numel()
        layouts = {image_memory_format(image) for image in images}
        if layouts == {torch.contiguous_format} or (len(layouts) == 1 and not draws):
            channels, positions = 1, channels * positions
        problem = Problem(
            kernel=kernel, batch=x.shape[0], positions=positions, channels=channels, draws=draws, whole=whole,
            many_registers=many_registers, element_bytes=tuple(sorted({image.element_size() for image in images})),
            moved=moved or sum(image.element_size() for image in images), sums=sums, scalars=scalars[0],
            scalars_of_a_sample=scalars[1],
        )  # fmt: skip
        return cls(problem=problem, config=config or choose(problem, x.device))

    @property
    def positions(self) -> int:
        return self.problem.positions

    @property
    def channels(self) -> int:
        return self.problem.channels

    @property
    def position_chunks(self) -> int:
        return math.ceil(self.positions / self.config.positions)

    @property
    def chunks(self) -> int:
        """Tiles of a sample."""
        return self.position_chunks * math.ceil(self.channels / self.config.channels)

    @property
    def samples(self) -> int:
        """Samples of a program."""
        divides = self.problem.sums and self.chunks == 1 and self.problem.batch % self.config.samples == 0
        return self.config.samples if divides else 1

    @property
    def arguments(self) -> dict[str, int]:
        return {
            "positions": self.positions, "channels": self.channels, "position_chunks": self.position_chunks,
            "chunks": self.chunks,
        }  # fmt: skip

    def constants(self, stream: str) -> dict[str, Any]:
        return {
            "POSITIONS": self.config.positions, "CHANNELS": self.config.channels,
            "FOURS": self.channels == 1 or self.positions % 4 == 0, "STREAM": STREAMS[stream],
        }  # fmt: skip

    def strides(self, name: str, image: Tensor) -> dict[str, int]:
        """Return a dense image's strides by the names of the kernels' parameters."""
        plain = self.channels == 1 or image.is_contiguous()
        position, channel = (1, self.positions) if plain else (image.shape[1], 1)
        prefix = f"{name}_" if name else ""
        return {f"{prefix}position_stride": position, f"{prefix}channel_stride": channel}


def plan_philox(
    seed: Tensor, sample_ids: Tensor, step: Tensor, num: int, stream: int, dtype: torch.dtype, *, normal: bool,
    config: TileConfig | None = None,
) -> Plan:  # fmt: skip
    """Plan the op `philox_normal` or `philox_uniform`, whose arguments these are; nothing may be empty."""
    out = sample_ids.new_empty((len(sample_ids), num), dtype=dtype)
    problem = Problem(
        kernel="philox_normal" if normal else "philox_uniform", batch=len(sample_ids), positions=num, channels=1,
        element_bytes=(dtype.itemsize,), moved=dtype.itemsize, scalars=_KEY_SECTORS,
    )  # fmt: skip
    config = config or choose(problem, out.device)
    chunks = math.ceil(num / config.positions)
    launch = Launch(
        kernel=_philox_kernel, grid=(len(sample_ids) * chunks,),
        arguments={"out_ptr": out, **_key(seed, sample_ids, step), "num": num, "chunks": chunks},
        constants={"BLOCK": config.positions, "STREAM": stream, "NORMAL": normal, "STEP_PER_SAMPLE": step.ndim > 0},
        num_warps=config.num_warps,
    )  # fmt: skip
    return Plan(launches=(launch,), outputs=(out,), config=config, problem=problem)


def plan_draw_step_index(
    seed: Tensor, sample_ids: Tensor, step: Tensor, num_steps: int, sampling: str, first_stratum: int, num_strata: int
) -> Plan:
    """Plan the op `draw_step_index`, whose arguments these are; there must be samples."""
    drawn = torch.empty_like(sample_ids, memory_format=torch.contiguous_format)
    launch = Launch(
        kernel=_draw_step_index_kernel, grid=(math.ceil(len(sample_ids) / _INDEX_BLOCK),),
        arguments={
            "drawn_ptr": drawn, **_key(seed, sample_ids, step), "batch": len(sample_ids), "num_steps": num_steps,
            "first_stratum": first_stratum, "num_strata": num_strata,
        },
        constants={"BLOCK": _INDEX_BLOCK, "STEP_PER_SAMPLE": step.ndim > 0, **_sampling(sampling)}, num_warps=4,
    )  # fmt: skip
    return Plan(launches=(launch,), outputs=(drawn,), config=None)


def plan_add_noise(
    x0: Tensor, step_index: Tensor | None, alpha: Tensor, sigma: Tensor, seed: Tensor, sample_ids: Tensor, step: Tensor,
    sampling: str, first_stratum: int, num_strata: int, dtype: torch.dtype, *, config: TileConfig | None = None,
) -> Plan:  # fmt: skip
    """Plan the op `add_noise`, whose arguments these are; x0 may not be empty."""
    x0 = _dense(x0)
    x_t = _empty_like(x0, dtype)
    drawn = sample_ids.new_empty(len(x0) if step_index is None else 0)
    # The index and a step's entries of the schedule.
    geometry = _Geometry.of("add_noise", (x0, x_t), config, scalars=(_KEY_SECTORS + 2, 0))
    launch = Launch(
        kernel=_add_noise_kernel, grid=(x0.shape[0] * geometry.chunks,),
        arguments={
            "x0_ptr": x0, "x_t_ptr": x_t, "index_ptr": step_index if step_index is None else step_index.contiguous(),
            "drawn_ptr": drawn if step_index is None else None, **_tables(alpha, sigma),
            **_key(seed, sample_ids, step), "first_stratum": first_stratum, "num_strata": num_strata,
            **geometry.arguments, **geometry.strides("x0", x0), **geometry.strides("x_t", x_t),
        },
        constants={**geometry.constants("noise"), "STEP_PER_SAMPLE": step.ndim > 0, **_sampling(sampling)},
        num_warps=geometry.config.num_warps,
    )  # fmt: skip
    return Plan(launches=(launch,), outputs=(x_t, drawn), config=geometry.config, problem=geometry.problem)


def plan_add_noise_backward(
    dx_t: Tensor, step_index: Tensor, alpha: Tensor, *, config: TileConfig | None = None
) -> Plan:
    """Plan the op `add_noise_backward`, whose arguments these are; dx_t may not be empty."""
    return _plan_scaling(dx_t, alpha, step_index, config)


def plan_scale_samples(gradient: Tensor, dloss: Tensor, *, config: TileConfig | None = None) -> Plan:
    """Plan the op `scale_samples`, whose arguments these are; the gradient may not be empty."""
    return _plan_scaling(gradient, dloss, None, config)


def plan_denoising_loss(
    prediction: Tensor, x0: Tensor, step_index: Tensor, alpha: Tensor, sigma: Tensor, weights: Tensor | None,
    seed: Tensor, sample_ids: Tensor, step: Tensor, target: str, save_gradient: bool, *,
    config: TileConfig | None = None,
) -> Plan:  # fmt: skip
    """Plan the op `denoising_loss`, whose arguments these are; the prediction may not be empty."""
    gradient = _empty_like(prediction) if save_gradient else prediction.new_empty(0)
    loss = prediction.new_empty(len(prediction), dtype=torch.float32)
    tiles, geometry = _plan_errors(
        prediction, x0, step_index, alpha, sigma, weights, seed, sample_ids, step, target, config,
        gradient=gradient if save_gradient else None, loss=loss,
    )  # fmt: skip
    if geometry.chunks == 1:  # a tile's sum is its sample's
        return Plan(launches=(tiles,), outputs=(loss, gradient), config=geometry.config, problem=geometry.problem)
    total = Launch(
        kernel=_denoising_loss_total_kernel, grid=(len(prediction),),
        arguments={
            **{
                name: tiles.arguments[name]
                for name in ("partial_ptr", "index_ptr", "weights_ptr", "weights_stride", "num_steps")
            },
            "loss_ptr": loss, "chunks": geometry.chunks, "loss_share": 1 / prediction[0].numel(),
        },
        constants={"BLOCK": _TOTAL_BLOCK}, num_warps=4,
    )  # fmt: skip
    return Plan(launches=(tiles, total), outputs=(loss, gradient), config=geometry.config, problem=geometry.problem)


def plan_denoising_loss_backward(
    dloss: Tensor, prediction: Tensor, x0: Tensor, step_index: Tensor, alpha: Tensor, sigma: Tensor,
    weights: Tensor | None, seed: Tensor, sample_ids: Tensor, step: Tensor, target: str, *,
    config: TileConfig | None = None,
) -> Plan:  # fmt: skip
    """Plan the op `denoising_loss_backward`, whose arguments these are; the prediction may not be empty."""
    gradient = _empty_like(prediction)
    launch, geometry = _plan_errors(
        prediction, x0, step_index, alpha, sigma, weights, seed, sample_ids, step, target, config, gradient=gradient,
        dloss=dloss,
    )  # fmt: skip
    return Plan(launches=(launch,), outputs=(gradient,), config=geometry.config, problem=geometry.problem)


def plan_sampler_step(
    x_t: Tensor, cond: Tensor, uncond: Tensor | None, alpha: Tensor, sigma: Tensor, logsnr: Tensor,
    step_index: Tensor, next_index: Tensor, method: str, target: str, cfg_scale: float, eta: float,
    clip_x0: float | None, guidance_rescale: float, previous_x0: Tensor | None, previous_index: Tensor | None,
    seed: Tensor | None, sample_ids: Tensor | None, *, config: TileConfig | None = None,
) -> Plan:  # fmt: skip
    """Plan the op `sampler_step`, whose arguments these are; x_t may not be empty."""
    layout = image_memory_format(x_t)
    x_t, cond = x_t.contiguous(memory_format=layout), cond.contiguous(memory_format=layout)
    uncond, previous_x0 = (x if x is None else x.contiguous(memory_format=layout) for x in (uncond, previous_x0))
    x_next, x0 = _empty_like(x_t), _empty_like(x_t)
    draws = method == "ddpm" or eta > 0.0
    rescales = guidance_rescale > 0.0 and uncond is not None
    kernel = "-".join(["sampler_step", method, *["guided"] * (uncond is not None), *["rescaled"] * rescales,
                       *["drawing"] * draws])  # fmt: skip
    read = 2 + (uncond is not None) + (previous_x0 is not None)
    # The indices of one tensor, and the schedule's entries at each.
    scalars = 3 + (previous_x0 is not None) + _KEY_SECTORS * draws
    geometry = _Geometry.of(
        kernel, (x_t,), config, draws=draws, whole=rescales, many_registers=True, scalars=(scalars, 0),
        moved=(read + 2) * x_t.element_size(),
    )  # fmt: skip
    before: tuple[Launch, ...] = ()
    walkers = geometry.config.walkers if rescales else 0
    moments = {"moments_ptr": None, "parts": walkers}
    if uncond is not None and rescales and geometry.chunks > 1 and not walkers:
        before = (_guidance_moments(cond, uncond, cfg_scale),)
        moments = {name: before[0].arguments[name] for name in moments}
    launch = Launch(
        kernel=_sampler_step_kernel, grid=(x_t.shape[0] * (walkers or geometry.chunks),),
        arguments={
            "x_t_ptr": x_t, "cond_ptr": cond, "uncond_ptr": uncond, "previous_x0_ptr": previous_x0,
            "x_next_ptr": x_next, "x0_ptr": x0, **_tables(alpha, sigma),
            "logsnr_ptr": logsnr, "logsnr_stride": logsnr.stride(0),
            "step_index_ptr": step_index, "next_index_ptr": next_index, "previous_index_ptr": previous_index,
            "seed_ptr": seed, "ids_ptr": sample_ids if sample_ids is None else sample_ids.contiguous(),
            **geometry.arguments, **moments, "cfg_scale": cfg_scale, "eta": eta, "clip_x0": clip_x0 or 0.0,
            "guidance_rescale": guidance_rescale, **geometry.strides("", x_t),
        },
        constants={
            **geometry.constants("sampler"), "METHOD": method, "TARGET": target, "CLIPS": clip_x0 is not None,
            "DRAWS": draws, "RESCALES": rescales, "WALKS": walkers > 0, "PARTS": _MOST_PARTS,
        },
        num_warps=geometry.config.num_warps,
    )  # fmt: skip
    return Plan(launches=(*before, launch), outputs=(x_next, x0), config=geometry.config, problem=geometry.problem)


def _guidance_moments(cond: Tensor, uncond: Tensor, cfg_scale: float) -> Launch:
    """Launch the moments of cond and of guided outputs, as many parts of a sample as there are to fill a chip."""
    num = cond[0].numel()
    part_size = _MOMENTS_BLOCK * math.ceil(num / (_MOST_PARTS * _MOMENTS_BLOCK))
    parts = math.ceil(num / part_size)
    return Launch(
        kernel=_guidance_moments_kernel, grid=(len(cond) * parts,),
        arguments={
            "cond_ptr": cond, "uncond_ptr": uncond,
            "moments_ptr": cond.new_empty((len(cond), 5, parts), dtype=torch.float32), "cfg_scale": cfg_scale,
            "num": num, "part_size": part_size, "parts": parts,
        },
        constants={"BLOCK": _MOMENTS_BLOCK}, num_warps=8,
    )  # fmt: skip


def _plan_errors(
    prediction: Tensor, x0: Tensor, step_index: Tensor, alpha: Tensor, sigma: Tensor, weights: Tensor | None,
    seed: Tensor, sample_ids: Tensor, step: Tensor, target: str, config: TileConfig | None, *,
    gradient: Tensor | None, dloss: Tensor | None = None, loss: Tensor | None = None,
) -> tuple[Launch, _Geometry]:  # fmt: skip
    """Launch the kernel that forms prediction - target, for the loss, its gradient, or both.

    Where a sample has several tiles, their sums of squares are written in place of the loss.
    """
    prediction, x0 = _dense(prediction), _dense(x0)
    images = (prediction,) if target == "eps" else (prediction, x0)
    kernel = "denoising_loss_backward" if loss is None else "denoising_loss"
    saving = "-saving" if loss is not None and gradient is not None else ""
    geometry = _Geometry.of(
        f"{kernel}-{target}{saving}", images, config, draws=target != "x0",
        many_registers=target == "v" and gradient is not None,
        moved=sum(image.element_size() for image in (*images, *([] if gradient is None else [gradient]))),
        sums=loss is not None, scalars=_error_scalars(target, weights is not None, gradient is not None),
    )  # fmt: skip
    num_programs = len(prediction) * geometry.chunks // geometry.samples
    partial = None
    if loss is not None and geometry.chunks > 1:
        partial, loss = prediction.new_empty(num_programs, dtype=torch.float32), None
    launch = Launch(
        kernel=_denoising_loss_kernel, grid=(num_programs,),
        arguments={
            "prediction_ptr": prediction, "x0_ptr": None if target == "eps" else x0,
            "index_ptr": step_index.contiguous(), **_tables(alpha, sigma),
            "weights_ptr": weights, "weights_stride": 0 if weights is None else weights.stride(0),
            **_key(seed, sample_ids, step), "dloss_ptr": dloss,
            "partial_ptr": partial, "loss_ptr": loss, "gradient_ptr": gradient, **geometry.arguments,
            "loss_share": 1 / prediction[0].numel(),
            **geometry.strides("prediction", prediction), **geometry.strides("x0", x0),
            "dloss_stride": 0 if dloss is None else dloss.stride(0),
        },
        constants={
            **geometry.constants("noise"), "STEP_PER_SAMPLE": step.ndim > 0, "TARGET": target,
            "SAMPLES": geometry.samples,
        },
        num_warps=geometry.config.num_warps,
    )  # fmt: skip
    return launch, geometry


def _error_scalars(target: str, weighted: bool, writes_gradient: bool) -> tuple[int, int]:
    """Count the sectors of scalars of a program of the loss, and those of a sample."""
    # The key; of v the index and the schedule's entries; the sum or what comes back for the loss.
    of_a_program = _KEY_SECTORS * (target != "x0") + 2 * (target == "v") + 1
    of_weight = weighted * (1 + (target != "v"))  # with the index, if it was not read
    return (of_a_program + of_weight, 0) if writes_gradient else (of_a_program, of_weight)


def _plan_scaling(image: Tensor, factors: Tensor, index: Tensor | None, config: TileConfig | None) -> Plan:
    """Plan the samples of an image times a factor each, or times those of a table at an index each."""
    image = _dense(image)
    scaled = _empty_like(image)
    geometry = _Geometry.of(
        "scale_samples", (image,), config, draws=False, moved=2 * image.element_size(),
        scalars=(1 if index is None else 2, 0),
    )  # fmt: skip
    launch = Launch(
        kernel=_scale_samples_kernel, grid=(len(image) * geometry.chunks,),
        arguments={
            "image_ptr": image, "scaled_ptr": scaled, "factor_ptr": factors,
            "index_ptr": index if index is None else index.contiguous(),
            "factor_stride": factors.stride(0), "num_factors": len(factors),
            "num": geometry.positions, "chunks": geometry.chunks,
        },
        constants={"BLOCK": geometry.config.positions}, num_warps=geometry.config.num_warps,
    )  # fmt: skip
    return Plan(launches=(launch,), outputs=(scaled,), config=geometry.config, problem=geometry.problem)


def _tables(alpha: Tensor, sigma: Tensor) -> dict[str, Any]:
    return {
        "alpha_ptr": alpha, "sigma_ptr": sigma, "alpha_stride": alpha.stride(0), "sigma_stride": sigma.stride(0),
        "num_steps": len(alpha),
    }  # fmt: skip


def _sampling(sampling: str) -> dict[str, Any]:
    return {"SAMPLING": sampling, "TIMESTEP": STREAMS["timestep"], "SHARED_ID": SHARED_ID}


def _key(seed: Tensor, sample_ids: Tensor, step: Tensor) -> dict[str, Tensor]:
    return {"seed_ptr": seed, "ids_ptr": sample_ids.contiguous(), "step_ptr": step.contiguous()}


def _dense(image: Tensor) -> Tensor:
    """The image itself where it is contiguous or channels_last, else a contiguous copy."""
    return image.contiguous(memory_format=image_memory_format(image))


def _empty_like(image: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(image, dtype=dtype, memory_format=image_memory_format(image))
