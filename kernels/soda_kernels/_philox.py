"""Counter-based random numbers: Philox4x32-10 and the map from its integers to uniforms, normals and keep masks.

A number depends on (seed, sample id, step, stream, element) alone, so noise is the same for every batch size, order,
layout, world size and device, and never has to be stored.

    key      = (seed low, seed high)
    counter  = (block, sample id low, sample id high | stream << 24, step)        four 32-bit words
    uniforms and normals: element e is output e % 4 of block e // 4; a keep mask takes 16 bits,
    so element e is half e % 2 (the low one first) of output e // 2 % 4 of block e // 8

Elements count a sample's values in logical (channel-first) order. 56 bits of a sample id and 32 of a step are used.

Reference: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STREAMS = {"timestep": 0, "noise": 1, "dropout": 2, "mask": 3, "sampler": 4, "views": 5}
# The sample id of a draw that all samples of a step have in common: the last of its 56 bits.
SHARED_ID = 2**56 - 1

# Multipliers and key increments of Philox4x32, from the paper's reference code.
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW_32 = 0xFFFFFFFF
_ROUNDS = 10

# Blocks computed at a time. On two Xeon cores 16k int64 blocks stay in the L2 caches: measured 1.6x faster than 1M.
_CHUNK_BLOCKS = 16384
# On a GPU a chunk costs some 160 launches, so few large ones; 2^22 blocks bound the temporaries to about 300 MiB.
_CHUNK_BLOCKS_ON_GPU = 1 << 22


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Encrypt counters with Philox4x32-10.

    Args:
        counter: four int64 tensors that hold 32-bit words, broadcastable with one another.
        key: two such tensors.

    Returns:
        Four int64 tensors that hold 32-bit words.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, which leaves the bits of the unsigned product.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0 = ((product_1 >> 32) & _LOW_32).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = ((product_0 >> 32) & _LOW_32).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product_1.bitwise_and_(_LOW_32), product_0.bitwise_and_(_LOW_32)
        k0, k1 = (k0 + _WEYL_0) & _LOW_32, (k1 + _WEYL_1) & _LOW_32
    return c0, c1, c2, c3


def random_blocks(num_blocks: int, seed: Tensor, sample_ids: Tensor, step: Tensor, stream: int) -> Tensor:
    """Return the 32-bit words of the first blocks of each sample, as int64 of shape (N, num_blocks, 4).

    Args:
        seed: [] or [N] int64. sample_ids: [N] int64. step: [] or [N] int64.
    """
    words = torch.empty(len(sample_ids), num_blocks, 4, dtype=torch.int64, device=sample_ids.device)
    column = [t.reshape(-1, 1) for t in (seed, sample_ids, step)]
    key = (column[0] & _LOW_32, (column[0] >> 32) & _LOW_32)
    sample_low, sample_high = column[1] & _LOW_32, (column[1] >> 32) & 0x00FFFFFF | stream << 24
    step_low = column[2] & _LOW_32
    limit = _CHUNK_BLOCKS if sample_ids.device.type == "cpu" else _CHUNK_BLOCKS_ON_GPU
    chunk = max(1, limit // max(1, len(sample_ids)))
    for start in range(0, num_blocks, chunk):
        block = torch.arange(start, min(start + chunk, num_blocks), device=sample_ids.device).expand(len(words), -1)
        outputs = philox4x32((block, sample_low, sample_high, step_low), key)
        words[:, start : start + chunk] = torch.stack(outputs, dim=-1)
    return words


def uniform(num: int, seed: Tensor, sample_ids: Tensor, step: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """Return (N, num) numbers in [0, 1): the top 24 bits of a word over 2^24, or all 32 over 2^32 in fp64."""
    words = random_blocks((num + 3) // 4, seed, sample_ids, step, stream).flatten(1)[:, :num]
    return words.to(dtype) * 2.0**-32 if dtype == torch.float64 else ((words >> 8).float() * 2.0**-24).to(dtype)


def normal(num: int, seed: Tensor, sample_ids: Tensor, step: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """Return (N, num) standard normals by Box and Muller from pairs of words.

    With words a and b: r = sqrt(-2 ln(a / 2^32 + 2^-33)), angle = 2 pi (b >> 8) / 2^24, and the pair is
    (r cos angle, r sin angle). The largest magnitude is sqrt(66 ln 2) = 6.7637. Computed in fp32, or fp64 if asked for.
    """
    compute = torch.promote_types(dtype, torch.float32)
    words = random_blocks((num + 3) // 4, seed, sample_ids, step, stream)
    radius = (words[..., 0::2].to(compute) * 2.0**-32 + 2.0**-33).log_().mul_(-2.0).sqrt_()
    angle = (words[..., 1::2] >> 8).to(compute) * (2.0**-24 * 2.0 * math.pi)
    pairs = torch.stack((angle.cos().mul_(radius), angle.sin().mul_(radius)), dim=-1)
    return pairs.flatten(1)[:, :num].to(dtype)


def keep_threshold(dropout_p: float) -> int:
    """Return how many of the 65536 values of a 16-bit random number drop an element: never all of them."""
    return min(round(dropout_p * 65536), 65535)


def keep_mask(num: int, seed: Tensor, sample_ids: Tensor, dropout_p: float) -> Tensor:
    """Return a boolean (N, num) mask that keeps an element unless its 16 random bits are below `keep_threshold`."""
    words = random_blocks((num + 7) // 8, seed, sample_ids, torch.zeros_like(seed), STREAMS["dropout"])
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)[:, :num]
    return halves >= keep_threshold(dropout_p)
