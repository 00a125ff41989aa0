"""The input pipeline alone beside the training step that it feeds, on this CPU: images a second of both.

    python -m benchmarks.training.input --preset cifar10-small --data DIR --json PATH

The pipeline is the trainer's: its loader, with the preset's processes, and on a CPU the two views of each image, which
a GPU would make itself. A first pass decodes every image; in later ones those of a set that fits in memory lie there.
`--photos` times the decoding of JPEGs as large as ImageNet's by one process instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.commands.arguments import Parser, result_file
from benchmarks.records import append_row, describe_environment, new_row
from benchmarks.tables import table
from soda_engine.config import CadenceConfig, TrainConfig
from soda_engine.data.datasets import ImageDataset, num_bytes, open_dataset
from soda_engine.data.decoding import decode_image
from soda_engine.data.loaders import Batch, eval_loader, train_loader
from soda_engine.data.views import make_view
from soda_engine.presets import PRESETS
from soda_engine.train.trainer import Trainer

WANTED = 2.0
"""How many times as many images as the step takes the pipeline should give, so that no step waits for it."""
PHOTO_SIZE = (500, 375)
"""Width and height of most images of ImageNet, whose files have 110 kB on average."""
_ROUNDS = 5

Row = dict[str, Any]


def input_rows(config: TrainConfig, step_batch: int, seconds: float) -> list[Row]:
    """Time the pipeline of a run's settings, and its training step, in turn.

    Args:
        step_batch: images of the timed step; the pipeline makes batches of the preset's size.
        seconds: for each of what is timed.
    """
    decoding = dataclasses.replace(config.dataset, memory_mib=0)
    sets = {"decoding": open_dataset(config.data, decoding, "train", config.seed)}
    kept = open_dataset(config.data, config.dataset, "train", config.seed)
    if config.data == "digits":
        sets = {"in memory": kept}
    elif num_bytes(kept) <= config.dataset.memory_mib * 2**20:
        sets["in memory"] = kept
        for _ in eval_loader(kept, batch_size=512):  # the first pass
            pass
    with tempfile.TemporaryDirectory() as folder:
        step = _training_step(config, step_batch, next(iter(sets.values())), folder)
        calls: dict[tuple[str, str], Callable[[], int]] = {("step", ""): step}
        for name, dataset in sets.items():
            calls["batches", name] = _pipeline(config, dataset, views=False)
            calls["batches and views", name] = _pipeline(config, dataset, views=True)
        rates: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        for call in calls.values():
            call()
        for _ in range(_ROUNDS):
            for key, call in calls.items():
                rates[key].append(_rate(call, seconds / _ROUNDS))
    found = {key: statistics.median(values) for key, values in rates.items()}
    env = describe_environment(torch.device("cpu"))
    case = {
        "id": f"{config.out}/{config.batch_size}", "set": config.out, "N": config.batch_size,
        "S": config.dataset.image_size, "C": config.dataset.channels, "workers": config.dataset.workers,
        "step_N": step_batch,
    }  # fmt: skip
    return [
        new_row(suite="e2e", op="input", case=case, provider="ours", variant=name, timer="wall", env=env, status="ok")
        | {
            "images_per_s": found["batches and views", name], "batches_images_per_s": found["batches", name],
            "step_images_per_s": found["step", ""], "ratio": found["batches and views", name] / found["step", ""],
        }
        for name in sets
    ]  # fmt: skip


def _pipeline(config: TrainConfig, dataset: ImageDataset, *, views: bool) -> Callable[[], int]:
    """Return what fetches the trainer's next batch and says how many images came."""
    batches: Iterator[Batch] = train_loader(
        dataset, batch_size=config.batch_size, seed=config.seed, workers=config.dataset.workers
    )
    sides = config.model.encoder.image_size, config.model.denoiser.image_size

    def fetch() -> int:
        batch = next(batches)
        if views:
            key: dict[str, Any] = {"seed": config.seed, "sample_ids": batch.sample_ids, "epochs": batch.epochs}
            make_view(batch.images, config.views.source, sides[0], role="source", **key)
            make_view(batch.images, config.views.target, sides[1], role="target", **key)
        return len(batch)

    return fetch


def _training_step(config: TrainConfig, batch_size: int, dataset: ImageDataset, out: str) -> Callable[[], int]:
    """Return the trainer's step on a batch that is there already; views are part of it."""
    cadence = CadenceConfig(log_images=0, checkpoint_images=0, sample_images=0, probe_images=0)
    trainer = Trainer(
        dataclasses.replace(config, out=out, batch_size=batch_size, device="cpu", tensorboard=False, cadence=cadence)
    )
    batch = next(train_loader(dataset, batch_size=batch_size, seed=config.seed))

    def step() -> int:
        trainer.step(batch)
        trainer.read()
        return batch_size

    return step


def _rate(call: Callable[[], int], seconds: float) -> float:
    """Return images a second of calls for so long, at least one."""
    start, images = time.perf_counter(), 0
    while images == 0 or time.perf_counter() < start + seconds:
        images += call()
    return images / (time.perf_counter() - start)


def photo_rows(sizes: tuple[int, ...], seconds: float) -> list[Row]:
    """Time how many JPEGs of a photograph's size one process decodes to squares."""
    photo, rows = make_photo(), []
    for size in sizes:

        def decode(size: int = size) -> int:
            decode_image(photo, size, 3)
            return 1

        decode()
        case = {"id": f"photo/{size}", "set": "photo", "N": 1, "S": size, "C": 3, "W": PHOTO_SIZE[0],
                "H": PHOTO_SIZE[1], "file_bytes": len(photo)}  # fmt: skip
        rate = statistics.median(_rate(decode, seconds / _ROUNDS) for _ in range(_ROUNDS))
        row = new_row(suite="e2e", op="decode", case=case, provider="ours", timer="wall", status="ok",
                      env=describe_environment(torch.device("cpu")))  # fmt: skip
        rows.append(row | {"images_per_s": rate})
    return rows


def make_photo() -> bytes:
    """Draw a JPEG of 110 kB, as photographs of its size have: blurred shapes under grain."""
    generator = np.random.default_rng(0)
    shapes = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(shapes.resize(PHOTO_SIZE, Image.Resampling.BICUBIC)).astype(np.float32)
    grain = generator.normal(0, 24, pixels.shape)
    file = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def main() -> None:
    """Print the table, and append the rows."""
    parser = Parser(
        description=__doc__, prog="python -m benchmarks.training.input", formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", default="digits", choices=sorted(PRESETS))
    parser.add_argument("--data", help="the data set, as `soda-engine train` takes it; the preset's if not given")
    parser.add_argument("--step-batch", type=int, help="images of the timed step; the preset's if not given")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each of what is timed; %(default)s")
    parser.add_argument("--photos", type=int, nargs="+", metavar="SIZE", help="decode JPEGs of photographs' size to "
                        "squares of these sizes, and nothing else")  # fmt: skip
    parser.add_argument("--json", type=result_file, metavar="PATH", help="append one JSON object a line there")
    options = parser.parse_args()
    if options.photos:
        rows = photo_rows(tuple(options.photos), options.seconds)
        cells = [(f"{r['case']['file_bytes'] / 1e3:.0f} kB to {r['case']['S']}", f"{r['images_per_s']:.0f}")
                 for r in rows]  # fmt: skip
        print(table(("a JPEG of 500x375", "images/s of one process"), cells))
    else:
        preset = PRESETS[options.preset]
        config = dataclasses.replace(preset, data=options.data or preset.data, out=options.preset)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        rows = input_rows(config, options.step_batch or config.batch_size, options.seconds)
        print(table(
            (f"{options.preset}, images/s", "batches", "batches and views", "step", f"ratio ({WANTED:g} wanted)"),
            ((r["variant"], f"{r['batches_images_per_s']:.0f}", f"{r['images_per_s']:.0f}",
              f"{r['step_images_per_s']:.1f}", f"{r['ratio']:.1f}") for r in rows),
        ))  # fmt: skip
    for row in rows if options.json else ():
        append_row(options.json, row)


if __name__ == "__main__":
    main()
