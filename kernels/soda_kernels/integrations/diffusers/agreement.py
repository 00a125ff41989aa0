"""Whether the installed diffusers is one that is known here: its version, and what its models compute."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Before, all modules of a process shared one SiLU, so that the output head's could not be replaced alone. Tried: 0.33.0
# and 0.42.1.
LEAST_VERSION = (0, 33)


def require_diffusers() -> None:
    """Raise where diffusers is missing or too old."""
    try:
        from diffusers import __version__ as version
    except ImportError as error:
        raise ImportError(f"diffusers cannot be imported ({error}); pip install diffusers") from None
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if found < LEAST_VERSION:
        needed = ".".join(map(str, LEAST_VERSION))
        raise ValueError(f"diffusers is {version}; soda_kernels.integrations.diffusers needs {needed} or newer")


def require_agreement(replace_in: Callable[[nn.Module], Any]) -> None:
    """Raise where replaced models do not compute what they did; once a process, in some hundred milliseconds."""
    wrong = _disagreeing(replace_in)
    if wrong:
        from diffusers import __version__ as version

        names = ", ".join(wrong)
        raise ValueError(
            f"diffusers {version} computes {names} otherwise than soda_kernels.integrations.diffusers knows; "
            "nothing was replaced: try another version of diffusers"
        )


@functools.cache
def _disagreeing(replace_in: Callable[[nn.Module], Any]) -> list[str]:
    """Name the classes whose replaced models give other results in fp64."""
    # Neither the caller's random numbers nor his default device and gradients are touched.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.manual_seed(0)
        wrong = [type(model).__name__ for model, inputs in _tiny_models() if not _agrees(model, inputs, replace_in)]
    return list(dict.fromkeys(wrong))


def _agrees(model: nn.Module, inputs: tuple[Any, ...], replace_in: Callable[[nn.Module], Any]) -> bool:
    model = model.double().eval()
    for parameter in model.parameters():
        # Far from what they are initialized to: nothing is hidden by zeros, or by a shift that is none.
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    replaced = copy.deepcopy(model)
    replace_in(replaced)
    plain, ours = (_output(each(*inputs)) for each in (model, replaced))
    return bool((plain - ours).norm() <= 1e-9 * plain.norm())


def _output(result: Any) -> Tensor:
    output: Tensor = result if isinstance(result, Tensor) else result.sample
    return output


def _tiny_models() -> list[tuple[nn.Module, tuple[Any, ...]]]:
    from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
    from diffusers.models.resnet import ResnetBlockCondNorm2D

    def image(channels: int) -> Tensor:
        # Small, so that the epsilon of a norm is seen.
        return torch.randn(2, channels, 8, 8, dtype=torch.float64) * 0.01

    small: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    unet: dict[str, Any] = {**small, "sample_size": 8, "attention_head_dim": 4, "norm_eps": 1e-3}
    step = torch.tensor([1, 500])
    return [
        (UNet2DModel(**unet, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                     up_block_types=("AttnUpBlock2D", "UpBlock2D")), (image(3), step)),
        (UNet2DModel(**unet, down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
                     up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"),
                     resnet_time_scale_shift="scale_shift"), (image(3), step)),
        (UNet2DConditionModel(**unet, cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                              up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
         (image(4), step, torch.randn(2, 5, 12, dtype=torch.float64))),
        (AutoencoderKL(**small, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
         (image(3),)),
        (ResnetBlockCondNorm2D(in_channels=8, out_channels=16, temb_channels=6, groups=4),
         (image(8), torch.randn(2, 6, dtype=torch.float64))),
    ]  # fmt: skip
