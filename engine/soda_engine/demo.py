"""The demonstration: pretrain on scikit-learn's digits, probe z against its baselines, and draw what z can do."""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from soda_engine.data.datasets import open_dataset
from soda_engine.environment import environment
from soda_engine.evaluation import drawings
from soda_engine.evaluation.features import encode_dataset, pixel_features
from soda_engine.evaluation.pictures import curves
from soda_engine.evaluation.probes import compare_probes, format_table
from soda_engine.presets import PRESETS
from soda_engine.records import write_json
from soda_engine.train.checkpoint import list_checkpoints, load
from soda_engine.train.logging import METRICS_NAME
from soda_engine.train.settings import OtherRunError
from soda_engine.train.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Pretrain on 70% of scikit-learn's digits in a few minutes, probe z on the other 30%, and draw pictures.

    Writes metrics.json and PNGs into --out, and prints a table of accuracies. A second call goes on from what the first
    one trained.
    """

    out: str = "runs/demo"
    """Folder of the run and its results."""
    images: int = PRESETS["digits"].total_images
    """Training images, counted with repetition."""
    fresh: bool = False
    """Delete the folder first and train again."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda."""

    def __call__(self) -> None:
        out = Path(self.out)
        if self.fresh and out.exists():
            if not list_checkpoints(out):
                raise ValueError(f"{out} holds no run, so --fresh does not delete it; give another --out")
            shutil.rmtree(out)
        config = dataclasses.replace(
            PRESETS["digits"], out=self.out, total_images=self.images, device=self.device
        )
        try:
            trainer = Trainer(config)
        except OtherRunError as error:
            raise ValueError(f"{error}; or train again with --fresh") from error
        progress = trainer.train()
        if progress.images < config.total_images:
            return
        start = time.monotonic()
        model = load(out, device=str(trainer.processes.device))
        torch.manual_seed(config.seed)
        untrained = type(model)(model.config).to(model.device)
        train_set, test_set = trainer.train_set, open_dataset(config.data, config.dataset, "test", seed=config.seed)
        latents = {name: encode_dataset(model, part) for name, part in (("train", train_set), ("test", test_set))}
        accuracies = compare_probes(
            {
                "z": (latents["train"], latents["test"]),
                "untrained": (encode_dataset(untrained, train_set), encode_dataset(untrained, test_set)),
                "pixels": (pixel_features(train_set), pixel_features(test_set)),
            }
        )
        images, labels = test_set.read(range(len(test_set)))[0], test_set.labels()
        assert labels is not None
        one_each = images[[int((labels == digit).nonzero()[0]) for digit in range(10)]]
        written = [
            drawings.draw_reconstructions(model, one_each, out / "reconstructions.png").path,
            drawings.draw_interpolations(model, one_each[:5], one_each[5:], out / "interpolation.png"),
            drawings.draw_mixes(model, one_each[:5], one_each[5:], out / "mix.png"),
            drawings.draw_traversals(
                model, one_each[3:4], torch.from_numpy(latents["train"].z), out / "directions.png"
            ),
            drawings.draw_samples(model, torch.from_numpy(latents["train"].z), 64, out / "samples.png"),
            drawings.draw_variations(model, one_each, 6, out / "variations.png"),
            curves(out / METRICS_NAME, out / "curves.png"),
        ]
        seconds = progress.seconds + time.monotonic() - start
        rate = progress.images / progress.seconds
        metrics = {**accuracies, "images_per_second": rate, "seconds": seconds, "env": environment(model.device)}
        write_json(out / "metrics.json", metrics)
        print(f"\nAccuracy on {len(test_set)} held-out digits; pretrained on the other {len(train_set)}, unlabelled\n")
        print(format_table(accuracies))
        print(f"\n{progress.images:,} images in {progress.seconds:.0f} s of training "
              f"({rate:.0f} images/s), {seconds:.0f} s in all")  # fmt: skip
        print("\n".join(["", "Pictures and numbers:", *(f"  {path}" for path in written), f"  {out / 'metrics.json'}"]))
