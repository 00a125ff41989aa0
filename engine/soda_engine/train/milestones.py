"""What a run looks at on its way: reconstructions as a picture, and probes of z."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from soda_engine.data.datasets import ImageDataset, SelectedDataset
from soda_engine.evaluation.drawings import draw_reconstructions
from soda_engine.evaluation.features import encode_dataset
from soda_engine.evaluation.probes import knn_probe, linear_probe, logistic_probe
from soda_engine.models.soda import Soda

NUM_PICTURES = 8
SAMPLER_STEPS = 50
MAX_PROBE_IMAGES = 10_000
# Ten classes of z at 512: about ten seconds for 10,000 images on one core; 1,000 classes at 2,048 would be hours.
MAX_LOGISTIC_WEIGHTS = 5_120


def draw_first_images(model: Soda, dataset: ImageDataset, path: Path, *, images_seen: int) -> None:
    """Draw the first readable images of a data set above what the model makes of their z."""
    images, _, _ = dataset.read(range(min(NUM_PICTURES, len(dataset))))
    if len(images):
        draw_reconstructions(model, images, path, title=f"after {images_seen:,} images", num_steps=SAMPLER_STEPS)


def probe_latents(model: Soda, train_set: ImageDataset, test_set: ImageDataset) -> dict[str, float]:
    """Return the linear and the k-NN probe's accuracy on z, from at most 10,000 images of each set.

    The linear probe is the logistic one, or the swept linear layer where L-BFGS on a CPU would take long.

    Raises:
        ValueError: the sets cannot be probed: without labels, for example, or with too few images.
    """
    train, test = (encode_dataset(model, thinned(dataset, MAX_PROBE_IMAGES)) for dataset in (train_set, test_set))
    if train_set.num_classes * train.z.shape[1] <= MAX_LOGISTIC_WEIGHTS:
        linear = logistic_probe(train, test).accuracy
    else:
        linear = linear_probe(train, test, device=model.device).accuracy
    return {"linear_probe": linear, "knn": knn_probe(train, test, device=model.device).accuracy}


def thinned(dataset: ImageDataset, most: int) -> ImageDataset:
    """Keep at most so many images, chosen at random once and for all."""
    if len(dataset) <= most:
        return dataset
    chosen = np.random.default_rng(0).choice(len(dataset), most, replace=False)
    return SelectedDataset(dataset, torch.from_numpy(np.sort(chosen)))
