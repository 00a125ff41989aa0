"""The models of diffusers that are counted and timed; diffusers is imported when one is built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]


def stable_diffusion(batch: int, dtype: torch.dtype, layout: torch.memory_format) -> tuple[nn.Module, Inputs]:
    """Build a U-Net of Stable Diffusion 1.5's shape on the meta device, and inputs of 64x64 latents."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        # What is not given here is, in this class, as Stable Diffusion has it.
        model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        sample, step = torch.empty(batch, 4, 64, 64, dtype=dtype), torch.empty(batch, dtype=torch.int64)
        text = torch.empty(batch, 77, 768, dtype=dtype)
    nn.Module.to(model, dtype)  # its own `to` warns of what concerns no random weights
    return _in_layout(model, layout), (sample.to(memory_format=layout), step, text)


SMALL_UNETS: dict[str, dict[str, Any]] = {
    "64 channels": {"block_out_channels": (64, 128, 128)},
    "64 channels, scale_shift": {"block_out_channels": (64, 128, 128), "resnet_time_scale_shift": "scale_shift"},
    "32 channels": {"block_out_channels": (32, 64, 64)},
}
"""U-Nets that train on a CPU: how many channels the first level has, and whether the time scales too."""


def small_unet(name: str, batch: int, layout: torch.memory_format) -> tuple[nn.Module, Inputs]:
    """Build one of SMALL_UNETS for 32x32 images, with random weights and inputs."""
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=32, layers_per_block=1, attention_head_dim=32, **SMALL_UNETS[name],
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    sample = torch.randn(batch, 3, 32, 32)
    return _in_layout(model, layout), (sample.to(memory_format=layout), torch.randint(1000, (batch,)))


def _in_layout(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    moved: nn.Module = model.to(memory_format=layout)  # type: ignore[call-overload]
    return moved
