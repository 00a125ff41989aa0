"""Who takes a training step, samples and encodes: this engine, and PyTorch as its users write it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import MOST_TIMES_TORCH
from benchmarks.end_to_end.cases import COMPILE, OWN_COMPILED
from benchmarks.end_to_end.plain import PlainSoda, keyed_draws
from benchmarks.end_to_end.plain_training import PlainTrainer
from benchmarks.end_to_end.problems import LAYOUTS, EndToEndProblem, flat
from benchmarks.providers import BASELINE, OURS, compiled
from benchmarks.steps import Step
from soda_engine.models.soda import Soda, load_weights, save_weights
from soda_engine.train.compiling import Compile, compile_model
from soda_engine.train.trainer import Trainer

_COMPILED_TIMES_TORCH = 10.0
PARTS = ("denoiser", "encoder")
RESULTS = {
    "train_step": (*(f"{what} of the {part}" for part in PARTS for what in ("momentum", "move", "average")), "loss"),
    "sample": ("images",),
    "encode": ("z",),
}
"""What of an op is compared. Of a first training step the first moment, which is a tenth of the clipped gradient; and
how far weights and average moved, times that moment: AdamW moves every weight about as far, so that those without a
gradient, whose direction is a matter of rounding, would drown the others."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """One contender, ready for one op."""

    call: Callable[[], Any]
    """What is timed."""
    observe: Step
    """Does the same from the first state on and the engine's draws, and returns RESULTS."""
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way of running an op."""

    provider: str
    variant: str
    dtype: str
    build: Callable[[EndToEndProblem], Built]
    by_default: bool = True
    """Whether it runs where nobody names providers."""

    @property
    def most_times_torch(self) -> float:
        """How many times the error of PyTorch's eager path its results may have; torch.compile's sums are others."""
        return _COMPILED_TIMES_TORCH if self.provider in (COMPILE, OWN_COMPILED) else MOST_TIMES_TORCH

    @property
    def name(self) -> str:
        """Both in one word."""
        return f"{self.provider}-{self.variant}"


def own_train_step(problem: EndToEndProblem, *, compile: Compile = "none") -> Built:
    """The engine's trainer as `soda-engine train` runs it; on a CPU, where that is free, it reads each step's loss."""
    out = str(problem.folder / f"run-{problem.dtype}-{compile}")
    config = problem.case.run_config(out, problem.device.type, problem.dtype)
    trainer = Trainer(dataclasses.replace(config, compile=compile))
    batch, progress = problem.batch, trainer.progress

    def call() -> None:
        trainer.step(batch)
        if trainer.read_every == 1:
            trainer.read()

    def observe() -> tuple[Tensor, ...]:
        for model in (trainer.model, trainer.ema.model):
            model.load_state_dict(problem.weights.state_dict())
        trainer.optimizer.state.clear()
        trainer.ema.num_updates.zero_()
        progress.step = progress.images = 0
        with _without_dropout(trainer.model.denoiser):
            trainer.step(batch)
        loss = torch.tensor(trainer.read()["loss"])
        return _moves(problem, trainer.optimizer, trainer.model, trainer.ema.model, loss)

    return Built(call=call, observe=observe, config=_described(compile))


def _described(compile: Compile) -> dict[str, Any]:
    return {} if compile == "none" else {"compile": compile}


def plain_train_step(
    problem: EndToEndProblem, layout: str, *, compile: bool = False, dtype: torch.dtype = torch.float32
) -> Built:
    """The reference path's, eager or compiled: its loss, forward and backward, with AdamW as PyTorch has it."""
    model = problem.model(dtype)
    config = problem.case.run_config("", problem.device.type, problem.dtype)
    options = {"fused": True}
    trainer = PlainTrainer(
        model, config, LAYOUTS[layout], bf16=problem.bf16 and dtype == torch.float32, **options
    )
    if compile:
        trainer.losses = compiled(trainer.model)
    key = {"seed": config.seed, "sample_ids": problem.batch.sample_ids.to(problem.device), "step": 0}

    def observe() -> tuple[Tensor, ...]:
        for each in (model, trainer.average):
            each.load_state_dict(problem.weights.state_dict())
        trainer.optimizer.state.clear()
        trainer.num_updates = 0
        with _without_dropout(model.denoiser):
            losses = trainer.step(problem.batch, lambda target: keyed_draws(trainer.model, target, **key))
        return _moves(problem, trainer.optimizer, model, trainer.average, losses.mean())

    return Built(call=partial(trainer.step, problem.batch), observe=observe, config=options)


def _moves(
    problem: EndToEndProblem, optimizer: torch.optim.Optimizer, model: Soda, average: Soda, loss: Tensor
) -> tuple[Tensor, ...]:
    """Return what a first step has done."""
    found = []
    for part in PARTS:
        weights, moved, followed = (
            list(getattr(each, part).parameters()) for each in (problem.weights, model, average)
        )
        momentum = flat([optimizer.state[parameter]["exp_avg"] for parameter in moved])
        found += [momentum, *((flat(now) - flat(weights)) * momentum for now in (moved, followed))]
    return *found, loss.reshape(1)


class _without_dropout:
    """Let nothing drop out, since everyone drops something else."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.norms = [module for module in denoiser.modules() if getattr(module, "dropout_p", 0.0)]

    def __enter__(self) -> None:
        self.rates = [norm.dropout_p for norm in self.norms]
        for norm in self.norms:
            norm.dropout_p = 0.0

    def __exit__(self, *_: object) -> None:
        for norm, rate in zip(self.norms, self.rates, strict=True):
            norm.dropout_p = rate


def _own_model(problem: EndToEndProblem) -> Soda:
    """Load the weights from a file, as the engine's commands do."""
    path = problem.folder / "model.safetensors"
    save_weights(problem.weights, path)
    return load_weights(path).to(problem.device)


def own_sample(problem: EndToEndProblem, *, compile: Compile = "none") -> Built:
    """The engine's `Soda.sample`, as `soda-engine sample` runs it, `--compile` or not."""
    model = _own_model(problem)
    compile_model(model.denoiser, compile, problem.device)

    def call() -> tuple[Tensor]:
        with torch.autocast(problem.device.type, torch.bfloat16, enabled=problem.bf16):
            return (model.sample(problem.z, num_steps=problem.case.num_steps, x_T=problem.x_T),)

    return Built(call=call, observe=call, config=_described(compile))


def plain_sample(
    problem: EndToEndProblem, layout: str, *, compile: bool = False, dtype: torch.dtype = torch.float32
) -> Built:
    """The reference path's loop, with each call of the denoiser eager or compiled."""
    model = _plain_model(problem, layout, dtype)
    z, x_T = problem.z.to(dtype), problem.x_T.to(dtype, memory_format=LAYOUTS[layout])
    denoise = compiled(model.denoise) if compile else None
    bf16 = problem.bf16 and dtype == torch.float32

    def call() -> tuple[Tensor]:
        with torch.inference_mode(), torch.autocast(problem.device.type, torch.bfloat16, enabled=bf16):
            return (model.sample(z, x_T, problem.indices, denoise),)

    return Built(call=call, observe=call)


def own_encode(problem: EndToEndProblem) -> Built:
    """The engine's `Soda.encode`."""
    model = _own_model(problem)

    def call() -> tuple[Tensor]:
        with torch.autocast(problem.device.type, torch.bfloat16, enabled=problem.bf16):
            return (model.encode(problem.images, batch_size=len(problem.images)),)

    return Built(call=call, observe=call)


def plain_encode(
    problem: EndToEndProblem, layout: str, *, compile: bool = False, dtype: torch.dtype = torch.float32
) -> Built:
    """The reference path's encoder on images scaled to [-1, 1]."""
    model = _plain_model(problem, layout, dtype)
    encode = compiled(model.encode) if compile else model.encode
    bf16 = problem.bf16 and dtype == torch.float32

    def call() -> tuple[Tensor]:
        with torch.inference_mode(), torch.autocast(problem.device.type, torch.bfloat16, enabled=bf16):
            x = problem.images.to(dtype, memory_format=LAYOUTS[layout]).div_(127.5).sub_(1)
            return (encode(x).to(torch.promote_types(dtype, torch.float32)),)

    return Built(call=call, observe=call)


def _plain_model(problem: EndToEndProblem, layout: str, dtype: torch.dtype) -> PlainSoda:
    return PlainSoda(problem.model(dtype).eval().to(memory_format=LAYOUTS[layout]))


def no_bf16(device: torch.device) -> str | None:
    """Say why a device has no bf16, or nothing where it has."""
    if device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return None
    return "this CPU has neither AVX512_BF16 nor AMX: PyTorch would convert to fp32 and back"


PLAIN: dict[str, Callable[..., Built]] = {
    "train_step": plain_train_step, "sample": plain_sample, "encode": plain_encode
}  # fmt: skip
_OWN = {"train_step": own_train_step, "sample": own_sample, "encode": own_encode}


def contenders(op: str, dtype: str) -> list[Contender]:
    """List who runs an op; in fp32 also this engine's training step in bf16, its default on a GPU that has it."""
    own_dtypes = (dtype, "bf16") if op == "train_step" and dtype == "fp32" else (dtype,)
    found = [Contender(provider=OURS, variant=own, dtype=own, build=_OWN[op]) for own in own_dtypes]
    if op != "encode":
        on_gpu = torch.cuda.is_available()  # where it is launches that compiling can save; sampling graphs itself there
        build = partial(_OWN[op], compile="graphs" if on_gpu and op == "train_step" else "default")
        found.append(Contender(provider=OWN_COMPILED, variant=dtype, dtype=dtype, build=build, by_default=on_gpu))
    # torch.compile chooses the layout of convolutions itself: from contiguous images it took 0.98 to 1.06 times as long
    # on two EPYC cores, where compiling took minutes.
    for provider, layouts in ((BASELINE, tuple(LAYOUTS)), (COMPILE, ("channels_last",))):
        for layout in layouts:
            build = partial(PLAIN[op], layout=layout, compile=provider == COMPILE)
            found.append(Contender(provider=provider, variant=layout, dtype=dtype, build=build))
    return found
