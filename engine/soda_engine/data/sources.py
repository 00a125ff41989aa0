"""Finds images and labels in what Hugging Face `datasets` reads: parquet, image folders, WebDataset tars, the hub.

`datasets` keeps an Arrow copy (of an image folder: the paths alone) in its own cache, keyed by the files'
names and times, so a changed source is read anew. Nothing is written next to the data.
"""

from __future__ import annotations

import atexit
import bisect
import contextlib
import functools
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from soda_engine.config import DatasetConfig

# `datasets` takes a second to import, which a run on the digits need not wait for.
if TYPE_CHECKING:
    import datasets

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "cls", "fine_label", "class", "target")
_TEST_SPLITS = ("test", "validation", "val")
_PARQUET_ROWS = 1000  # read at a time
_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}


@dataclass(frozen=True)
class Source:
    """The encoded images and the labels of one split.

    Attributes:
        images: rows with the single column `column` of {"bytes", "path"}.
        origins: rows with the columns `__url__` and `__key__`, of WebDataset tars.
        order: [len] int64, the row of each image.
        row_files: the local files behind the rows and the first row of each, of parquet files.
        title: what to call the split where nothing better is known.
    """

    images: datasets.Dataset
    column: str
    order: np.ndarray
    labels: Tensor | None
    num_classes: int
    class_names: list[str] | None
    title: str
    origins: datasets.Dataset | None
    row_files: tuple[list[str], list[int]]

    def __len__(self) -> int:
        return len(self.order)

    def files(self, indices: Sequence[int]) -> list[bytes | str | None]:
        """Return the contents of each image file, or its path, or None where the row is empty."""
        records = self.images[self.order[list(indices)].tolist()][self.column]
        return [None if r is None else r["bytes"] if r["bytes"] is not None else r["path"] for r in records]

    def name(self, index: int) -> str:
        """Say where an image comes from: file and row, tar and key, or path."""
        row = int(self.order[index])
        if self.origins is not None:
            origin = self.origins[row]
            return f"{os.path.basename(origin['__url__'])} sample {origin['__key__']}"
        files, starts = self.row_files
        if files:
            place = bisect.bisect_right(starts, row) - 1
            return f"{files[place]} row {row - starts[place]}"
        record = self.images[row][self.column]
        if record is not None and record["bytes"] is None and record["path"]:
            return str(record["path"])
        return f"{self.title} row {row}"


def open_source(source: str, config: DatasetConfig, split: str, seed: int) -> Source:
    """Open the train or test part of a source; `open_dataset` documents the arguments and errors."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    with _quiet():
        builder = _find(source)
        if isinstance(builder, Parquet) and builder.config.batch_size is None:
            # By default the size of the first row group, at which a file without rows fails in obscure words.
            builder.config.batch_size = _PARQUET_ROWS
        try:
            builder.download_and_prepare()
            lengths = {str(name): info.num_examples for name, info in builder.info.splits.items()}
            parts = {name: builder.as_dataset(name) for name, length in lengths.items() if length}
        except Exception as error:  # whatever the reader of the format raises
            raise ValueError(f"data source {source!r} cannot be read: {_line(error)}") from error
        test_split = config.test_split or _default_test_split(source, lengths, parts, config)
        part_name, rows = _choose_split(source, lengths, config, test_split, split, seed)
        part = parts[part_name]
        column = _image_column(source, part.features, config)
        try:
            images = part.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise ValueError(
                f"column {column!r} of {source!r} holds {part.features[column]}; "
                "images must be image files, as bytes or paths"
            ) from error
        label_column = _label_column(source, part.features, config)
        labels, num_classes, class_names = None, 0, None
        if label_column is not None:
            labels, num_classes, class_names = _labels(source, parts, part_name, label_column)
        tar = {"__url__", "__key__"} <= set(part.column_names)
        return Source(
            images=images,
            column=column,
            order=rows,
            labels=None if labels is None else labels[torch.from_numpy(rows)],
            num_classes=num_classes,
            class_names=class_names,
            title=f"{source} {part_name}",
            origins=part.select_columns(["__url__", "__key__"]) if tar else None,
            row_files=_row_files(source, builder, part_name),
        )


def _find(source: str) -> datasets.DatasetBuilder:
    """Return the builder that reads a path or a data set of the hub."""
    import datasets

    path = Path(source).expanduser()
    cache = _cache_folder()
    if path.is_file() and path.suffix not in _BUILDERS:
        raise ValueError(f"data source {source!r} is a file; it must be a folder or one of {', '.join(_BUILDERS)}")
    if path.exists():
        try:
            if path.is_file():
                files = {"train": [str(path.resolve())]}
                return datasets.load_dataset_builder(_BUILDERS[path.suffix], data_files=files, cache_dir=cache)
            return datasets.load_dataset_builder(str(path.resolve()), cache_dir=cache)
        except Exception as error:  # whatever the reader of the format raises
            raise ValueError(
                f"data source {source!r} cannot be read: {_line(error)}; it must be a folder of parquet files, of "
                "images or of WebDataset tars, or one .parquet or .tar file"
            ) from error
    if source.startswith((".", "~", "/")) or source.count("/") > 1 or path.suffix in _BUILDERS:
        raise FileNotFoundError(
            f"data source {source!r} does not exist; name a folder, a .parquet or .tar file, digits, or a data set "
            "of the Hugging Face hub"
        )
    name, _, config_name = source.partition(":")
    try:
        return datasets.load_dataset_builder(name, config_name or None, cache_dir=cache)
    except Exception as error:  # connection, authorisation, absence, a missing config name: many types
        raise FileNotFoundError(
            f"data source {source!r} is no file or folder here, and the Hugging Face hub did not provide it: "
            f"{_line(error)}"
        ) from error


def _default_test_split(
    source: str, lengths: Mapping[str, int], parts: Mapping[str, datasets.Dataset], config: DatasetConfig
) -> str | None:
    """Return the first of test, validation and val that is there, one with labels if any (ImageNet's test has none)."""

    def labelled(name: str) -> bool:
        column = _label_column(source, parts[name].features, config) if name in parts else None
        return column is not None and _labels(source, parts, name, column)[0] is not None

    present = [name for name in _TEST_SPLITS if name in lengths and name != config.train_split]
    return next(filter(labelled, present), present[0] if present else None)


def _choose_split(
    source: str, lengths: Mapping[str, int], config: DatasetConfig, test: str | None, split: str, seed: int
) -> tuple[str, np.ndarray]:
    """Return which split of the source to read, and its rows [len] int64."""
    name = test if split == "test" and test else config.train_split
    for wanted in dict.fromkeys(filter(None, (name, config.test_split))):
        if wanted not in lengths:
            raise ValueError(
                f"data source {source!r} has no split {wanted!r}; it has {sorted(lengths)}: "
                "set dataset.train_split or dataset.test_split"
            )
    count = lengths[name]
    if count == 0:
        raise ValueError(f"split {name!r} of data source {source!r} is empty")
    if test:
        return name, np.arange(count)
    if count < 2:
        raise ValueError(f"data source {source!r} has one image and no test split; at least two are needed")
    order = np.random.Generator(np.random.Philox(seed % 2**64)).permutation(count)
    held_out = max(1, count // 10)
    return name, np.sort(order[:held_out] if split == "test" else order[held_out:])


def _image_column(source: str, features: Mapping[str, Any], config: DatasetConfig) -> str:
    """Return the column of the images."""
    import datasets

    if config.image_column is not None:
        if config.image_column not in features:
            raise ValueError(
                f"data source {source!r} has no column {config.image_column!r}; it has {sorted(features)}: "
                "set dataset.image_column"
            )
        return config.image_column
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    named = [name for name in _IMAGE_COLUMNS if name in (typed or features)]
    if len(typed) == 1 or named:
        return typed[0] if len(typed) == 1 else named[0]
    raise ValueError(
        f"data source {source!r} has {'several image columns' if typed else 'no image column'} "
        f"among {sorted(features)}: set dataset.image_column"
    )


def _label_column(source: str, features: Mapping[str, Any], config: DatasetConfig) -> str | None:
    """Return the column of the labels; one that was not asked for by name must hold classes to count."""
    if config.label_column is None:
        return next((name for name in _LABEL_COLUMNS if name in features and _is_class(features[name])), None)
    if config.label_column not in features:
        raise ValueError(
            f"data source {source!r} has no column {config.label_column!r}; it has {sorted(features)}: "
            "set dataset.label_column"
        )
    if not _is_class(features[config.label_column]):
        raise ValueError(
            f"column {config.label_column!r} of {source!r} holds {features[config.label_column]}; "
            "labels must be class labels, integers or strings"
        )
    return config.label_column


def _is_class(feature: Any) -> bool:
    dtype = getattr(feature, "dtype", None)
    return isinstance(dtype, str) and dtype.startswith(("int", "uint", "bool", "string", "large_string"))


def _labels(
    source: str, parts: Mapping[str, datasets.Dataset], part_name: str, column: str
) -> tuple[Tensor | None, int, list[str] | None]:
    """Return the labels [rows] int64 of a split, the number of classes over all splits, and their names.

    An unknown label is -1, as on the hub; a split where all are unknown has none.
    """
    values = {
        name: part.select_columns([column]).with_format("arrow")[:].column(column)
        for name, part in parts.items()
        if column in part.column_names
    }
    names = getattr(parts[part_name].features[column], "names", None)
    stored = values[part_name].type
    if names is None and (pa.types.is_string(stored) or pa.types.is_large_string(stored)):
        # Numbered over all splits together, or a class absent from one would shift the others.
        names = sorted({str(v) for part in values.values() for v in part.unique().to_pylist() if v is not None})
        values = {k: pc.index_in(v, value_set=pa.array(names, type=v.type)) for k, v in values.items()}
    numbers = {k: pc.fill_null(v.cast(pa.int64()), -1).to_numpy() for k, v in values.items()}
    labels = numbers[part_name].astype(np.int64)
    if len(labels) and labels.min() < -1:
        raise ValueError(f"column {column!r} of {source!r} holds the class {labels.min()}; classes count from 0")
    if (labels == -1).all():
        return None, 0, None
    largest = max(int(v.max()) for v in numbers.values() if len(v))
    return torch.from_numpy(labels.copy()), len(names) if names else largest + 1, names


def _row_files(source: str, builder: datasets.DatasetBuilder, part_name: str) -> tuple[list[str], list[int]]:
    """Return the local parquet files behind a split, named from the source on, and the first row of each."""
    files = [str(f) for f in (builder.config.data_files or {}).get(part_name, [])]
    if not files or not all(f.endswith(".parquet") and os.path.isfile(f) for f in files):
        return [], []
    counts = [pq.read_metadata(f).num_rows for f in files]
    root = Path(source).expanduser().resolve()
    names = [os.path.relpath(f, root if root.is_dir() else root.parent) for f in files]
    return names, np.cumsum([0, *counts[:-1]]).tolist()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and the log of `datasets`: what goes wrong comes as one line of our own."""
    import datasets

    level, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _cache_folder() -> str:
    """Return the cache of `datasets`, or a temporary folder where that one cannot be written."""
    import datasets

    folder = str(datasets.config.HF_DATASETS_CACHE)
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    temporary = _temporary_cache()
    warnings.warn(f"the cache folder {folder} cannot be written; using {temporary} until the end", stacklevel=4)
    return temporary


@functools.lru_cache(maxsize=1)
def _temporary_cache() -> str:
    """Make a folder that lasts as long as this process."""
    folder = tempfile.mkdtemp(prefix="soda-engine-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _line(error: BaseException) -> str:
    """Put an error, or the one that caused it, in one line."""
    if error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
