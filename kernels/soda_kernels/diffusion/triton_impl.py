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
from soda_kernels._philox import STREAMS
from soda_kernels.diffusion.config import TileConfig, choose
from soda_kernels.diffusion.triton_noising import (
    _add_noise_kernel,
    _denoising_loss_bwd_kernel,
    _denoising_loss_kernel,
    _denoising_loss_total_kernel,
    _philox_kernel,
)
from soda_kernels.diffusion.triton_sampler import _sampler_step_kernel

_PHILOX_BLOCK = 1024
_TOTAL_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class _Geometry:
    """How a sample of some images is cut into tiles."""

    positions: int
    channels: int
    config: TileConfig

    @classmethod
    def of(cls, images: Sequence[Tensor], config: TileConfig | None) -> _Geometry:
        x = images[0]
        channels, positions = x.shape[1], x.shape[2:].numel()
        if all(image.is_contiguous() for image in images):
            channels, positions = 1, channels * positions
        return cls(
            positions=positions, channels=channels,
            config=config or choose(x.shape[0], positions, channels, x.device),
        )  # fmt: skip

    @property
    def position_chunks(self) -> int:
        return math.ceil(self.positions / self.config.positions)

    @property
    def chunks(self) -> int:
        """Tiles of a sample."""
        return self.position_chunks * math.ceil(self.channels / self.config.channels)

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
        position, channel = (1, self.positions) if image.is_contiguous() else (image.shape[1], 1)
        prefix = f"{name}_" if name else ""
        return {f"{prefix}position_stride": position, f"{prefix}channel_stride": channel}


def plan_philox(
    seed: Tensor, sample_ids: Tensor, step: Tensor, num: int, stream: int, dtype: torch.dtype, *, normal: bool
) -> Plan:
    """Plan the op `philox_normal` or `philox_uniform`, whose arguments these are; nothing may be empty."""
    out = sample_ids.new_empty((len(sample_ids), num), dtype=dtype)
    chunks = math.ceil(num / _PHILOX_BLOCK)
    launch = Launch(
        kernel=_philox_kernel, grid=(len(sample_ids) * chunks,),
        arguments={"out_ptr": out, **_key(seed, sample_ids, step), "num": num, "chunks": chunks},
        constants={"BLOCK": _PHILOX_BLOCK, "STREAM": stream, "NORMAL": normal, "STEP_PER_SAMPLE": step.ndim > 0},
        num_warps=4,
    )  # fmt: skip
    return Plan(launches=(launch,), outputs=(out,), config=None)


def plan_add_noise(
    x0: Tensor, step_index: Tensor | None, alpha: Tensor, sigma: Tensor, seed: Tensor, sample_ids: Tensor, step: Tensor,
    sampling: str, first_stratum: int, num_strata: int, dtype: torch.dtype, *, config: TileConfig | None = None,
) -> Plan:  # fmt: skip
    """Plan the op `add_noise`, whose arguments these are; x0 may not be empty."""
    if step_index is None or x0.dtype == torch.uint8:
        raise NotImplementedError
    x0 = _dense(x0)
    x_t = torch.empty_like(_empty_like(x0), dtype=dtype)
    geometry = _Geometry.of((x0,), config)
    launch = Launch(
        kernel=_add_noise_kernel, grid=(x0.shape[0] * geometry.chunks,),
        arguments={
            "x0_ptr": x0, "x_t_ptr": x_t, "index_ptr": step_index.contiguous(), **_tables(alpha, sigma),
            **_key(seed, sample_ids, step), **geometry.arguments, **geometry.strides("x0", x0),
            **geometry.strides("x_t", x_t),
        },
        constants={**geometry.constants("noise"), "STEP_PER_SAMPLE": step.ndim > 0},
        num_warps=geometry.config.num_warps,
    )  # fmt: skip
    return Plan(launches=(launch,), outputs=(x_t, sample_ids.new_empty(0)), config=geometry.config)


def plan_denoising_loss(
    prediction: Tensor, x0: Tensor, step_index: Tensor, alpha: Tensor, sigma: Tensor, weights: Tensor | None,
    seed: Tensor, sample_ids: Tensor, step: Tensor, target: str, save_gradient: bool, *,
    config: TileConfig | None = None,
) -> Plan:  # fmt: skip
    """Plan the op `denoising_loss`, whose arguments these are; the prediction may not be empty."""
    if save_gradient or x0.dtype == torch.uint8:
        raise NotImplementedError
    arguments, constants, geometry = _loss_arguments(
        prediction, x0, step_index, alpha, sigma, seed, sample_ids, step, target, config
    )
    batch = prediction.shape[0]
    partial, loss = (prediction.new_empty(size, dtype=torch.float32) for size in (batch * geometry.chunks, batch))
    squares = Launch(
        kernel=_denoising_loss_kernel, grid=(batch * geometry.chunks,), arguments={**arguments, "partial_ptr": partial},
        constants=constants, num_warps=geometry.config.num_warps,
    )  # fmt: skip
    total = Launch(
        kernel=_denoising_loss_total_kernel, grid=(batch,),
        arguments={
            "partial_ptr": partial, "index_ptr": arguments["index_ptr"], "weights_ptr": weights, "loss_ptr": loss,
            "num_steps": len(alpha), "chunks": geometry.chunks, "share": 1 / prediction[0].numel(),
        },
        constants={"BLOCK": _TOTAL_BLOCK}, num_warps=4,
    )  # fmt: skip
    return Plan(launches=(squares, total), outputs=(loss, prediction.new_empty(0)), config=geometry.config)


def plan_denoising_loss_backward(
    dloss: Tensor, prediction: Tensor, x0: Tensor, step_index: Tensor, alpha: Tensor, sigma: Tensor,
    weights: Tensor | None, seed: Tensor, sample_ids: Tensor, step: Tensor, target: str, *,
    config: TileConfig | None = None,
) -> Plan:  # fmt: skip
    """Plan the op `denoising_loss_backward`, whose arguments these are; the prediction may not be empty."""
    arguments, constants, geometry = _loss_arguments(
        prediction, x0, step_index, alpha, sigma, seed, sample_ids, step, target, config
    )
    dprediction = _empty_like(prediction)
    launch = Launch(
        kernel=_denoising_loss_bwd_kernel, grid=(prediction.shape[0] * geometry.chunks,),
        arguments={
            **arguments, "dloss_ptr": dloss, "dloss_stride": dloss.stride(0), "weights_ptr": weights,
            "dprediction_ptr": dprediction, "share": 2 / prediction[0].numel(),
        },
        constants=constants, num_warps=geometry.config.num_warps,
    )  # fmt: skip
    return Plan(launches=(launch,), outputs=(dprediction,), config=geometry.config)


def plan_sampler_step(
    x_t: Tensor, cond: Tensor, uncond: Tensor | None, alpha: Tensor, sigma: Tensor, logsnr: Tensor,
    step_index: Tensor, next_index: Tensor, method: str, target: str, cfg_scale: float, eta: float,
    clip_x0: float | None, guidance_rescale: float, previous_x0: Tensor | None, previous_index: Tensor | None,
    seed: Tensor | None, sample_ids: Tensor | None, *, config: TileConfig | None = None,
) -> Plan:  # fmt: skip
    """Plan the op `sampler_step`, whose arguments these are; x_t may not be empty."""
    if guidance_rescale:
        raise NotImplementedError
    layout = image_memory_format(x_t)
    x_t, cond = x_t.contiguous(memory_format=layout), cond.contiguous(memory_format=layout)
    uncond, previous_x0 = (x if x is None else x.contiguous(memory_format=layout) for x in (uncond, previous_x0))
    x_next, x0 = _empty_like(x_t), _empty_like(x_t)
    geometry = _Geometry.of((x_t,), config)
    launch = Launch(
        kernel=_sampler_step_kernel, grid=(x_t.shape[0] * geometry.chunks,),
        arguments={
            "x_t_ptr": x_t, "cond_ptr": cond, "uncond_ptr": uncond, "previous_x0_ptr": previous_x0,
            "x_next_ptr": x_next, "x0_ptr": x0, **_tables(alpha, sigma), "logsnr_ptr": logsnr.contiguous(),
            "step_index_ptr": step_index, "next_index_ptr": next_index, "previous_index_ptr": previous_index,
            "seed_ptr": seed, "ids_ptr": sample_ids if sample_ids is None else sample_ids.contiguous(),
            **geometry.arguments, "cfg_scale": cfg_scale, "eta": eta, "clip_x0": clip_x0 or 0.0,
            **geometry.strides("", x_t),
        },
        constants={
            **geometry.constants("sampler"), "METHOD": method, "TARGET": target, "CLIPS": clip_x0 is not None,
            "DRAWS": method == "ddpm" or eta > 0.0,
        },
        num_warps=geometry.config.num_warps,
    )  # fmt: skip
    return Plan(launches=(launch,), outputs=(x_next, x0), config=geometry.config)


def _loss_arguments(
    prediction: Tensor, x0: Tensor, step_index: Tensor, alpha: Tensor, sigma: Tensor, seed: Tensor,
    sample_ids: Tensor, step: Tensor, target: str, config: TileConfig | None,
) -> tuple[dict[str, Any], dict[str, Any], _Geometry]:  # fmt: skip
    prediction, x0 = _dense(prediction), _dense(x0)
    geometry = _Geometry.of((prediction,) if target == "eps" else (prediction, x0), config)
    arguments = {
        "prediction_ptr": prediction, "x0_ptr": None if target == "eps" else x0, "index_ptr": step_index.contiguous(),
        **_tables(alpha, sigma), **_key(seed, sample_ids, step), **geometry.arguments,
        **geometry.strides("prediction", prediction), **geometry.strides("x0", x0),
    }  # fmt: skip
    constants = {**geometry.constants("noise"), "STEP_PER_SAMPLE": step.ndim > 0, "TARGET": target}
    return arguments, constants, geometry


def _tables(alpha: Tensor, sigma: Tensor) -> dict[str, Any]:
    return {"alpha_ptr": alpha.contiguous(), "sigma_ptr": sigma.contiguous(), "num_steps": len(alpha)}


def _key(seed: Tensor, sample_ids: Tensor, step: Tensor) -> dict[str, Tensor]:
    return {"seed_ptr": seed, "ids_ptr": sample_ids.contiguous(), "step_ptr": step.contiguous()}


def _dense(image: Tensor) -> Tensor:
    """The image itself where it is contiguous or channels_last, else a contiguous copy."""
    return image.contiguous(memory_format=image_memory_format(image))


def _empty_like(image: Tensor) -> Tensor:
    return torch.empty_like(image, memory_format=image_memory_format(image))
