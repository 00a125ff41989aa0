"""Who computes attention on a GPU, and how: the config of a problem.

Block sizes come from compiling for sm_90: of those tried, large ones that keep everything in registers and reach its
matrix units. The exception is the backward of fp32 heads over 128 wide, which spills over a hundred registers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soda_kernels import _tuning
from soda_kernels._launch import can_describe

PYTORCH_VARIANTS = ("cudnn", "flash")
"""Variants that are PyTorch's own kernels: what a table takes for the problems in which they were measured faster."""
BACKENDS = ("triton", *PYTORCH_VARIANTS)
# The longest row of scores that stays on chip, and the largest head of which one program forms all gradients.
_WHOLE_ROW_KEYS = 256
_ONE_KERNEL_ELEMENTS = 16384
# Programs of one multiprocessor that should be left where a program takes several blocks or heads in turn.
_PROGRAMS = 2


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What the choice of a launch config depends on."""

    backward: bool
    pairs: int
    """Batch times heads."""
    queries: int
    keys: int
    head_dim: int
    element_bytes: int
    aligned: bool = True
    """Whether heads and rows lie at multiples of 16 bytes, as descriptors and PyTorch's kernels want them."""
    copy_engine: bool = True
    """Whether the chip loads blocks by descriptors."""

    @classmethod
    def of(cls, q: Tensor, k: Tensor, *others: Tensor, backward: bool) -> Problem:
        """Describe a call by its q, k and other inputs of such shapes, [B, T, H, D]."""
        batch, queries, heads, head_dim = q.shape
        return cls(
            backward=backward, pairs=batch * heads, queries=queries, keys=k.shape[1], head_dim=head_dim,
            element_bytes=q.element_size(),
            aligned=all(map(can_describe, (q, k, *others))), copy_engine=_tuning.has_copy_engine(q.device),
        )  # fmt: skip

    @property
    def describable(self) -> bool:
        """Whether tensor descriptors can stand for the inputs."""
        return self.aligned and self.copy_engine

    @property
    def block_dim(self) -> int:
        """Width of a tile: what a matrix unit takes at the least, and a power of two."""
        return max(16, _tuning.power_of_two(self.head_dim))

    @property
    def key(self) -> str:
        """Name the problem in a table of tuned configs; lengths and batches within a factor of two share one."""
        mode = "bwd" if self.backward else "fwd"
        lengths = f"q{_tuning.power_of_two(self.queries)}-k{_tuning.power_of_two(self.keys)}"
        return f"{mode}-{8 * self.element_bytes}bit-n{_tuning.power_of_two(self.pairs)}-{lengths}-d{self.head_dim}"


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which kernels run; for those of this package, how they are launched."""

    variant: str
    """Forward "whole_row" or "online"; backward "one_kernel" or "two_kernels"; either way one of PYTORCH_VARIANTS."""
    block_m: int = 0
    """Forward queries of a tile; backward the queries, or keys, whose gradients a program forms at a time."""
    block_n: int = 0
    """Forward keys of a tile, all of them if "whole_row"; backward the keys, or queries, that it goes through."""
    num_warps: int = 0
    num_stages: int = 1
    pairs: int = 1
    """Heads that a program takes in turn, if "whole_row"."""
    blocks: int = 1
    """Blocks of block_m that a program takes in turn, if "whole_row" or "one_kernel"."""
    descriptors: bool = False
    """Whether inner loops load by tensor descriptors, if "online" or "two_kernels"."""


def choose(problem: Problem, device: torch.device, backend: str | None = None) -> AttentionConfig:
    """Return the config that was tuned for the problem on this GPU, or the heuristic's.

    Args:
        backend: one of BACKENDS that was asked for.
    """
    if backend in PYTORCH_VARIANTS:
        return AttentionConfig(variant=backend)
    if tuned := _tuned(problem, device, backend):
        config = AttentionConfig(**tuned)
        return dataclasses.replace(config, descriptors=config.descriptors and problem.describable)
    config = heuristic(problem, _tuning.num_multiprocessors(device))
    if torch.version.hip:
        return _tuning.for_wavefronts(config)
    return config if _tuning.has_copy_engine(device) else for_small_registers(config)


def explain_choice(problem: Problem, device: torch.device, backend: str | None) -> str:
    """Say where `choose` has its config from."""
    if backend in PYTORCH_VARIANTS:
        return "asked for by `backend`"
    found = "measured" if _tuned(problem, device, backend) else "not measured, by heuristic"
    return f"{problem.key} of {device}: {found}"


def _tuned(problem: Problem, device: torch.device, backend: str | None) -> dict[str, Any] | None:
    """Return the table's entry, unless it does not fit strides or wishes, of which its keys say nothing."""
    tuned = _tuning.look_up("attention", problem.key, device)
    if tuned and tuned["variant"] in PYTORCH_VARIANTS and (backend is not None or not pytorch_takes(problem)):
        return None
    return tuned


def pytorch_takes(problem: Problem) -> bool:
    """Tell whether PyTorch's kernels take a problem as it lies."""
    return problem.element_bytes == 2 and problem.head_dim % 8 == 0 and problem.aligned


def for_small_registers(config: AttentionConfig) -> AttentionConfig:
    """Return the heuristic's config for chips before sm_90, whose products take their operands from registers."""
    if config.variant == "whole_row" and config.block_n > 64:
        block = min(config.block_m, 32)
        times = config.block_m // block if config.blocks > 1 else 1
        return dataclasses.replace(config, block_m=block, blocks=times * config.blocks)
    if config.variant in ("one_kernel", "two_kernels"):
        large, small = max(config.block_m, config.block_n), min(config.block_m, config.block_n)
        return dataclasses.replace(config, block_m=large, block_n=min(small, 32))
    return config


def heuristic(problem: Problem, num_multiprocessors: int = 132) -> AttentionConfig:
    """Return the config to take unmeasured.

    What all blocks of a head read is read once by a program that takes them in turn, where there are heads enough to
    fill the chip; else each block has a program of its own.
    """
    choice = _backward if problem.backward else _forward
    return choice(problem, _PROGRAMS * num_multiprocessors)


def _forward(problem: Problem, programs: int) -> AttentionConfig:
    width, keys = problem.block_dim, max(16, _tuning.power_of_two(problem.keys))
    if problem.element_bytes == 4:
        block_n = 16 if width > 128 else 32
        return AttentionConfig(variant="online", block_m=32, block_n=block_n, num_warps=8 if width > 64 else 4)
    if width > 128 or keys > _WHOLE_ROW_KEYS:
        block_m, block_n = (64, 32) if width > 128 else (128, 64)
        return AttentionConfig(
            variant="online", block_m=block_m, block_n=block_n, num_warps=8, num_stages=2,
            descriptors=problem.describable,
        )  # fmt: skip
    most = 128 if keys > 64 and width <= 64 else 64
    block = min(most, max(16, _tuning.power_of_two(problem.queries)))
    blocks = _in_turn(problem.pairs, math.ceil(problem.queries / block), programs)
    # Short heads follow one another in a program where more than enough programs are left.
    pairs = 1
    while keys <= 64 and pairs < 4 and problem.pairs >= 4 * pairs * programs:
        pairs *= 2
    return AttentionConfig(
        variant="whole_row", block_m=block, block_n=keys, num_warps=8 if keys > 64 else 4, pairs=pairs, blocks=blocks
    )


def _backward(problem: Problem, programs: int) -> AttentionConfig:
    width, longest = problem.block_dim, max(problem.queries, problem.keys)
    if longest * problem.head_dim > _ONE_KERNEL_ELEMENTS:
        return _two_kernels(problem)
    if problem.element_bytes == 4:
        block, other, num_warps = (32, 32, 4 if width <= 32 else 8) if width <= 64 else (16, 16, 8)
    elif width > 64:
        block, other, num_warps = 64, 32, 8
    else:
        block = other = min(64, max(16, _tuning.power_of_two(longest)))
        num_warps = 8 if longest > 64 else 4
    return AttentionConfig(
        variant="one_kernel", block_m=block, block_n=other, num_warps=num_warps,
        blocks=_in_turn(problem.pairs, math.ceil(longest / block), programs),
    )  # fmt: skip


def _two_kernels(problem: Problem) -> AttentionConfig:
    width = problem.block_dim
    if problem.element_bytes == 4:
        block = 32 if width <= 64 else 16
        num_warps = 4 if width <= 32 else 8
        return AttentionConfig(variant="two_kernels", block_m=block, block_n=block, num_warps=num_warps)
    if width > 128:  # with descriptors the kernel over blocks of keys would spill
        return AttentionConfig(variant="two_kernels", block_m=64, block_n=32, num_warps=8, num_stages=2)
    return AttentionConfig(
        variant="two_kernels", block_m=64, block_n=64, num_warps=8, descriptors=problem.describable
    )


def _in_turn(pairs: int, blocks: int, programs: int) -> int:
    """Return how many of a head's blocks one program takes, so that so many programs are left."""
    return max(taken for taken in _turns(blocks) if taken == 1 or taken * programs <= pairs * blocks)


def _turns(blocks: int) -> list[int]:
    """Return how many of a head's blocks a program may take in turn: powers of two, or all."""
    return [1 << power for power in range((blocks - 1).bit_length())] + [blocks]


# Shared memory of a program on sm_90, and the values of tiles that a thread keeps in registers, by backward: the
# heuristic's largest are 160 and 144. Warps beyond four are worth it where each thread still has a few.
_SHARED_BYTES = 232_448
_MOST_VALUES = {False: 192, True: 144}
_FEWEST_VALUES = 8
# Where heads share programs, about as many of these as an H200 has multiprocessors must be left.
_FEWEST_PROGRAMS = 128


def candidates(problem: Problem) -> Iterator[AttentionConfig]:
    """Yield the configs that are valid for a problem and whose tiles fit the registers and shared memory of sm_90."""
    if max(problem.queries, problem.keys) > _WHOLE_ROW_KEYS and pytorch_takes(problem):
        yield from (AttentionConfig(variant=variant) for variant in PYTORCH_VARIANTS)
    for config in _backward_candidates(problem) if problem.backward else _forward_candidates(problem):
        m, n, width = config.block_m, config.block_n, problem.block_dim
        # Backward P and dS, and dK and dV; forward S and O.
        values = 2 * (m * n + n * width) if problem.backward else m * n + m * width
        values //= 32 * config.num_warps
        tiles = 2 * (m + n) if problem.backward else m + 2 * n
        fits = values <= _MOST_VALUES[problem.backward] and (
            tiles * width * problem.element_bytes * config.num_stages <= _SHARED_BYTES
        )
        if fits and (config.num_warps == 4 or values >= _FEWEST_VALUES):
            yield config


def _forward_candidates(problem: Problem) -> Iterator[AttentionConfig]:
    keys = max(16, _tuning.power_of_two(problem.keys))
    if keys <= _WHOLE_ROW_KEYS and problem.block_dim <= 128:
        for block, num_warps in itertools.product(_blocks(problem.queries), (4, 8)):
            all_blocks = math.ceil(problem.queries / block)
            for blocks, pairs in itertools.product(_turns(all_blocks), (1, 2, 4, 8)):
                # A program that goes on to another head has been through the first one's queries.
                if pairs == 1 or (blocks == all_blocks and problem.pairs >= pairs * _FEWEST_PROGRAMS):
                    yield AttentionConfig(
                        variant="whole_row", block_m=block, block_n=keys, num_warps=num_warps, pairs=pairs,
                        blocks=blocks,
                    )  # fmt: skip
    tiles = itertools.product((32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3))
    for block_m, block_n, num_warps, num_stages in tiles:
        for descriptors in _descriptors(problem):
            yield AttentionConfig(
                variant="online", block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages,
                descriptors=descriptors,
            )  # fmt: skip


def _backward_candidates(problem: Problem) -> Iterator[AttentionConfig]:
    longest = max(problem.queries, problem.keys)
    # One program for a longer head than this keeps the others waiting.
    one = longest * problem.head_dim <= 4 * _ONE_KERNEL_ELEMENTS
    lengths = _blocks(longest)
    for block_m, block_n, num_warps, num_stages in itertools.product(lengths, lengths, (4, 8), (1, 2)):
        tile: dict[str, Any] = {
            "block_m": block_m, "block_n": block_n, "num_warps": num_warps, "num_stages": num_stages,
        }  # fmt: skip
        for blocks in _turns(math.ceil(longest / block_m)) if one else ():
            yield AttentionConfig(variant="one_kernel", blocks=blocks, **tile)
        for descriptors in _descriptors(problem):
            yield AttentionConfig(variant="two_kernels", descriptors=descriptors, **tile)


def _descriptors(problem: Problem) -> tuple[bool, ...]:
    return (False, True) if problem.describable and problem.element_bytes == 2 else (False,)


def _blocks(length: int) -> tuple[int, ...]:
    """Return the lengths of tiles that are worth it: the long ones only for as long a sequence."""
    return tuple(block for block in (16, 32, 64, 128) if block <= max(64, _tuning.power_of_two(length)))
