"""The tensors of noising, of the denoising loss and of a sampler step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.diffusion.cases import Call, DiffusionCase
from benchmarks.steps import Forward
from soda_kernels import NoiseSchedule, philox_normal, use_backend

NUM_STEPS = 1000
INDEX, NEXT_INDEX, PREVIOUS_INDEX = 600, 580, 620
"""Of a sampler step."""
CFG_SCALE = 3.0


@dataclass(frozen=True, kw_only=True)
class DiffusionProblem:
    """The inputs of one call, and the gradient that comes back to its losses."""

    asked: Call
    schedule: NoiseSchedule
    x: Tensor
    """x0, or a sampler's x_t."""
    prediction: Tensor
    """A sampler's conditional one."""
    uncond: Tensor | None
    previous_x0: Tensor | None
    step_index: Tensor
    """(N,)."""
    weights: Tensor
    seed: Tensor
    sample_ids: Tensor
    step: Tensor
    dloss: Tensor
    noise: Tensor | None = None
    """The noise that who draws some takes instead, for results that can be compared."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the results."""
        return ("x_next", "x0") if self.asked.op == "sampler_step" else ("x_t", "loss")

    @property
    def named_inputs(self) -> dict[str, Tensor]:
        """What gradients are taken of, by name."""
        return {"prediction": self.prediction}

    @property
    def gradient(self) -> Tensor:
        """What comes back to the losses."""
        return self.dloss

    def call(self, forward: Forward) -> tuple[Tensor, ...]:
        """Apply a function of a problem, which returns (x_t, loss) or (x_next, x0)."""
        return forward(self)

    def with_noise(self) -> DiffusionProblem:
        """Return the problem with the noise that its key stands for, in the images' dtype and layout."""
        if self.noise is not None or not self.asked.draws:
            return self
        sampling = self.asked.op == "sampler_step"
        with use_backend("reference"):
            noise = philox_normal(
                self.x.shape, seed=self.seed, sample_ids=self.sample_ids, step=INDEX if sampling else self.step,
                stream="sampler" if sampling else "noise", dtype=self.x.dtype,
            )  # fmt: skip
        return dataclasses.replace(self, noise=torch.empty_like(self.x).copy_(noise))

    def double(self) -> DiffusionProblem:
        """Return copies of every float tensor in fp64, apart from this problem's graph; the schedule is built in it."""

        def copy(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or not tensor.is_floating_point():
                return tensor
            return tensor.detach().to(torch.float64, copy=True).requires_grad_(tensor.requires_grad)

        tensors = {
            field.name: copy(value) for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }  # fmt: skip
        return dataclasses.replace(self, schedule=_schedule(self.x.device, torch.float64), **tensors)


def diffusion_problem(
    case: DiffusionCase, device: torch.device | str, *, seed: int = 0, grad: bool = False
) -> DiffusionProblem:
    """Draw a case's tensors; on the meta device they have shapes and no values."""
    device, shape, call = torch.device(device), case.shape, case.call
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    layout = torch.channels_last if case.layout == "nhwc" else torch.contiguous_format

    def image() -> Tensor:
        values = torch.randn(shape, generator=generator, device=device).to(case.torch_dtype)
        return values.contiguous(memory_format=layout)

    def bytes_image() -> Tensor:
        values = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
        return values.contiguous(memory_format=layout)

    # Side by side, as the public functions lay ints.
    key_seed, step = torch.tensor([2**40 + 7, 12345], device=device).unbind()
    first = 2**40 + seed * shape.batch
    return DiffusionProblem(
        asked=call,
        schedule=_schedule(device),
        x=bytes_image() if call.bytes_x0 else image(),
        prediction=image().requires_grad_(grad and "bwd" in case.modes),
        uncond=image() if call.guided else None,
        previous_x0=image() if call.op == "sampler_step" and call.second_order else None,
        step_index=torch.randint(0, NUM_STEPS, (shape.batch,), generator=generator, device=device),
        weights=torch.rand(NUM_STEPS, generator=generator, device=device),
        seed=key_seed,
        sample_ids=torch.arange(first, first + shape.batch, device=device),
        step=step,
        dloss=torch.rand(shape.batch, generator=generator, device=device),
    )


def _schedule(device: torch.device, dtype: torch.dtype = torch.float32) -> NoiseSchedule:
    return NoiseSchedule.cosine(NUM_STEPS, dtype=dtype).to(device)
