"""The input pipeline's rows: which passes there are, and what the ratio is of."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.report.contents import rates_table
from benchmarks.result_files import is_rate
from benchmarks.training.input import PHOTO_SIZE, input_rows, make_photo, photo_rows
from soda_engine.config import TrainConfig
from tests.engine.tiny import tiny_run


def parquet_run(folder: Path, memory_mib: int) -> TrainConfig:
    """Settings of a run on 40 noisy PNGs."""
    generator, files = np.random.default_rng(0), []
    for _ in range(40):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(file, "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table({"image": files}), folder / "train.parquet")
    config = tiny_run(folder / "run", data=str(folder / "train.parquet"))
    return dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, memory_mib=memory_mib))


@pytest.mark.parametrize(("memory_mib", "passes"), [(1, ["decoding", "in memory"]), (0, ["decoding"])])
def test_a_set_that_is_kept_has_later_passes(tmp_path: Path, memory_mib: int, passes: list[str]) -> None:
    rows = input_rows(parquet_run(tmp_path, memory_mib), step_batch=4, seconds=0.05)
    assert [row["variant"] for row in rows] == passes
    for row in rows:
        assert (row["suite"], row["op"], row["status"], row["case"]["step_N"]) == ("e2e", "input", "ok", 4)
        assert row["ratio"] == pytest.approx(row["images_per_s"] / row["step_images_per_s"])
        assert 0 < row["images_per_s"] < row["batches_images_per_s"] and is_rate(row)
    if len(rows) == 2:  # a PNG of 8x8 takes 50 us to decode, and 1 us to fetch
        assert rows[1]["batches_images_per_s"] > 2 * rows[0]["batches_images_per_s"]
    assert rates_table(rows).header == ["what", "images/s", "over a step's"]


def test_a_photograph_is_as_large_as_those_it_stands_for() -> None:
    photo = make_photo()
    assert 100_000 < len(photo) < 120_000
    assert Image.open(io.BytesIO(photo)).size == PHOTO_SIZE
    (row,) = photo_rows((80,), seconds=0.05)
    assert row["case"]["id"] == "photo/80" and row["images_per_s"] > 0
