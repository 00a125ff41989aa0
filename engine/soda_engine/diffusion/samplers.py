"""The sampling loop: a function that takes a denoise callable and knows nothing of models.

What changes from step to step (the images, the position in the list of indices) lies on the device, where each step
moves it on. So nothing in the loop waits for the device, and all steps are the same work: on a GPU one step is captured
as a CUDA graph, denoiser included, and replayed for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from soda_engine.diffusion.guidance import Denoise
from soda_kernels import NoiseSchedule, sampler_step, span

# A graph pays from here on: recording one takes the host as long as an eager step.
_FEWEST_STEPS_GRAPHED = 3


@torch.no_grad()
def sample(
    denoise: Denoise,
    x_T: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 100,
    method: str = "ddim",
    target: str = "eps",
    cfg_scale: float = 1.0,
    eta: float = 0.0,
    clip_x0: float | None = 1.0,
    seed: int | Tensor = 0,
    sample_ids: Tensor,
    progress: bool = False,
    graphed: bool | None = None,
) -> Tensor:
    """Denoise from x_T to clean images, without waiting for the device.

    Args:
        denoise: from (x_t, step index, a 0-d int64 tensor) to (conditional prediction, unconditional prediction or
            None). In a graph its Python code runs twice, however many steps there are.
        x_T: [N, C, *spatial], noise at the last step of the schedule.
        num_steps: denoiser calls, at most the schedule's length.
        progress: show a progress bar, which counts steps that were launched; a GPU may still be at earlier ones.
        graphed: capture a step as a CUDA graph and replay it. None: on a GPU, unless there are fewer than three steps
            or the caller is capturing already.
        The rest: as in `soda_kernels.sampler_step`.

    Returns:
        Images like x_T.

    Raises:
        ValueError: num_steps is not between 1 and the schedule's length, an argument is not accepted, or a graph is
            asked for on a device that has none.
        RuntimeError: `denoise` cannot be captured; graphed=False runs it as it is.
    """
    indices = step_indices(schedule.num_steps, num_steps)
    on_gpu = x_T.device.type == "cuda"
    if graphed and not on_gpu:
        raise ValueError(f"graphed is True and x_T is on {x_T.device}; CUDA graphs need a GPU")
    if graphed is None:
        graphed = on_gpu and num_steps >= _FEWEST_STEPS_GRAPHED and not torch.cuda.is_current_stream_capturing()
    x, x0 = x_T.clone(), torch.zeros_like(x_T) if method == "dpmpp_2m" else None
    options = {
        "method": method, "target": target, "cfg_scale": cfg_scale, "eta": eta, "clip_x0": clip_x0,
        "seed": seed, "sample_ids": sample_ids,
    }  # fmt: skip
    advance: Callable[[], None] = partial(_advance, denoise, schedule, _Position(indices, x.device), x, x0, options)
    with tqdm(total=num_steps, desc="sampling", disable=not progress) as bar:
        for step in range(num_steps):
            if graphed and step == 1:
                advance = _captured(advance, x.device)
            with span("sampling step"):
                advance()
            bar.update()
    return x


def step_indices(schedule_steps: int, num_steps: int) -> list[int]:
    """Spread num_steps indices evenly from the schedule's last step down to its first.

    Raises:
        ValueError: num_steps is not between 1 and schedule_steps.
    """
    if not 1 <= num_steps <= schedule_steps:
        raise ValueError(f"num_steps is {num_steps}; it must be between 1 and the schedule's {schedule_steps}")
    if num_steps == 1:
        return [schedule_steps - 1]
    return [round((schedule_steps - 1) * (1 - i / (num_steps - 1))) for i in range(num_steps)]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor from the host without waiting for the device."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class _Position:
    """Where in a list of step indices a loop stands, on the device.

    Args:
        indices: of all steps, falling.
    """

    def __init__(self, indices: list[int], device: torch.device) -> None:
        # The index of each step, of the one after (-1 is the clean end) and of the one before. The first has none
        # before; where both are the same, DPM-Solver++ 2M is first-order.
        rows = torch.tensor(list(zip(indices, [*indices[1:], -1], [indices[0], *indices[:-1]], strict=True)))
        self._rows = to_device(rows, device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)

    def advance(self) -> tuple[Tensor, ...]:
        """Return the step's index, the next and the previous, 0-d each, and go on to the next step."""
        row = self._rows.index_select(0, self._step)[0]
        self._step += 1
        return row.unbind()


def _advance(
    denoise: Denoise, schedule: NoiseSchedule, position: _Position, x: Tensor, x0: Tensor | None,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Take one step in place: x becomes the next, x0 (where the method looks back) what this step said of it."""
    index, next_index, previous_index = position.advance()
    with span("denoise"):
        cond, uncond = denoise(x, index)
    x_next, x0_now = sampler_step(
        x, cond.to(x.dtype), None if uncond is None else uncond.to(x.dtype), schedule, index, next_index,
        previous_x0=x0, previous_index=None if x0 is None else previous_index, **options,
    )  # fmt: skip
    x.copy_(x_next)
    if x0 is not None:
        x0.copy_(x0_now)


def _captured(advance: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture a step that has run once as a CUDA graph; its tensors live in the graph's own memory pool.

    That first run was a real step: it compiled the kernels and let libraries choose theirs, neither of which may happen
    in a capture. Other threads are left free meanwhile: a loader's thread that pins memory would break the capture.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # PyTorch's own capture stream belongs to the device that was current first, whichever that was.
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
        ):
            advance()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"the step cannot be captured as a CUDA graph ({reason}); pass graphed=False") from error
    return graph.replay
