"""Schemas and shape functions of noising, loss and sampler steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from soda_kernels._checks import image_memory_format
from soda_kernels._library import define
from soda_kernels.diffusion import reference


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=image_memory_format(x))


def _fake_philox(
    seed: Tensor, sample_ids: Tensor, step: Tensor, num: int, stream: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    return sample_ids.new_empty((sample_ids.shape[0], num), dtype=dtype)


def _fake_loss(prediction: Tensor, x0: Tensor, *_: Any) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, x0.dtype), torch.float32)
    return prediction.new_empty(prediction.shape[0], dtype=dtype)


_LOSS_ARGUMENTS = (
    "Tensor prediction, Tensor x0, Tensor step_index, Tensor alpha, Tensor sigma, Tensor? weights, Tensor seed, "
    "Tensor sample_ids, Tensor step, str target"
)
_PHILOX_SCHEMA = "(Tensor seed, Tensor sample_ids, Tensor step, int num, int stream, ScalarType dtype) -> Tensor"

define("philox_normal", _PHILOX_SCHEMA, reference=reference.philox_normal, fake=_fake_philox)
define("philox_uniform", _PHILOX_SCHEMA, reference=reference.philox_uniform, fake=_fake_philox)
define(
    "add_noise",
    "(Tensor x0, Tensor step_index, Tensor alpha, Tensor sigma, Tensor seed, Tensor sample_ids, Tensor step) -> Tensor",
    reference=reference.add_noise,
    fake=lambda x0, *_: _empty_like(x0),
)
define(
    "add_noise_backward",
    "(Tensor dx_t, Tensor step_index, Tensor alpha) -> Tensor",
    reference=reference.add_noise_backward,
    fake=lambda dx_t, *_: _empty_like(dx_t),
)
define(
    "denoising_loss",
    f"({_LOSS_ARGUMENTS}) -> Tensor",
    reference=reference.denoising_loss,
    fake=_fake_loss,
)
define(
    "denoising_loss_backward",
    f"(Tensor dloss, {_LOSS_ARGUMENTS}) -> Tensor",
    reference=reference.denoising_loss_backward,
    fake=lambda dloss, prediction, *_: _empty_like(prediction),
)
define(
    "sampler_step",
    "(Tensor x_t, Tensor cond, Tensor? uncond, Tensor alpha, Tensor sigma, Tensor logsnr, Tensor step_index, "
    "Tensor next_index, str method, str target, float cfg_scale, float eta, float? clip_x0, Tensor? previous_x0, "
    "Tensor? previous_index, Tensor? seed, Tensor? sample_ids) -> (Tensor, Tensor)",
    reference=reference.sampler_step,
    fake=lambda x_t, *_: (_empty_like(x_t), _empty_like(x_t)),
)
