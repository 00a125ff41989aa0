"""What a run looks at on its way: reconstructions as a picture, and probes of z."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from soda_engine.data.datasets import ImageDataset, SelectedDataset
from soda_engine.evaluation.features import encode_dataset
from soda_engine.evaluation.pictures import labelled_rows
from soda_engine.evaluation.probes import knn_probe, logistic_probe
from soda_engine.evaluation.reconstruction import reconstruct
from soda_engine.models.soda import Soda

NUM_PICTURES = 8
SAMPLER_STEPS = 50
MAX_PROBE_IMAGES = 10_000


def draw_reconstructions(model: Soda, dataset: ImageDataset, path: Path, *, images_seen: int) -> None:
    """Write the first readable images of a data set above what the model makes of their z."""
    images, _, _ = dataset.read(range(min(NUM_PICTURES, len(dataset))))
    if len(images):
        result = reconstruct(model, images, num_steps=SAMPLER_STEPS)
        rows = [("image", result.target), ("from z", result.reconstruction)]
        labelled_rows(rows, path, title=f"after {images_seen:,} images")


def probe_latents(model: Soda, train_set: ImageDataset, test_set: ImageDataset) -> dict[str, float]:
    """Return the logistic and the k-NN probe's accuracy on z, from at most 10,000 images of each set.

    Raises:
        ValueError: the sets cannot be probed: without labels, for example, or with too few images.
    """
    train, test = (encode_dataset(model, _thin(dataset)) for dataset in (train_set, test_set))
    return {"linear_probe": logistic_probe(train, test).accuracy, "knn": knn_probe(train, test).accuracy}


def _thin(dataset: ImageDataset) -> ImageDataset:
    """Keep at most MAX_PROBE_IMAGES images, chosen at random once and for all."""
    if len(dataset) <= MAX_PROBE_IMAGES:
        return dataset
    chosen = np.random.default_rng(0).choice(len(dataset), MAX_PROBE_IMAGES, replace=False)
    return SelectedDataset(dataset, torch.from_numpy(np.sort(chosen)))
