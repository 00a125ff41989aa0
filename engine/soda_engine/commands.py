"""What can be done with a trained model, one dataclass a command: its fields are the flags, calling it runs it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from soda_engine.config import DatasetConfig
from soda_engine.data.datasets import ImageDataset, open_dataset
from soda_engine.data.decoding import decode_image
from soda_engine.environment import environment
from soda_engine.evaluation import drawings
from soda_engine.evaluation.features import Features, check_features_path, encode_dataset, pixel_features, save_features
from soda_engine.evaluation.probes import format_table, knn_probe, linear_probe, logistic_probe
from soda_engine.models.soda import Soda
from soda_engine.records import write_json
from soda_engine.train.checkpoint import list_checkpoints, load
from soda_engine.train.compiling import compile_model
from soda_engine.train.distributed import resolve_device
from soda_engine.train.settings import load_settings

Run = Annotated[str, tyro.conf.Positional]
OptionalText = Annotated[str | None, tyro.conf.DisallowNone]  # else --help offers the word None as a value


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How images are sampled from z."""

    num_steps: int = 100
    """Denoising steps."""
    method: Literal["ddim", "ddpm", "dpmpp_2m"] = "ddim"
    """ddim, ddpm (always noisy), or dpmpp_2m (second order: good with 20 steps)."""
    eta: float = 0.0
    """Noise of DDIM; 0 is deterministic."""
    cfg_scale: float = 1.0
    """Guidance scale; 1 is off."""
    unconditional_sections: tuple[str, ...] = ()
    """Sections of z zeroed in the unconditional half of guidance; all if not given."""
    seed: int = 0
    """Key of the noise."""

    def as_arguments(self) -> dict[str, Any]:
        """Return the options as keyword arguments of `Soda.sample`."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return options | {"unconditional_sections": self.unconditional_sections or None}


@dataclass(frozen=True, kw_only=True)
class _ModelCommand:
    run: Run
    """Folder of a run or of a saved model, or a name on the Hugging Face hub."""
    out: OptionalText = None
    """Folder for the results; RUN itself if not given."""
    data: OptionalText = None
    """Data set to take images from; the run's own if not given."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda."""

    def load(self) -> Soda:
        """Load the model, on the device."""
        return load(self.run, device=str(resolve_device(self.device)))

    def folder(self) -> Path:
        """Return the folder for results; what writes the first of them makes it, so that a failure leaves none."""
        folder = Path(self.out or self.run)
        if self.out is None and not folder.is_dir():
            raise ValueError(f"{self.run} is no folder here; name a run, or give --out beside a model of the hub")
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"--out {folder} is a file; it must be a folder or a new name")
        return folder

    def dataset(self, model: Soda, split: Literal["train", "test"]) -> ImageDataset:
        """Open a part of --data, or of the data that the run was trained on."""
        config = load_settings(Path(self.run))
        if config is not None:
            return open_dataset(self.data or config.data, config.dataset, split, seed=config.seed)
        if self.data is None:
            raise ValueError(f"{self.run} does not say what it was trained on; give --data")
        encoder = model.config.encoder
        config_of_images = DatasetConfig(image_size=encoder.image_size, channels=encoder.in_channels)  # type: ignore[arg-type]
        return open_dataset(self.data, config_of_images, split)


@dataclass(frozen=True, kw_only=True)
class _PictureCommand(_ModelCommand):
    images: tuple[str, ...] = ()
    """Image files to use; images of the test set if not given."""
    indices: tuple[int, ...] = ()
    """Which images of the test set to use; the first ones if not given."""
    compile: Literal["none", "default"] = "none"
    """Compile the denoiser with torch.compile: up to minutes at the start, less time a step."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)

    def load(self) -> Soda:
        """Load the model, on the device, its denoiser compiled if asked for."""
        model = super().load()
        compile_model(model.denoiser, self.compile, model.device)
        return model

    def pictures(self, model: Soda, num: int) -> Tensor:
        """Return [N, C, S, S] uint8: the files in --images, the --indices, or the first `num` test images."""
        encoder = model.config.encoder
        if num < 1:
            raise ValueError(f"num is {num}; it must be positive")
        if self.images:
            return torch.stack([_read(Path(path), encoder.image_size, encoder.in_channels) for path in self.images])
        dataset = self.dataset(model, "test")
        indices = range(min(num, len(dataset))) if not self.indices else self.indices
        outside = [index for index in indices if not 0 <= index < len(dataset)]
        if outside:
            raise ValueError(f"indices has {outside[0]}; the test set has images 0 to {len(dataset) - 1}")
        images, _, skipped = dataset.read(list(indices))
        if skipped:
            print(f"skipped, since it cannot be read: {', '.join(skipped)}")
        if not len(images):
            raise ValueError("none of the images can be read")
        return images

    def pairs(self, model: Soda, num: int) -> tuple[Tensor, Tensor]:
        """Return two stacks of images: the first half of what `pictures` gives, and the second."""
        images = self.pictures(model, 2 * num)
        if len(images) < 2 or len(images) % 2:
            raise ValueError(f"{len(images)} images came; give an even number: first all a, then all b")
        half = len(images) // 2
        return images[:half], images[half:]


@dataclass(frozen=True, kw_only=True)
class Sample(_PictureCommand):
    """Generate images: new ones from a Gaussian fitted to z, or variations of given ones (same z, other noise)."""

    mode: Literal["gaussian", "variations", "unguided"] = "gaussian"
    """gaussian: z drawn from a Gaussian fitted to z of the training set (SODA itself has no prior); variations: z of
    given images or of test images; unguided: no z at all."""
    num: int = 64
    """Images, or variations of each image."""

    def __call__(self) -> None:
        if self.num < 1:
            raise ValueError(f"num is {self.num}; it must be positive")
        if self.mode != "variations" and (self.images or self.indices):
            raise ValueError(f"images and indices go with --mode variations; the mode is {self.mode}")
        model, path = self.load(), self.folder() / "samples.png"
        options = self.sampling.as_arguments() | {"progress": True}
        if self.mode == "variations":
            drawings.draw_variations(model, self.pictures(model, 8), self.num, path, **options)
        elif self.mode == "gaussian":
            z = encode_dataset(model, self.dataset(model, "train"), progress=True).z
            drawings.draw_samples(model, torch.from_numpy(z), self.num, path, **options)
        else:
            z_ignored = torch.zeros(2, model.config.latent.dim)
            drawings.draw_samples(model, z_ignored, self.num, path, sections=[], **options)
        print(path)


@dataclass(frozen=True, kw_only=True)
class Reconstruct(_PictureCommand):
    """Draw images above what the model makes of their z, and measure PSNR and SSIM."""

    num: int = 16
    """Test images to use, where neither --images nor --indices is given."""

    def __call__(self) -> None:
        model, folder = self.load(), self.folder()
        options = self.sampling.as_arguments() | {"progress": True}
        images = self.pictures(model, self.num)
        drawn = drawings.draw_reconstructions(model, images, folder / "reconstructions.png", **options)
        scores = {"psnr": drawn.scores.mean_psnr, "ssim": drawn.scores.mean_ssim, "images": len(images)}
        write_json(folder / "reconstructions.json", scores)
        print(f"PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f} over {len(images)} images\n{drawn.path}")


@dataclass(frozen=True, kw_only=True)
class Encode(_ModelCommand):
    """Write z of every image of a data set, with labels and sample ids, to .npz or .safetensors."""

    splits: tuple[Literal["train", "test"], ...] = ("train", "test")
    """Parts of the data set; one file each."""
    format: Literal["npz", "safetensors"] = "npz"
    """Kind of file; both open without unpickling."""
    batch_size: int = 256
    """Images encoded at a time."""
    workers: int = 0
    """Loader processes."""

    def __call__(self) -> None:
        folder, model = self.folder(), self.load()
        for split in self.splits:
            path = check_features_path(folder / f"{split}.{self.format}")
            features = encode_dataset(
                model, self.dataset(model, split), batch_size=self.batch_size, workers=self.workers, progress=True
            )
            save_features(features, path)
            print(f"{path}: z {features.z.shape}" + ("" if features.labels is not None else ", no labels"))
            _report_skipped(features)


@dataclass(frozen=True, kw_only=True)
class Probe(_ModelCommand):
    """Measure how well z predicts labels: logistic regression, a swept linear layer and k-NN, against baselines."""

    baselines: tuple[Literal["untrained", "pixels"], ...] = ("untrained", "pixels")
    """What to probe beside z; none if the flag stands alone. Logistic regression on the pixels of a large set of large
    images takes longer than all else: 15 minutes for CIFAR-10 on a busy core."""
    k: int = 20
    """Neighbours of the k-NN probe."""
    batch_size: int = 256
    """Images encoded at a time."""
    workers: int = 0
    """Loader processes."""

    def __call__(self) -> None:
        folder, model = self.folder(), self.load()
        parts = [self.dataset(model, split) for split in ("train", "test")]
        options: dict[str, Any] = {"batch_size": self.batch_size, "workers": self.workers, "progress": True}
        features = {"z": [encode_dataset(model, part, **options) for part in parts]}
        _report_skipped(*features["z"])
        if "untrained" in self.baselines:
            torch.manual_seed(0)
            untrained = type(model)(model.config).to(model.device)
            features["untrained"] = [encode_dataset(untrained, part, **options) for part in parts]
        if "pixels" in self.baselines:
            features["pixels"] = [pixel_features(part, batch_size=self.batch_size) for part in parts]
        results: dict[str, dict[str, float]] = {"linear_probe": {}, "linear_sweep": {}, "knn": {}}
        details: dict[str, Any] = {}
        seen = [int(checkpoint.name) for checkpoint in list_checkpoints(Path(self.run))]
        about = {"images_seen": seen[-1] if seen else None, "env": environment(model.device)}
        for name, (train, test) in (bar := tqdm(features.items(), desc="probe")):
            bar.set_postfix_str(name)
            logistic, knn = logistic_probe(train, test), knn_probe(train, test, k=self.k)
            swept = linear_probe(train, test, device=model.device, progress=True)
            results["linear_probe"][name], results["linear_sweep"][name] = logistic.accuracy, swept.accuracy
            results["knn"][name] = knn.accuracy
            details[name] = {
                "inverse_penalty": logistic.inverse_penalty, "converged": logistic.converged, "lr": swept.lr
            }  # fmt: skip
            # After each representation: raw pixels can take longer than all the rest.
            write_json(folder / "probe.json", {**results, "chosen": details, **about})
        print(f"\n{format_table(results)}\n")
        print("linear_probe: logistic regression; linear_sweep: batch norm and a linear layer, learning rate chosen on")
        print(f"held-out train images; knn: cosine, k = {self.k}\n{folder / 'probe.json'}")


@dataclass(frozen=True, kw_only=True)
class Interpolate(_PictureCommand):
    """Draw walks between z of two images, a row a pair: first all starts, then all ends."""

    steps: int = 9
    """Images a walk, both ends included."""
    spherical: bool = False
    """Turn at constant speed along the great circle instead of going straight."""

    def __call__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}; it must be at least 2, for both ends")
        model, path = self.load(), self.folder() / "interpolation.png"
        images_a, images_b = self.pairs(model, 5)
        drawings.draw_interpolations(
            model, images_a, images_b, path, walk_length=self.steps,
            interpolation="spherical" if self.spherical else "linear", **self.sampling.as_arguments(), progress=True,
        )  # fmt: skip
        print(path)


@dataclass(frozen=True, kw_only=True)
class Mix(_PictureCommand):
    """Draw images with sections of z taken from others: first all images a, then all images b."""

    sections: tuple[str, ...] = ()
    """Names of the sections of b to put into a; each alone if not given."""

    def __call__(self) -> None:
        model, path = self.load(), self.folder() / "mix.png"
        images_a, images_b = self.pairs(model, 5)
        drawings.draw_mixes(
            model, images_a, images_b, path, sections=self.sections or None,
            **self.sampling.as_arguments(), progress=True,
        )  # fmt: skip
        print(path)


@dataclass(frozen=True, kw_only=True)
class Directions(_PictureCommand):
    """Find the principal directions of z over the training set and draw images moved along them."""

    num_directions: int = 6
    """Directions to draw, the widest first: a row each."""
    amounts: tuple[float, ...] = (-3, -2, -1, 0, 1, 2, 3)
    """How far to move, in standard deviations."""

    def __call__(self) -> None:
        model, path = self.load(), self.folder() / "directions.png"
        latents = torch.from_numpy(encode_dataset(model, self.dataset(model, "train"), progress=True).z)
        drawings.draw_traversals(
            model, self.pictures(model, 1), latents, path, num_directions=self.num_directions, amounts=self.amounts,
            **self.sampling.as_arguments(), progress=True,
        )  # fmt: skip
        print(path)


def _read(path: Path, size: int, channels: int) -> Tensor:
    """Decode an image file, or raise one clear line."""
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    try:
        return decode_image(str(path), size, channels)
    except Exception as error:  # Pillow's plugins raise nearly anything
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _report_skipped(*features: Features) -> None:
    names = [name for part in features for name in part.skipped]
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        print(f"skipped {len(names)} images that cannot be read: {shown}")
