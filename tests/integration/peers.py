"""Models of diffusers with random weights, small enough for a test, and what a training step makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from tests.numerics import assert_accurate, assert_accurate_in_norm

FEW_CHANNELS = "the native kernels take numbers of channels that are multiples of 8"
"""Why convolutions from and to images are left."""

_SMALL: dict[str, Any] = {"block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1}
_UNET: dict[str, Any] = {**_SMALL, "sample_size": 16, "attention_head_dim": 8}


def unet(**changes: Any) -> UNet2DModel:
    """Build a `UNet2DModel` with attention at half the resolution."""
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**_UNET | blocks | changes)


def conditional_unet(**changes: Any) -> UNet2DConditionModel:
    """Build a `UNet2DConditionModel` with transformers at the full resolution."""
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**_UNET | blocks | {"cross_attention_dim": 24} | changes)


def autoencoder(**changes: Any) -> AutoencoderKL:
    """Build an `AutoencoderKL` of two resolutions."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**_SMALL | blocks | changes)


PEERS: dict[str, Callable[[], nn.Module]] = {
    "unet": unet,
    "unet scale_shift, resampled in blocks": lambda: unet(
        down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        mid_block_scale_factor=1.4,
    ),
    "conditional unet": conditional_unet,
    "autoencoder": autoencoder,
}


DRAWS = 4
"""Of inputs. The error of one gradient of a few dozen values is a draw: twice another's now and then by chance."""


def inputs_of(model: nn.Module, draw: int = 0) -> dict[str, Any]:
    """Return a model's arguments, of two samples, in fp64."""
    generator = torch.Generator().manual_seed(draw)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    channels = model.config.in_channels
    arguments: dict[str, Any] = {"sample": normal(2, channels, 16, 16)}
    if not isinstance(model, AutoencoderKL):
        arguments["timestep"] = torch.tensor([7, 600])
    if isinstance(model, UNet2DConditionModel):
        arguments["encoder_hidden_states"] = normal(2, 5, 24)
    return arguments


def randomized(model: nn.Module) -> nn.Module:
    """Give a model weights none of which is 0 or 1, in bf16's numbers, so that every dtype computes the same model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_((parameter + noise).bfloat16())
    return model


@dataclass(frozen=True)
class Steps:
    """Forward and backward passes, one a draw of inputs; the draws lie along a first dimension."""

    output: Tensor
    gradients: dict[str, Tensor]
    """Of every parameter and every floating-point input."""


def steps(model: nn.Module, dtype: torch.dtype = torch.float64, layout: Any = torch.contiguous_format) -> Steps:
    """Run a copy of a model forward and backward on each draw of inputs."""
    model = copy.deepcopy(model).to(dtype).to(memory_format=layout)
    outputs, gradients = [], []
    for draw in range(DRAWS):
        arguments = inputs_of(model, draw)
        for name, value in arguments.items():
            if value.is_floating_point():
                value = value.bfloat16().to(dtype)
                value = value.to(memory_format=layout) if value.ndim == 4 else value
                arguments[name] = value.requires_grad_()
        output = model(**arguments).sample
        generator = torch.Generator().manual_seed(100 + draw)
        model.zero_grad(set_to_none=True)
        output.backward(torch.randn(output.shape, generator=generator).bfloat16().to(dtype))
        outputs.append(output.detach())
        named = {f"input {name}": value for name, value in arguments.items()} | dict(model.named_parameters())
        gradients.append({name: value.grad for name, value in named.items() if value.grad is not None})
    return Steps(torch.stack(outputs), {name: torch.stack([g[name] for g in gradients]) for name in gradients[0]})


def assert_same_training(ours: Steps, plain: Steps, exact: Steps) -> None:
    """Hold outputs and all gradients to the tolerance rule of tests/numerics.py.

    The largest errors of the output and of the inputs' gradients are judged, and of a weight's gradient the norm of
    its errors over all draws.
    """
    assert_accurate(ours.output, plain.output, exact.output, "output")
    assert ours.gradients.keys() == plain.gradients.keys() == exact.gradients.keys()
    for name, gradient in ours.gradients.items():
        judge = assert_accurate if name.startswith("input") else assert_accurate_in_norm
        judge(gradient, plain.gradients[name], exact.gradients[name], name)
