"""What a model is made of and what it costs: parameters, FLOPs, memory, and which kernels would run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from soda_engine.config import SodaConfig, TrainConfig, to_dict
from soda_engine.models.soda import Soda
from soda_engine.presets import PRESETS
from soda_engine.roofline.report import RooflineOptions, describe_roofline
from soda_engine.roofline.saved import list_saved
from soda_engine.train.checkpoint import load
from soda_engine.train.distributed import resolve_device
from soda_engine.train.logging import METRICS_NAME
from soda_engine.train.settings import load_settings
from soda_kernels import explain, native_status, register_flop_formulas


@dataclass(frozen=True, kw_only=True)
class Info:
    """Print a model's parameters, FLOPs and memory, its sections, and what runs each of its kernels."""

    model: Annotated[str, tyro.conf.Positional]
    """A preset, a run's folder, a saved model's folder, or a name on the Hugging Face hub."""
    batch_size: Annotated[int | None, tyro.conf.DisallowNone] = None
    """Images that FLOPs and memory are counted for; 1 if not given, and those of a step with --roofline."""
    out: Annotated[str | None, tyro.conf.DisallowNone] = None
    """Folder for info.txt, the same text; not written if not given."""
    device: str = "auto"
    """The device whose kernels are named: auto, cpu, cuda."""

    step: Annotated[RooflineOptions, tyro.conf.arg(name="")] = field(default_factory=RooflineOptions)

    def __call__(self) -> None:
        text = self._of_a_step() if self.step.roofline else self._of_the_model()
        print(text)
        if self.out is not None:
            folder = Path(self.out)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "info.txt").write_text(text + "\n")


    def _of_the_model(self) -> str:
        config = PRESETS[self.model].model if self.model in PRESETS else load(self.model).config
        return describe_model(config, 1 if self.batch_size is None else self.batch_size, resolve_device(self.device))

    def _of_a_step(self) -> str:
        run, options = Path(self.model), self.step
        config = PRESETS.get(self.model) or load_settings(run)
        if config is None:
            known = ", ".join(PRESETS)
            raise ValueError(f"--roofline takes a preset ({known}) or a run's folder; {self.model} is neither")
        if self.model not in PRESETS and options.measured is None and (run / METRICS_NAME).is_file():
            options = replace(options, measured=self.model)
        return describe_roofline(self.model, config, self.batch_size, options)


def describe(config: TrainConfig) -> str:
    """Return a run's resolved settings and its model's description."""
    settings = json.dumps(to_dict(config), indent=2)
    return f"{settings}\n\n{describe_model(config.model, config.batch_size, resolve_device(config.device))}"


def describe_model(config: SodaConfig, batch_size: int, device: torch.device) -> str:
    """Return a table of a model's parts. Nothing is computed: the forward passes run over meta tensors.

    Raises:
        ValueError: batch_size is not positive, or the config does not fit together.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be positive")
    with torch.device("meta"):
        model = Soda(config).eval()
        source = torch.empty(batch_size, config.encoder.in_channels, *(config.encoder.image_size,) * 2)
        x_t = torch.empty(batch_size, config.denoiser.in_channels, *(config.denoiser.image_size,) * 2)
        z, t = torch.empty(batch_size, config.latent.dim), torch.empty(batch_size)
    parts: list[tuple[str, nn.Module, tuple[torch.Tensor, ...]]] = [
        ("encoder", model.encoder, (source,)), ("denoiser", model.denoiser, (x_t, t, z))
    ]  # fmt: skip
    lines = [f"{'':10}{'parameters':>14}{'forward GFLOPs':>16}{'saved activations':>20}    (batch of {batch_size})"]
    for name, part, arguments in parts:
        parameters = sum(p.numel() for p in part.parameters())
        flops, activations = _measure(part, arguments)
        lines.append(f"{name:10}{parameters:>14,}{flops / 1e9:>16.2f}{_mib(activations):>20}")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    sections = ", ".join(
        f"{section} {part.stop - part.start}"
        for section, part in zip(model.section_names, model.section_slices, strict=True)
    )
    lines += [
        "",
        f"training state (weights, average, gradients, two moments, fp32): {_mib(5 * weights)}",
        f"z: {config.latent.dim} numbers in {model.num_sections} sections: {sections}",
        "",
        str(native_status()),
        "kernels:",
        *_kernels(model, config, device),
    ]
    return "\n".join(lines)


def _measure(part: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[int, int]:
    """Return the FLOPs of a forward pass and the bytes of memory that autograd would keep for the backward."""
    register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        saved = list_saved(part, lambda: part(*arguments))
    return counter.get_total_flops(), sum(tensor.own_bytes for tensor in saved)


def _kernels(model: Soda, config: SodaConfig, device: torch.device) -> list[str]:
    """Say what `explain` says of each kernel of the denoiser, with how often it is called."""
    # Memory without values: nothing is read, and drawing the weights of a large model takes a minute.
    denoiser = model.denoiser.to_empty(device=device)
    shape = (1, config.denoiser.in_channels, *(config.denoiser.image_size,) * 2)
    arguments: list[Any] = [torch.empty(shape), torch.zeros(1), torch.empty(1, config.latent.dim)]
    choices = explain(denoiser, *(argument.to(device) for argument in arguments)).choices
    counts: dict[str, int] = {}
    for choice in choices:
        counts[str(choice)] = counts.get(str(choice), 0) + 1
    return [f"  {count:3d} x {line}" for line, count in counts.items()]


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
