"""How modulated group norm is laid over programs: the possible launch configs, and which one to take unmeasured.

Limits of registers come from compiling for sm_90: 64 elements a thread in 16 warps forward, half of that backward,
where two tensors are held, keep everything in registers; twice as much spills.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from soda_kernels import _tuning
from soda_kernels._checks import image_memory_format

# Elements that one program keeps in registers, by backward; fp32 inputs take twice the registers of 16-bit ones.
_HELD_ELEMENTS = {False: 32768, True: 16384}
_HELD_ELEMENTS_FP32 = {False: 16384, True: 8192}
# Elements of a tile of a program that walks over several.
_WALK_ELEMENTS = 2048
_SPLIT_WARPS = 4
# A walking program's groups must still lie in the L2 cache when it comes back to them: with one program on each of 132
# multiprocessors, 224 KiB each is 29 MiB, half of an H100's or H200's L2.
_WALK_BYTES = 224 * 1024
# A program takes samples in turn while they have no more positions than this in all.
_SHARED_POSITIONS = 1024
# Rows of a chunk in the split variant, by bytes of an element: the fp32 workspace is then some 2% of the image tensors,
# but for the shortest, which are there for small batches.
_CHUNK_ROWS = {2: (64, 128, 256, 512, 1024), 4: (64, 128, 256, 512)}
# Below this size a launch costs more than the traffic, so parallelism counts less than the number of launches.
_SMALL_BYTES = 1 << 20
_SECTOR_BYTES = 32
# A batch for which every config fills the chip.
_AMPLE_SAMPLES = 4096


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What the choice of a launch config depends on."""

    backward: bool
    num_samples: int
    channels: int
    skip_channels: int
    num_groups: int
    spatial: int
    channels_last: bool
    element_bytes: int
    dropout: bool

    @classmethod
    def of(cls, x: Tensor, skip: Tensor | None, num_groups: int, *, backward: bool, dropout: bool) -> Problem:
        """Describe a call by its tensors."""
        return cls(
            backward=backward, num_samples=len(x), channels=x.shape[1],
            skip_channels=0 if skip is None else skip.shape[1], num_groups=num_groups, spatial=x.shape[2:].numel(),
            channels_last=image_memory_format(x) != torch.contiguous_format, element_bytes=x.element_size(),
            dropout=dropout,
        )  # fmt: skip

    @property
    def all_channels(self) -> int:
        """Channels of the normalized tensor."""
        return self.channels + self.skip_channels

    @property
    def group_channels(self) -> int:
        """Channels of a group."""
        return self.all_channels // self.num_groups

    @property
    def bytes(self) -> int:
        """Size of the normalized tensor."""
        return self.num_samples * self.all_channels * self.spatial * self.element_bytes

    @property
    def key(self) -> str:
        """Name the problem in a table of tuned configs; batches within a factor of two share an entry."""
        mode, layout = ("bwd" if self.backward else "fwd"), ("nhwc" if self.channels_last else "nchw")
        batch = _tuning.power_of_two(self.num_samples)
        shape = f"n{batch}-c{self.channels}+{self.skip_channels}-g{self.num_groups}-s{self.spatial}"
        return f"{mode}-{layout}-{8 * self.element_bytes}bit-{shape}{'-dropout' if self.dropout else ''}"


@dataclass(frozen=True, kw_only=True)
class GroupNormConfig:
    """A launch config."""

    variant: str
    """"resident": one launch, groups in registers; "looped": one launch, groups in cache; "split": partial sums."""
    slab: int
    """Channels of a tile, a power of two."""
    rows: int
    """Positions of a tile, a power of two."""
    num_warps: int
    groups: int
    """Whole groups that a program owns: of every launch if resident or looped, of the fold if split."""
    samples: int = 1
    """Samples that a resident or looped program handles in turn."""
    tiles: int = 1
    """Tiles of a chunk, if split."""

    def num_programs(self, problem: Problem) -> int:
        """Programs of each launch that passes over image tensors."""
        if self.variant == "split":
            slabs = sum(math.ceil(c / self.slab) for c in (problem.channels, problem.skip_channels))
            return problem.num_samples * slabs * math.ceil(problem.spatial / (self.rows * self.tiles))
        return problem.num_groups // self.groups * math.ceil(problem.num_samples / self.samples)


def choose(problem: Problem, device: torch.device) -> GroupNormConfig:
    """Return the config that was tuned for the problem on this GPU, or the heuristic's."""
    tuned = _tuning.look_up("group_norm", problem.key, device)
    if tuned:
        return GroupNormConfig(**tuned)
    config = heuristic(problem, _tuning.num_multiprocessors(device))
    return _tuning.for_wavefronts(config) if torch.version.hip else config


def heuristic(problem: Problem, num_multiprocessors: int = 132) -> GroupNormConfig:
    """Return the config whose estimated cost is least, of those that touch whole sectors and fill the chip.

    What decides the order of sums (the tile, the groups, the chunk) depends on a sample's shape alone; the batch
    decides between the one-launch config and the split one, and how many samples a program takes in turn. So a sample's
    result is the same bits in every batch for which the variant is the same.
    """
    choices = [_split_choice(problem, num_multiprocessors)]
    tile = _whole_group_choice(problem, num_multiprocessors)
    if tile is not None:
        choices += [dataclasses.replace(tile, samples=samples) for samples in _sample_counts(problem)]
    return min(choices, key=lambda config: _cost(problem, config, num_multiprocessors))


def _whole_group_choice(problem: Problem, num_multiprocessors: int) -> GroupNormConfig | None:
    """Return the resident or looped config of least cost for an ample batch; of nearly equal ones, with few groups."""
    ample = dataclasses.replace(problem, num_samples=_AMPLE_SAMPLES)
    costs = {config: _cost(ample, config, num_multiprocessors) for config in _whole_group_candidates(ample)}
    least = min(costs.values(), default=math.inf)
    good = [config for config, cost in costs.items() if cost <= 1.015 * least < math.inf]
    return min(good, key=lambda config: (config.groups, costs[config]), default=None)


def _split_choice(problem: Problem, num_multiprocessors: int) -> GroupNormConfig:
    """Return the split config of least cost that fills the chip with the smallest batch that is worth it."""
    smallest = max(1, math.ceil(_SMALL_BYTES * problem.num_samples / problem.bytes))
    small = dataclasses.replace(problem, num_samples=smallest)
    configs = list(_split_candidates(small))
    filling = [config for config in configs if config.num_programs(small) >= num_multiprocessors]
    if not filling:
        return max(configs, key=lambda config: config.num_programs(small))
    ample = dataclasses.replace(problem, num_samples=_AMPLE_SAMPLES)
    return min(filling, key=lambda config: _cost(ample, config, num_multiprocessors))


def candidates(problem: Problem) -> Iterator[GroupNormConfig]:
    """Yield the configs that are valid for a problem; tests compile those that the heuristic takes."""
    yield from _whole_group_candidates(problem)
    yield from _split_candidates(problem)


def _whole_group_candidates(problem: Problem) -> Iterator[GroupNormConfig]:
    """Yield resident and looped configs; there are none where a group straddles the concatenation's boundary."""
    if problem.channels % problem.group_channels:
        return
    parts = [c // problem.group_channels for c in (problem.channels, problem.skip_channels) if c]
    for groups in _divisors(math.gcd(*parts)):
        slab, rows = _tuning.power_of_two(groups * problem.group_channels), _tuning.power_of_two(problem.spatial)
        if slab > _WALK_ELEMENTS // 8:
            break
        tensors = 2 if problem.backward else 1
        footprint = groups * problem.group_channels * problem.spatial * problem.element_bytes * tensors
        several_samples = problem.spatial <= _SHARED_POSITIONS // 2
        for samples in _sample_counts(problem):
            if slab * rows <= _held_limit(problem, groups, several_samples):
                # Sums over groups and over samples at once leave a thread of sixteen warps too few registers.
                crowded = not problem.backward or (groups > 1 and several_samples)
                per_thread = 32 if crowded and not problem.dropout else 16
                warps = min(16, max(1, slab * rows // (32 * per_thread)))
                yield GroupNormConfig(
                    variant="resident", slab=slab, rows=rows, num_warps=warps, groups=groups, samples=samples
                )
            elif footprint <= _WALK_BYTES:
                # fp32 values take the registers of half a tile, and so do the integers of a channels_last dropout mask.
                masked = problem.dropout and problem.channels_last
                elements = _WALK_ELEMENTS // (2 if problem.element_bytes == 4 or masked else 1)
                tile_rows = max(8, elements // slab)
                yield GroupNormConfig(
                    variant="looped", slab=slab, rows=tile_rows, groups=groups, samples=samples,
                    num_warps=slab * tile_rows * problem.element_bytes // (32 * 16),  # one 16-byte access a thread
                )  # fmt: skip


def _held_limit(problem: Problem, groups: int, several_samples: bool) -> int:
    """Return how many elements a program can keep in registers beside what else it keeps there."""
    limit = (_HELD_ELEMENTS if problem.element_bytes == 2 else _HELD_ELEMENTS_FP32)[problem.backward]
    if problem.dropout:  # the integers of the mask
        limit //= 4
    return limit // 2 if groups > 1 or (several_samples and problem.backward) else limit


def _split_candidates(problem: Problem) -> Iterator[GroupNormConfig]:
    widest = _tuning.power_of_two(max(problem.channels, problem.skip_channels))
    fold_groups = _fold_groups(problem)
    for slab in (4, 8, 16, 32, 64, 128):
        if slab > widest and slab > 4:
            break
        rows = min(_WALK_ELEMENTS // slab, max(8, _tuning.power_of_two(problem.spatial)))
        for chunk_rows in _CHUNK_ROWS[problem.element_bytes]:
            yield GroupNormConfig(
                variant="split", slab=slab, rows=min(rows, chunk_rows), num_warps=_SPLIT_WARPS, groups=fold_groups,
                tiles=max(1, chunk_rows // rows),
            )  # fmt: skip
            if chunk_rows >= problem.spatial:
                break


def _fold_groups(problem: Problem) -> int:
    """Return how many groups a program of the fold owns: enough for whole sectors of fp32 partial sums."""
    for groups in _divisors(problem.num_groups):
        if groups * problem.group_channels >= 32 or groups == problem.num_groups:
            return groups
    raise AssertionError


def _sample_counts(problem: Problem) -> Iterator[int]:
    """Yield how many samples a program may take in turn: several where a sample has few positions."""
    for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        if count == 1 or (count <= problem.num_samples and count * problem.spatial <= _SHARED_POSITIONS):
            yield count


def _cost(problem: Problem, config: GroupNormConfig, num_multiprocessors: int) -> float:
    """Estimate the time of a config, in passes over one image tensor at full bandwidth."""
    programs = config.num_programs(problem)
    large = problem.bytes >= _SMALL_BYTES
    # With fewer programs than multiprocessors some stand idle; with few of them the last to end is waited for.
    idle = max(1.0, num_multiprocessors / programs / (1.0 if large else 4.0))
    idle += 0.02 * max(0.0, 1.0 - programs / (4.0 * num_multiprocessors))
    if config.variant == "split":
        positions = min(problem.spatial, config.rows * config.tiles)
        sectors = _sector_overhead(problem, config.slab)
        # Of each chunk: fp32 vectors (parameters, partial sums, coefficients), modulations, what the fold reads.
        wide, narrow = (7, 4) if problem.backward else (4, 0)
        chunk = wide * _whole_sectors(4 * config.slab) + narrow * _whole_sectors(problem.element_bytes * config.slab)
        vectors = (chunk + 8 * config.slab) / (config.slab * positions * problem.element_bytes)
        return ((5.0 if problem.backward else 3.0) * sectors + vectors + 0.25) * idle  # 0.25: launches
    used = config.groups * problem.group_channels
    if _sector_overhead(problem, used) > 1.0 or (large and programs < num_multiprocessors):
        return math.inf
    tensors, modulations = (3, 8) if problem.backward else (2, 4)
    image = tensors * used * problem.spatial * problem.element_bytes
    # For each sample statistics, and two modulations; for each program weight, bias and the sums of their gradients.
    sample = 2 * _whole_sectors(4 * config.groups) + modulations * _whole_sectors(problem.element_bytes * used)
    program = (6 if problem.backward else 2) * _whole_sectors(4 * used)
    passes = tensors * (image + sample + program / config.samples) / image
    if config.variant == "looped":
        passes += (tensors - 1) / 3.0  # what is read again from L2, at about three times the bandwidth [estimate]
    return passes * idle * max(1.0, 0.75 * config.slab / used)


def _whole_sectors(num_bytes: int) -> int:
    return -(-num_bytes // _SECTOR_BYTES) * _SECTOR_BYTES


def _sector_overhead(problem: Problem, channels: int) -> float:
    """Return the bytes of the 32-byte sectors that a program touches over the bytes that it needs."""
    if problem.channels_last and channels != problem.all_channels:
        piece, pitch = channels * problem.element_bytes, math.gcd(problem.channels, problem.skip_channels)
        pitch *= problem.element_bytes
    else:
        piece = pitch = problem.spatial * problem.element_bytes * channels
    step = math.gcd(piece, pitch, _SECTOR_BYTES)
    return (piece + _SECTOR_BYTES - step) / piece


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
