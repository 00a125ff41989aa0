"""Schemas and shape functions of noising, loss and sampler steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from soda_kernels._checks import image_memory_format
from soda_kernels._library import Describe, define
from soda_kernels._native import native_status
from soda_kernels.diffusion import reference


def _empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=image_memory_format(x))


def _fake_philox(
    seed: Tensor, sample_ids: Tensor, step: Tensor, num: int, stream: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    return sample_ids.new_empty((sample_ids.shape[0], num), dtype=dtype)


def _fake_add_noise(x0: Tensor, step_index: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    sample_ids, dtype = rest[3], rest[-1]
    return _empty_like(x0, dtype), sample_ids.new_empty(x0.shape[0] if step_index is None else 0)


def _fake_loss(prediction: Tensor, x0: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, x0.dtype), torch.float32)
    loss = prediction.new_empty(prediction.shape[0], dtype=dtype)
    return loss, _empty_like(prediction) if rest[-1] else prediction.new_empty(0)


_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of a sample, with room for a tile that begins inside and ends outside.
_MOST_ELEMENTS = 2**31 - 2**16


def _unsupported(*images: Tensor | torch.dtype | None) -> str | None:
    """Say why the kernels cannot take a call with these images, or images of these dtypes; None if they can."""
    for image in images:
        if image is None:
            continue
        dtype = image if isinstance(image, torch.dtype) else image.dtype
        if dtype not in (*_KERNEL_DTYPES, torch.uint8):
            return f"the kernels take fp32, bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
        if isinstance(image, torch.dtype):
            continue
        if image.numel() == 0:
            return "nothing to compute"
        if image.device.type != "cpu" and image[0].numel() > _MOST_ELEMENTS:
            return "the kernels index inside a sample in 32 bits"
    return None


def _gpu(name: str, refuse: Callable[..., str | None], what: str) -> tuple[Callable[..., Any], Describe]:
    """Return how an op runs on a GPU, by the plan `plan_<name>` or the reference, and how it tells what runs.

    Args:
        refuse: takes the op's arguments, and says why the kernels cannot take them, or returns None if they can.
        what: what programs work on.
    """

    def run(*args: Any) -> Any:
        if refuse(*args):
            return getattr(reference, name)(*args)
        from soda_kernels.diffusion import triton_impl

        outputs = getattr(triton_impl, f"plan_{name}")(*args).run()
        return outputs if len(outputs) > 1 else outputs[0]

    def describe(device_type: str, *args: Any) -> tuple[str, dict[str, Any], str]:
        return _choice(device_type, refuse(*args), what)

    return run, describe


def _choice(device_type: str, reason: str | None, what: str) -> tuple[str, dict[str, Any], str]:
    """Tell what runs where the kernels take the call, or for which reason they do not."""
    if reason:
        return "reference", {}, reason
    if device_type == "cpu":
        return "native", {"isa": native_status().isa}, "the native library is loaded"
    return "triton", {}, what


def _gpu_philox(normal: bool) -> Callable[..., Tensor]:
    def run(seed: Tensor, sample_ids: Tensor, step: Tensor, num: int, stream: int, dtype: torch.dtype) -> Tensor:
        if dtype not in _KERNEL_DTYPES or num == 0 or sample_ids.numel() == 0:
            draw = reference.philox_normal if normal else reference.philox_uniform
            return draw(seed, sample_ids, step, num, stream, dtype)
        from soda_kernels.diffusion import triton_impl

        return triton_impl.plan_philox(seed, sample_ids, step, num, stream, dtype, normal=normal).run()[0]

    return run


def _describe_philox(
    device_type: str, seed: Tensor, sample_ids: Tensor, step: Tensor, num: int, stream: int, dtype: torch.dtype
) -> tuple[str, dict[str, Any], str]:  # fmt: skip
    reason = "fp64 is its alone" if dtype not in _KERNEL_DTYPES else None
    if num == 0 or sample_ids.numel() == 0:
        reason = "nothing to compute"
    return _choice(device_type, reason, "blocks of numbers")


_TILES = "tiles of images, as many as fill the chip"
_DRAW, _DESCRIBE_DRAW = _gpu(
    "draw_step_index", lambda _, ids, *__: None if ids.numel() else "nothing to compute", "blocks of samples"
)
_ADD_NOISE, _DESCRIBE_ADD_NOISE = _gpu(
    # The native library widens what it computed in fp32.
    "add_noise", lambda x0, *rest: _unsupported(x0, None if x0.device.type == "cpu" else rest[-1]), _TILES
)  # fmt: skip
_ADD_NOISE_BACKWARD, _DESCRIBE_ADD_NOISE_BACKWARD = _gpu(
    "add_noise_backward", lambda dx_t, *_: _unsupported(dx_t), _TILES
)
_LOSS, _DESCRIBE_LOSS = _gpu("denoising_loss", lambda prediction, x0, *_: _unsupported(prediction, x0), _TILES)
_LOSS_BACKWARD, _DESCRIBE_LOSS_BACKWARD = _gpu(
    "denoising_loss_backward", lambda dloss, prediction, x0, *_: _unsupported(prediction, x0), _TILES
)
_SCALE, _DESCRIBE_SCALE = _gpu("scale_samples", lambda gradient, *_: _unsupported(gradient), _TILES)
_SAMPLER_STEP, _DESCRIBE_SAMPLER_STEP = _gpu("sampler_step", lambda x_t, *_: _unsupported(x_t), _TILES)

_LOSS_ARGUMENTS = (
    "Tensor prediction, Tensor x0, Tensor step_index, Tensor alpha, Tensor sigma, Tensor? weights, Tensor seed, "
    "Tensor sample_ids, Tensor step, str target"
)
_PHILOX_SCHEMA = "(Tensor seed, Tensor sample_ids, Tensor step, int num, int stream, ScalarType dtype) -> Tensor"

define(
    "philox_normal", _PHILOX_SCHEMA, reference=reference.philox_normal, fake=_fake_philox, gpu=_gpu_philox(True),
    describe=_describe_philox,
)  # fmt: skip
define(
    "philox_uniform", _PHILOX_SCHEMA, reference=reference.philox_uniform, fake=_fake_philox, gpu=_gpu_philox(False),
    describe=_describe_philox,
)  # fmt: skip
define(
    "draw_step_index",
    "(Tensor seed, Tensor sample_ids, Tensor step, int num_steps, str sampling, int first_stratum, int num_strata) "
    "-> Tensor",
    reference=reference.draw_step_index,
    fake=lambda seed, sample_ids, *_: torch.empty_like(sample_ids, memory_format=torch.contiguous_format),
    gpu=_DRAW,
    describe=_DESCRIBE_DRAW,
)
define(
    "add_noise",
    "(Tensor x0, Tensor? step_index, Tensor alpha, Tensor sigma, Tensor seed, Tensor sample_ids, Tensor step, "
    "str sampling, int first_stratum, int num_strata, ScalarType dtype) -> (Tensor, Tensor)",
    reference=reference.add_noise,
    fake=_fake_add_noise,
    gpu=_ADD_NOISE,
    describe=_DESCRIBE_ADD_NOISE,
)
define(
    "add_noise_backward",
    "(Tensor dx_t, Tensor step_index, Tensor alpha) -> Tensor",
    reference=reference.add_noise_backward,
    fake=lambda dx_t, *_: _empty_like(dx_t),
    gpu=_ADD_NOISE_BACKWARD,
    describe=_DESCRIBE_ADD_NOISE_BACKWARD,
)
define(
    "denoising_loss",
    f"({_LOSS_ARGUMENTS}, bool save_gradient) -> (Tensor, Tensor)",
    reference=reference.denoising_loss,
    fake=_fake_loss,
    gpu=_LOSS,
    describe=_DESCRIBE_LOSS,
)
define(
    "denoising_loss_backward",
    f"(Tensor dloss, {_LOSS_ARGUMENTS}) -> Tensor",
    reference=reference.denoising_loss_backward,
    fake=lambda dloss, prediction, *_: _empty_like(prediction),
    gpu=_LOSS_BACKWARD,
    describe=_DESCRIBE_LOSS_BACKWARD,
)
define(
    "scale_samples",
    "(Tensor gradient, Tensor dloss) -> Tensor",
    reference=reference.scale_samples,
    fake=lambda gradient, *_: _empty_like(gradient),
    gpu=_SCALE,
    describe=_DESCRIBE_SCALE,
)
define(
    "sampler_step",
    "(Tensor x_t, Tensor cond, Tensor? uncond, Tensor alpha, Tensor sigma, Tensor logsnr, Tensor step_index, "
    "Tensor next_index, str method, str target, float cfg_scale, float eta, float? clip_x0, float guidance_rescale, "
    "Tensor? previous_x0, Tensor? previous_index, Tensor? seed, Tensor? sample_ids) -> (Tensor, Tensor)",
    reference=reference.sampler_step,
    fake=lambda x_t, *_: (_empty_like(x_t), _empty_like(x_t)),
    gpu=_SAMPLER_STEP,
    describe=_DESCRIBE_SAMPLER_STEP,
)
