"""The public functions that draw: normals, uniforms and step indices, keyed by sample."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from soda_kernels import _checks
from soda_kernels._backend import current_ops
from soda_kernels._philox import STREAMS
from soda_kernels.diffusion import ops as _ops  # noqa: F401  registers the ops
from soda_kernels.diffusion.checks import check_sampling, check_schedule_type, check_seed_and_step
from soda_kernels.diffusion.schedule import NoiseSchedule


def philox_normal(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int],
    step: int | Tensor = 0,
    stream: str = "noise",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw standard normals that depend on (seed, sample id, step, stream, element) alone.

    Philox4x32-10 and Box-Muller; the largest magnitude is 6.7637. Integers are the same on every device, normals the
    same to a few ulp.

    Args:
        shape: shape[0] is the number of samples; the rest is one sample's shape, in logical order.
        seed: an int or 0-d integer tensor, 64 bits of which count.
        sample_ids: [shape[0]] integers, 56 bits of which count.
        step: an int, 0-d or [shape[0]] integer tensor, 32 bits of which count.
        stream: "timestep", "noise", "dropout", "mask", "sampler" or "views": draws that never meet.
        dtype: fp32, bf16, fp16, or fp64 (computed in fp64 from the same integers).
        device: where to draw; the tensor arguments' device if None.

    Returns:
        [*shape], contiguous.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Reference:
        Salmon et al. 2011; Box and Muller 1958.
    """
    return _philox_draw(current_ops().philox_normal.default, shape, seed, sample_ids, step, stream, dtype, device)


def philox_uniform(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int],
    step: int | Tensor = 0,
    stream: str = "noise",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw uniforms in [0, 1), keyed as in `philox_normal`, 24 bits fine (32 in fp64).

    bf16 and fp16 are refused: rounding would reach 1.

    Args, Returns, Raises, Reference:
        As in `philox_normal`.
    """
    _checks.check_choice("dtype", dtype, (torch.float32, torch.float64))
    return _philox_draw(current_ops().philox_uniform.default, shape, seed, sample_ids, step, stream, dtype, device)


def draw_step_index(
    schedule: NoiseSchedule,
    *,
    seed: int | Tensor,
    sample_ids: Tensor | Sequence[int],
    step: int | Tensor = 0,
    sampling: str = "uniform",
    strata: tuple[int, int] | None = None,
) -> Tensor:
    """Draw the step index of each sample, a function of (seed, sample id, step) alone: stream "timestep" of Philox.

        uniform:       floor(u * num_steps)
        stratified:    floor((stratum + u) / total * num_steps), stratum (first + n + r) mod total of sample n
        logit_normal:  floor(sigmoid(z) * num_steps)

    u is uniform in [0, 1), z standard normal, and r a rotation that all samples of a (seed, step) share. Stratified
    draws depend on a sample's place n too, spread a batch evenly over the steps, and leave each index uniform.
    Uniform and stratified draws are the same on every device; logit-normal ones but for rounding at a step's border.

    Args:
        schedule: tells num_steps, and the device.
        seed, sample_ids, step: the key, as in `philox_normal`; for "stratified" one step for all samples.
        sampling: "uniform", "stratified" or "logit_normal".
        strata: (first, total) for "stratified": the stratum of the first sample here, and how many samples there are
            in all, of which these may be a part, on this process or in this slice of a batch; (0, N) if None.

    Returns:
        [N] int64 in [0, num_steps).

    Raises:
        TypeError, ValueError: an argument is not as above, or the samples have more strata than there are.

    Reference:
        Esser et al. 2024, section 3.1 (logit-normal). For strata compare Kingma et al. 2021, whose samples share u.
    """
    check_schedule_type(schedule)
    num = 0
    if isinstance(sample_ids, Sized):
        num = sample_ids.numel() if isinstance(sample_ids, Tensor) else len(sample_ids)
    ids = _checks.int64_vector("sample_ids", sample_ids, num, schedule.device)
    key_seed, steps = check_seed_and_step(seed, step, num, schedule.device)
    first, total = check_sampling(sampling, strata, num, schedule.num_steps, steps)
    key = (key_seed, ids, steps)
    return current_ops().draw_step_index.default(*key, schedule.num_steps, sampling, first, total)


def _philox_draw(
    op: Any, shape: Sequence[int], seed: int | Tensor, sample_ids: Tensor | Sequence[int], step: int | Tensor,
    stream: str, dtype: torch.dtype, device: torch.device | str | None,
) -> Tensor:  # fmt: skip
    _checks.check_choice("stream", stream, list(STREAMS))
    _checks.check_choice("dtype", dtype, _checks.FLOAT_DTYPES)
    if not isinstance(shape, tuple | list):
        raise TypeError(f"shape is a {type(shape).__name__}; it must be a sequence of ints")
    shape = tuple(shape)
    if not all(isinstance(extent, int | torch.SymInt) and not isinstance(extent, bool) for extent in shape):
        raise TypeError(f"shape is {shape}; its entries must be ints")
    if not shape or min(shape) < 0:
        raise ValueError(f"shape is {shape}; it must be the number of samples, then one sample's shape")
    if device is None:
        device = next((t.device for t in (sample_ids, seed, step) if isinstance(t, Tensor)), torch.device("cpu"))
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
    ids = _checks.int64_vector("sample_ids", sample_ids, shape[0], device)
    num = 1
    for extent in shape[1:]:
        num *= extent
    if num >= 2**34:
        raise ValueError(f"shape is {shape}; one sample must have fewer than 2^34 elements")
    seed, step = check_seed_and_step(seed, step, shape[0], device)
    return op(seed, ids, step, num, STREAMS[stream], dtype).view(shape)
