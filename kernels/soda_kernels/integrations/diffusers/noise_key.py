"""The key of a step's noise, drawn from the generators that diffusers' pipelines hand on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None

# Bits that a seed and a sample id of `philox_normal` have at most.
_SEEDS = 2**63 - 1
_SAMPLE_IDS = 2**56


def draw_noise_key(generator: Generators, batch: int, device: torch.device) -> tuple[int | Tensor, Tensor | list[int]]:
    """Draw the (seed, sample_ids) of one step's noise.

    Args:
        generator: one, whose number is the seed; N of them, whose numbers are the sample ids; or None for PyTorch's
            default one of the device.
        batch: N.
        device: the samples'. A generator of the same one is drawn from without waiting for it.

    Returns:
        seed, sample_ids: as `philox_normal` takes them.

    Raises:
        ValueError: there is neither one generator nor N.
    """
    if isinstance(generator, Sequence):
        if len(generator) not in (1, batch):
            raise ValueError(f"generator is a list of {len(generator)} for {batch} samples; give one or {batch}")
        if len(generator) == batch > 1:
            drawn = [torch.randint(_SAMPLE_IDS, (), generator=each, device=each.device) for each in generator]
            on_device = all(number.device == device for number in drawn)
            return 0, torch.stack(drawn) if on_device else [int(number) for number in drawn]
        generator = generator[0]
    seed = torch.randint(_SEEDS, (), generator=generator, device=device if generator is None else generator.device)
    return seed if seed.device == device else int(seed), torch.arange(batch, device=device)
