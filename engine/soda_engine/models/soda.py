"""SODA: an encoder whose compact code z guides a diffusion denoiser, as one module that can be saved and shared."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from soda_engine.config import SodaConfig, from_dict, to_dict
from soda_engine.data.views import plain_view
from soda_engine.diffusion.guidance import DenoiserOfZ, guided
from soda_engine.diffusion.objective import SCHEDULES, denoising_losses, loss_weights
from soda_engine.diffusion.samplers import sample as run_sampler
from soda_engine.diffusion.samplers import step_indices, to_device
from soda_engine.models.encoder import ResNetEncoder
from soda_engine.models.folded import folded
from soda_engine.models.modulation import build_section_map, section_indices, section_slices
from soda_engine.models.unet import Denoiser
from soda_kernels import NoiseSchedule, philox_normal, span

WEIGHTS_NAME = "model.safetensors"


class Soda(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="soda-engine",
    tags=["soda", "diffusion", "representation-learning"],
    license="apache-2.0",
    paper_url="https://arxiv.org/abs/2311.17901",
):
    """The SODA model.

    Args:
        config: all settings; `type(model)(model.config)` is the model's untrained twin.

    Attributes:
        encoder: source view to z. denoiser: noisy target view and z to the prediction.
        section_names, section_slices: the sections of z, coarse control last ("middle"), and where they lie.

    Reference:
        Hudson et al. 2023, "SODA: Bottleneck Diffusion Models for Representation Learning".
    """

    def __init__(self, config: SodaConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SodaConfig()
        sections = build_section_map(config.denoiser, config.latent.pairing)
        self.section_names = sections.names
        self.section_slices = section_slices(config.latent.dim, len(sections.names))
        self.encoder = ResNetEncoder(config.encoder, config.latent.dim)
        self.denoiser = Denoiser(config.denoiser, config.latent)
        self._schedule: NoiseSchedule = SCHEDULES[config.diffusion.schedule](config.diffusion.num_steps)
        self.loss_weights: Tensor | None
        weights = loss_weights(self._schedule, config.diffusion.loss_weight, config.diffusion.target)
        self.register_buffer("loss_weights", weights, persistent=False)

    @property
    def num_sections(self) -> int:
        return len(self.section_names)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule, on the model's device."""
        self._schedule = self._schedule.to(self.device)
        return self._schedule

    def forward(
        self, source: Tensor, target_view: Tensor, *, seed: int | Tensor, sample_ids: Tensor, step: int | Tensor
    ) -> Tensor:
        """Return the training loss of each sample; see `soda_engine.diffusion.objective.denoising_losses`."""
        return denoising_losses(self, source, target_view, seed=seed, sample_ids=sample_ids, step=step)

    def denoise(
        self,
        x_t: Tensor,
        step_index: Tensor,
        z: Tensor,
        *,
        section_mask: Tensor | None = None,
        dropout_seed: Tensor | None = None,
    ) -> Tensor:
        """Predict the diffusion target of noisy images, guided by z.

        Args:
            x_t: [N, C, S, S]. step_index: [N] int64. z: [N, d].
            section_mask: [N, m + 1] or [1, m + 1] of 0 and 1; a section at 0 does not guide. None keeps all.
            dropout_seed: [N] int64, needed in training mode with dropout.

        Returns:
            [N, C, S, S]: the noise, v or x0, as `config.diffusion.target` says.
        """
        t = (step_index + 1).to(torch.float32) / self.config.diffusion.num_steps
        return self.denoiser(x_t, t, z, section_mask=section_mask, seed=dropout_seed)

    @torch.no_grad()
    def denoiser_for(self, num_steps: int) -> DenoiserOfZ:
        """Return the denoiser as sampling loops of so many steps call it: one z throughout, one time for all samples.

        It computes in evaluation mode and without gradients what `denoise` does, and keeps what the blocks make of all
        the loop's times, in fp32 35 MiB for 1000 steps of `cifar10` and 156 MiB for those of `imagenet128`.

        Args:
            num_steps: spread evenly over the schedule, as by `soda_engine.diffusion.samplers.step_indices`.

        Returns:
            A function of z, [N, d], and `section_mask=` (as for `denoise`), to one from x_t, [N, C, S, S], and the step
            index, a 0-d int64 tensor, to a prediction. Other indices than the loop's raise an IndexError; on a GPU they
            fail an assertion there.

        Raises:
            ValueError: num_steps is out of range, or the model is in training mode with dropout; of the function: z or
                the mask has another shape.
        """
        if self.denoiser.training and self.config.denoiser.dropout > 0.0:
            raise ValueError("the model is in training mode with dropout, which sampling has not; call eval() first")
        total = self.config.diffusion.num_steps
        indices = to_device(torch.tensor(step_indices(total, num_steps)), self.device)
        row_of = torch.full((total,), num_steps, device=self.device)  # beyond the table's end: no step of the loop
        row_of[indices] = torch.arange(num_steps, device=self.device)
        table = self.denoiser.time_table((indices + 1).to(torch.float32) / total)

        @torch.no_grad()
        def of_z(z: Tensor, *, section_mask: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
            condition = self.denoiser.condition(z, section_mask=section_mask)

            @torch.no_grad()
            def denoise(x_t: Tensor, step_index: Tensor) -> Tensor:
                row = table.index_select(0, row_of.index_select(0, step_index.reshape(1)))
                return self.denoiser(x_t, condition=condition(row))

            return denoise

        return of_z

    @torch.no_grad()
    def encode(self, images: Tensor, *, batch_size: int = 256) -> Tensor:
        """Encode images of any size into z.

        Args:
            images: [N, C, H, W] floats in [-1, 1] or uint8; resized to the encoder's size. On any device.
            batch_size: images encoded at a time.

        Returns:
            [N, d] fp32 on the model's device.

        Raises:
            ValueError: the images have another number of channels than the encoder, or batch_size is not positive.
        """
        _check_batch_size(batch_size)
        channels = self.config.encoder.in_channels
        if not isinstance(images, Tensor):
            raise TypeError(f"images is a {type(images).__name__}; it must be a tensor")
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images has shape {tuple(images.shape)}; this model takes (N, {channels}, H, W)")
        size, batches = self.config.encoder.image_size, images.split(batch_size)
        dtype = next(self.encoder.parameters()).dtype
        encode, layout = folded(self.encoder), torch.channels_last
        # Half precision is widened first: PyTorch resizes none of it on a CPU.
        wide = (batch.float() if batch.is_floating_point() else batch for batch in batches if len(batch))
        views = (plain_view(batch.to(self.device), size).to(dtype, memory_format=layout) for batch in wide)
        codes = []
        for view in views:
            with span("encode"):
                codes.append(encode(view).float())
        return torch.cat(codes) if codes else torch.empty(0, self.config.latent.dim, device=self.device)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        *,
        num_steps: int = 100,
        method: str = "ddim",
        eta: float = 0.0,
        cfg_scale: float = 1.0,
        sections: Sequence[str | int] | None = None,
        unconditional_sections: Sequence[str | int] | None = None,
        clip_x0: float | None = 1.0,
        seed: int = 0,
        sample_ids: Tensor | Sequence[int] | None = None,
        x_T: Tensor | None = None,
        batch_size: int = 256,
        progress: bool = False,
        graphed: bool | None = None,
    ) -> Tensor:
        """Generate one image for each z.

        Args:
            z: [N, d].
            num_steps: denoising steps, spread evenly over the schedule.
            method: "ddim", "ddpm" or "dpmpp_2m". eta: DDIM's noise; 0 is deterministic.
            cfg_scale: guidance scale; 1 is off.
            sections: the sections that guide, by name or index; None for all, [] for an unguided sample.
            unconditional_sections: the sections zeroed in the unconditional half of guidance; None for all.
            clip_x0: clamp the predicted clean image to [-clip_x0, clip_x0]; None for no clipping.
            seed, sample_ids: key of the noise; sample_ids counts from 0 if None.
            x_T: [N, C, S, S] to start from, instead of drawn noise.
            batch_size: images generated at a time; it does not change them.
            progress: show a progress bar.
            graphed: replay a CUDA graph of one step; None: on a GPU, unless there are fewer than three.

        Returns:
            [N, C, S, S] fp32, in [-1, 1] where x0 is clipped.

        Raises:
            ValueError: z has the wrong width, or an argument is out of range.
        """
        _check_batch_size(batch_size)
        for name, value in (("z", z), ("x_T", x_T)):
            if value is not None and not (isinstance(value, Tensor) and value.is_floating_point()):
                raise TypeError(f"{name} must be a floating-point tensor, such as encode returns")
        if z.ndim != 2 or z.shape[1] != self.config.latent.dim:
            raise ValueError(f"z has shape {tuple(z.shape)}; it must be (N, {self.config.latent.dim})")
        shape = (self.config.denoiser.in_channels, *(self.config.denoiser.image_size,) * 2)
        z = z.to(self.device, self.denoiser.conv_in.weight.dtype)
        if sample_ids is None:
            ids = torch.arange(len(z), device=self.device)
        else:
            ids = torch.as_tensor(sample_ids, dtype=torch.int64).to(self.device)
        if ids.shape != (len(z),):
            raise ValueError(f"sample_ids has shape {tuple(ids.shape)}; there are {len(z)} rows of z")
        if x_T is None:
            # Steps of the sampler's stream are step indices; num_steps of the schedule is none of them.
            first = self.config.diffusion.num_steps
            x_T = philox_normal((len(z), *shape), seed=seed, sample_ids=ids, step=first, stream="sampler")
        if tuple(x_T.shape) != (len(z), *shape):
            raise ValueError(f"x_T has shape {tuple(x_T.shape)}; it must be {(len(z), *shape)}")
        keep = self._mask(range(self.num_sections) if sections is None else sections)
        dropped = range(self.num_sections) if unconditional_sections is None else unconditional_sections
        images = []
        with _evaluating(self):
            denoiser_of_z = self.denoiser_for(num_steps)
            for start in range(0, len(z), batch_size):
                part = slice(start, start + batch_size)
                denoise = guided(denoiser_of_z, z[part], keep, keep * (1 - self._mask(dropped)), cfg_scale)
                images.append(
                    run_sampler(
                        denoise,
                        # Features take the layout of what comes in. Steps of cifar10-small took 1.3 times as long
                        # where it was contiguous, on two EPYC cores.
                        x_T[part].to(self.device, torch.float32, memory_format=torch.channels_last),
                        self.schedule,
                        num_steps=num_steps,
                        method=method,
                        target=self.config.diffusion.target,
                        cfg_scale=cfg_scale,
                        eta=eta,
                        clip_x0=clip_x0,
                        seed=seed,
                        sample_ids=ids[part],
                        progress=progress,
                        graphed=graphed,
                    )  # fmt: skip
                )
        return torch.cat(images) if images else torch.empty(0, *shape, device=self.device)

    def _mask(self, sections: Sequence[str | int] | range) -> Tensor:
        """A [1, m + 1] mask that is 1 at the given sections."""
        mask = torch.zeros(1, self.num_sections, device=self.device)
        for index in section_indices(sections, self.section_names):
            mask[:, index].fill_(1.0)  # a list of indices would be copied to the device, which waits
        return mask

    def _save_pretrained(self, save_directory: Path) -> None:
        save_weights(self, save_directory / WEIGHTS_NAME)
        (save_directory / "config.json").write_text(json.dumps(to_dict(self.config), indent=2) + "\n")

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, revision: str | None, cache_dir: str | Path | None, force_download: bool,
        local_files_only: bool, token: str | bool | None, map_location: str = "cpu", **_: Any,
    ) -> Soda:  # fmt: skip
        folder = Path(model_id)
        path = folder / WEIGHTS_NAME if folder.is_dir() else hf_hub_download(
            model_id, WEIGHTS_NAME, revision=revision, cache_dir=cache_dir, force_download=force_download,
            local_files_only=local_files_only, token=token,
        )  # fmt: skip
        return load_weights(Path(path), cls).to(map_location)


def save_weights(model: Soda, path: Path) -> None:
    """Write a model's weights as safetensors, with its config in the file's metadata."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt", "soda_config": json.dumps(to_dict(model.config))})


def load_weights(path: Path, cls: type[Soda] = Soda) -> Soda:
    """Build the model that `save_weights` wrote, in evaluation mode and with channels-last weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or was not written by `save_weights`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if "soda_config" not in metadata:
        raise ValueError(f"{path} has no soda_config in its metadata; it is not a SODA model of this engine")
    try:
        config = from_dict(SodaConfig, json.loads(metadata["soda_config"]))
    except ValueError as error:
        raise ValueError(f"{path} holds a config that this engine cannot read: {error}") from error
    model = cls(config)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights that the config in it describes") from error
    model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be positive")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for a while; a part that was frozen in it stays so afterwards.

    Modes are set one by one, and only where they change: `eval` would set them in every module at every call.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
