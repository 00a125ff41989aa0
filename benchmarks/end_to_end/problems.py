"""What every contender of a case is given: weights, images, latents, and the noise that sampling starts from."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.end_to_end.cases import EndToEndCase
from soda_engine.data.loaders import Batch
from soda_engine.diffusion.samplers import step_indices
from soda_engine.models.soda import Soda

_MOVE = 1e-5
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True, kw_only=True)
class EndToEndProblem:
    """The tensors of a case, and a folder for what has to lie in files."""

    case: EndToEndCase
    device: torch.device
    dtype: str
    folder: Path
    weights: Soda
    """Untrained, but nothing in it is zero; contenders take copies."""
    batch: Batch
    """Of a training step."""
    images: Tensor
    """[N, C, S, S] uint8 to encode, on the device."""
    z: Tensor
    x_T: Tensor

    @property
    def bf16(self) -> bool:
        """Whether products and convolutions are in bf16, by autocast."""
        return self.dtype == "bf16"

    @property
    def indices(self) -> list[int]:
        """Steps of the schedule at which the denoiser is called."""
        return step_indices(self.case.config.model.diffusion.num_steps, self.case.num_steps)

    def model(self, dtype: torch.dtype = torch.float32) -> Soda:
        """Return a copy of the weights."""
        return copy.deepcopy(self.weights).to(dtype)

    def with_moved_encoder(self) -> EndToEndProblem:
        """Return the problem with every weight of the encoder moved by some hundred roundings of fp32."""
        weights = self.model(torch.float64)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            for parameter in weights.encoder.parameters():
                parameter.mul_(1 + _MOVE * torch.randn_like(parameter))
        return dataclasses.replace(self, weights=weights)


def make_problem(case: EndToEndCase, device: torch.device, dtype: str) -> EndToEndProblem:
    """Draw the tensors of a case."""
    settings = case.config.model
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Soda(settings)
        roughen(model)
        of_encoder, of_denoiser = settings.encoder, settings.denoiser
        stored = _smooth_images(case.batch, case.config.dataset.channels, case.config.dataset.image_size)
        images = _smooth_images(case.encoded, of_encoder.in_channels, of_encoder.image_size)
        x_T = torch.randn(case.sampled, of_denoiser.in_channels, of_denoiser.image_size, of_denoiser.image_size)
        z = torch.randn(case.sampled, settings.latent.dim)
    ids = torch.arange(case.batch)
    batch = Batch(images=stored, labels=None, sample_ids=ids, epochs=torch.zeros_like(ids), skipped=[])
    return EndToEndProblem(
        case=case, device=device, dtype=dtype, folder=Path(tempfile.mkdtemp(prefix="soda-e2e-")),
        weights=model.to(device), batch=batch, images=images.to(device), z=z.to(device), x_T=x_T.to(device),
    )  # fmt: skip


def roughen(model: nn.Module) -> None:
    """Draw what starts at zero: else no gradient reaches most of an untrained denoiser, and it predicts zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
                nn.init.normal_(parameter, std=0.5 * fan_in**-0.5)


def _smooth_images(count: int, channels: int, side: int) -> Tensor:
    """Draw images whose neighbouring pixels are alike, as those of photographs are."""
    coarse = torch.rand(count, channels, max(1, side // 8), max(1, side // 8))
    return F.interpolate(coarse, size=(side, side), mode="bilinear").mul_(255).to(torch.uint8)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Lay tensors end to end."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
