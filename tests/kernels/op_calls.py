"""Arguments for every op of the package, for what is asked of all of them alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import soda_kernels as sk

SCHEDULE = sk.NoiseSchedule.inverted_cosine(20)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def noise_arguments(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Seed, sample ids and step."""
    return torch.tensor(3), torch.arange(batch), torch.tensor(1)


def op_calls() -> dict[str, list[tuple[str, tuple[Any, ...]]]]:
    """Arguments for every op, by its name: an id and the positional arguments."""
    x, skip, weight = channels_last(3, 8, 4, 3), channels_last(3, 4, 4, 3), torch.randn(12)
    modulations = [torch.randn(3, 12) for _ in range(4)]
    plain = [torch.randn(3, 8) for _ in range(2)]
    statistics = torch.randn(3, 4), torch.rand(3, 4) + 0.5
    bf16, seed, seeds = torch.randn(3, 8, 5).bfloat16(), torch.tensor(1), torch.arange(3)
    sliced = torch.randn(3, 8, 4, 6)[..., ::2]
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 3, 7, 8).transpose(1, 2)
    o, lse = torch.randn(2, 5, 3, 8), torch.randn(2, 3, 5)
    qkv = torch.randn(2, 5, 3, 3, 8)
    image, filters, bias = channels_last(3, 8, 4, 6), torch.randn(8, 8, 3, 3), torch.randn(8)
    images = channels_last(3, 2, 4, 3)
    index, table, key = torch.tensor([1, 19, 4]), torch.rand(20), noise_arguments(3)
    half, octets = images.bfloat16(), (images * 50 + 128).byte()
    tables = SCHEDULE.alpha, SCHEDULE.sigma, SCHEDULE.logsnr
    here, there = torch.tensor(9), torch.tensor(-1)
    return {
        "modulated_group_norm": [
            ("pair", (x, skip, None, weight, weight, modulations, 4, 1.0, 1e-5, True, 0.0, None)),
            ("residual", (x, None, torch.randn(3, 8, 4, 3), None, None, plain, 4, 0.0, 1e-5, False, 0.5, seed)),
            ("scaled", (bf16, None, bf16.flip(0), None, None, [], 4, 1.0, 1e-5, True, 0.0, None, 0.7)),
            ("bf16", (bf16, None, None, torch.randn(8), None, [], 4, 1.0, 1e-5, True, 0.5, seeds)),
            ("sliced", (sliced, None, None, None, torch.randn(8), [], 4, 1.0, 1e-5, True, 0.0, None)),
        ],
        "modulated_group_norm_backward": [
            ("pair", (torch.randn(3, 12, 4, 3), None, x, skip, weight, weight, modulations, *statistics, 1.0, True, 0.0,
                      None)),
            ("residual", (x, torch.randn(3, 8, 4, 3), x, None, None, None, plain, *statistics, 0.0, False, 0.5, seed)),
            ("scaled", (bf16, bf16, bf16.flip(0), None, None, None, [], *statistics, 1.0, True, 0.0, None, 0.7)),
            ("bf16", (bf16, None, bf16, None, torch.randn(8), None, [], *statistics, 1.0, True, 0.5, seeds)),
            ("sliced", (sliced, None, sliced, None, None, torch.randn(8), [], *statistics, 1.0, True, 0.0, None)),
        ],
        "attention": [
            ("fp32", (q, k, v, 0.3, None)),
            ("strided", (v, q, q, 0.3, None)),
            ("bf16", (q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.3, None)),
        ],
        "attention_backward": [
            ("fp32", (o, q, k, v, o, lse, 0.3, None)),
            ("strided", (v, v, v, v, v, torch.randn(2, 3, 7), 0.3, None)),
        ],
        "attention_qkvpacked_backward": [("fp32", (o, qkv, o, lse, 0.3, None))],
        "conv3x3": [
            ("fused", (image, filters, bias, image, True)),
            ("bf16", (image.bfloat16(), filters.bfloat16(), None, None, False)),
            ("contiguous", (image.contiguous(), filters, bias, None, False)),
        ],
        "conv3x3_backward": [
            ("all", (image, image, filters, True, True, True)),
            ("one", (image, image, filters, False, True, False)),
            ("contiguous", (image.contiguous(), image.contiguous(), filters, True, False, True)),
        ],
        "philox_normal": [("fp32", (*key, 7, 1, torch.float32)), ("bf16", (*key, 8, 4, torch.bfloat16))],
        "philox_uniform": [("fp64", (*key, 7, 1, torch.float64))],
        "draw_step_index": [
            (sampling, (*key, 20, sampling, 1, 4)) for sampling in ("uniform", "stratified", "logit_normal")
        ],
        "add_noise": [
            ("fp32", (images, index, *tables[:2], *key, "uniform", 0, 1, torch.float32)),
            ("bf16", (half, index, *tables[:2], *key, "uniform", 0, 1, torch.float32)),
            ("drawn", (images, None, *tables[:2], *key, "logit_normal", 0, 1, torch.bfloat16)),
            ("bytes", (octets, None, *tables[:2], *key, "stratified", 1, 4, torch.float16)),
        ],
        "add_noise_backward": [("fp32", (images, index, table)), ("bf16", (half, index, table))],
        "denoising_loss": [
            ("mixed", (half, images, index, *tables[:2], table, *key, "v", False)),
            ("x0", (images, images, index, *tables[:2], None, *key, "x0", True)),
            ("bytes", (half, octets, index, *tables[:2], table, *key, "v", True)),
        ],
        "denoising_loss_backward": [
            ("mixed", (torch.randn(3), half, images, index, *tables[:2], table, *key, "eps")),
            ("bytes", (torch.randn(3), images, octets, index, *tables[:2], None, *key, "v")),
        ],
        "scale_samples": [("fp32", (images, torch.randn(3))), ("bf16", (half, torch.randn(3)))],
        "sampler_step": [
            ("ddim", (images, images, half.float(), *tables, here, there, "ddim", "eps", 2.0, 0.5, 1.0, 0.7, None, None,
                      seed, seeds)),
            ("ddpm", (half, half, None, *tables, here, there, "ddpm", "v", 1.0, 0.0, None, 0.0, None, None, seed,
                      seeds)),
            ("dpmpp", (images, images, None, *tables, here, torch.tensor(2), "dpmpp_2m", "x0", 1.0, 0.0, None, 0.0,
                       images, torch.tensor(12), None, None)),
        ],
    }  # fmt: skip
