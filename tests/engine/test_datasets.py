"""Sources of images: what is found in them, what is skipped, and what a wrong one says."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from soda_engine.config import DatasetConfig
from soda_engine.data.datasets import KeptDataset, TensorDataset, open_dataset
from soda_engine.data.decoding import decode_image

CIFAR10 = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10"
SMALL = DatasetConfig(image_size=8, workers=0)


def png(value: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    colour = value if mode in ("L", "I;16") else (value, 255 - value, 0, 255)[: len(mode)]
    Image.new(mode, size, colour).save(buffer, "PNG", **options)
    return buffer.getvalue()


def write_parquet(path: Path, images: list[bytes | None], labels: list[Any] | None = None, column: str = "img") -> Path:
    table: dict[str, Any] = {column: [None if i is None else {"bytes": i, "path": None} for i in images]}
    if labels is not None:
        table["label"] = labels
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)
    return path


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for extension, content in sample.items():
                entry = tarfile.TarInfo(f"{number:04d}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


def greens(dataset: Any) -> list[int]:
    """The green level of each image, by which the sets here tell their images apart."""
    return [255 - int(dataset[i][1, 0, 0]) for i in range(len(dataset))]


# digits


@pytest.mark.parametrize("channels", [1, 3])
def test_digits_are_split_by_class_and_seed(channels: int) -> None:
    config = DatasetConfig(image_size=16, channels=channels)
    train, test = (open_dataset("digits", config, split, seed=1) for split in ("train", "test"))
    assert (len(train), len(test)) == (1257, 540)
    assert train[0].shape == (channels, 16, 16) and train[0].dtype == torch.uint8
    assert train.num_classes == 10 and train.class_names == [str(i) for i in range(10)]
    shares = [torch.bincount(part.labels()) / len(part) for part in (train, test)]
    torch.testing.assert_close(*shares, atol=0.003, rtol=0)
    same, other = (open_dataset("digits", config, "train", seed=seed) for seed in (1, 2))
    assert torch.equal(train.labels(), same.labels()) and not torch.equal(train.labels(), other.labels())


def test_digits_fill_the_grey_scale_and_share_no_image() -> None:
    parts = [
        open_dataset("digits", DatasetConfig(image_size=8, channels=1), s).read(range(540))[0]
        for s in ("train", "test")
    ]
    assert parts[0].min() == 0 and parts[0].max() == 255
    # 16 levels and more make an accidental double unlikely; scikit-learn's set has none.
    assert not set(map(bytes, parts[0].flatten(1).numpy())) & set(map(bytes, parts[1].flatten(1).numpy()))


# parquet


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="the CIFAR-10 files are not beside the repository")
def test_cifar10_labels_and_pixels_are_those_of_the_file() -> None:
    dataset = open_dataset(str(CIFAR10), DatasetConfig(), "test")
    assert len(dataset) == 10_000 and dataset.num_classes == 10 and dataset.class_names[3] == "cat"
    table = pq.read_table(CIFAR10 / "test.parquet")
    assert dataset.labels().tolist() == table["label"].to_pylist()
    expected = np.asarray(Image.open(io.BytesIO(table["img"][17]["bytes"].as_py())).convert("RGB"))
    assert np.array_equal(dataset[17].permute(1, 2, 0), expected)
    assert dataset.name(17) == "test.parquet row 17"


@pytest.mark.parametrize(("memory_mib", "kept"), [(1, True), (0, False)])
def test_images_are_kept_in_memory_where_all_of_them_fit(tmp_path: Path, memory_mib: int, kept: bool) -> None:
    file = write_parquet(tmp_path / "all.parquet", [png(i) for i in range(20)])
    config = dataclasses.replace(SMALL, image_size=128, memory_mib=memory_mib)
    assert isinstance(open_dataset(str(file), config, "train"), KeptDataset) is kept
    larger = open_dataset(str(file), dataclasses.replace(config, image_size=144), "train")
    assert not isinstance(larger, KeptDataset)  # 18 images of 144x144 take 1.07 MiB


def test_parquet_folder_names_rows_by_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [png(0), png(1)], [0, 1])
    write_parquet(tmp_path / "train-1.parquet", [png(2), b"junk"], [0, 1])
    write_parquet(tmp_path / "test.parquet", [png(9)], [1])
    train = open_dataset(str(tmp_path), SMALL, "train")
    images, kept, skipped = train.read([3, 2, 0])
    assert (255 - images[:, 1, 0, 0]).tolist() == [2, 0] and kept == [1, 2] and skipped == ["train-1.parquet row 1"]
    assert greens(open_dataset(str(tmp_path), SMALL, "test")) == [9]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test.parquet", "train-0.parquet", "train-1.parquet"]


def test_a_source_without_a_test_split_holds_out_a_tenth(tmp_path: Path) -> None:
    file = str(write_parquet(tmp_path / "all.parquet", [png(i) for i in range(30)], list(range(30))))
    train, test = (open_dataset(file, SMALL, split, seed=5) for split in ("train", "test"))
    assert (len(train), len(test)) == (27, 3)
    assert sorted(greens(train) + greens(test)) == list(range(30))
    assert greens(train) == train.labels().tolist() and train.num_classes == test.num_classes == 30
    assert greens(open_dataset(file, SMALL, "test", seed=6)) != greens(test)
    assert test.name(0) == f"all.parquet row {greens(test)[0]}"


def test_a_validation_split_stands_in_for_a_missing_test_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [png(0)])
    write_parquet(tmp_path / "validation.parquet", [png(7)])
    assert greens(open_dataset(str(tmp_path), SMALL, "test")) == [7]


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train.parquet", [png(i) for i in range(4)], [0] * 4)
    open_dataset(str(file), SMALL, "train")
    write_parquet(file, [png(i) for i in range(10, 16)], [0] * 6)
    parts = [open_dataset(str(file), SMALL, split) for split in ("train", "test")]
    assert sorted(greens(parts[0]) + greens(parts[1])) == list(range(10, 16))


def test_an_unwritable_cache_is_replaced_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()  # no folder can be made below a file, not even by root
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    write_parquet(tmp_path / "data" / "train.parquet", [png(0), png(1)])
    with pytest.warns(UserWarning, match="cannot be written"):
        assert len(open_dataset(str(tmp_path / "data"), SMALL, "train")) == 1


def test_progress_bars_are_as_they_were() -> None:
    before = datasets.is_progress_bar_enabled()
    with pytest.raises(FileNotFoundError):
        open_dataset("nobody/nothing", SMALL, "train")
    assert datasets.is_progress_bar_enabled() == before


# labels


def test_string_labels_are_numbered_over_all_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [png()] * 3, ["owl", "cat", "owl"])
    write_parquet(tmp_path / "test.parquet", [png()] * 2, ["owl", "dog"])
    train, test = (open_dataset(str(tmp_path), SMALL, split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ["cat", "dog", "owl"]
    assert train.labels().tolist() == [2, 0, 2] and test.labels().tolist() == [2, 1]


@pytest.mark.parametrize(
    ("labels", "expected"), [(None, None), ([-1, -1], None), ([None, 3], [-1, 3]), ([0.5, 1.5], None)]
)
def test_labels_that_are_missing(tmp_path: Path, labels: list[Any] | None, expected: list[int] | None) -> None:
    write_parquet(tmp_path / "train.parquet", [png()] * 2, labels)
    write_parquet(tmp_path / "test.parquet", [png()] * 2, labels)
    found = open_dataset(str(tmp_path), SMALL, "train").labels()
    assert (None if found is None else found.tolist()) == expected


# folders of images, tars


def test_imagefolder_counts_and_names_broken_files(tmp_path: Path) -> None:
    for number, kind in enumerate(["cat", "dog"]):
        for split in ("train", "test"):
            (tmp_path / split / kind).mkdir(parents=True)
            (tmp_path / split / kind / "0.png").write_bytes(png(number))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        tmp_path / "train" / "dog" / "cut.jpg"
    )
    whole = (tmp_path / "train" / "dog" / "cut.jpg").read_bytes()
    (tmp_path / "train" / "dog" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train" / "dog" / "empty.png").touch()
    train = open_dataset(str(tmp_path), SMALL, "train")
    assert train.class_names == ["cat", "dog"] and train.labels().tolist() == [0, 1, 1, 1]
    images, kept, skipped = train.read(range(4))
    assert kept == [0, 1] and (255 - images[:, 1, 0, 0]).tolist() == [0, 1]
    assert [Path(name).name for name in skipped] == ["cut.jpg", "empty.png"]
    assert all(Path(name).is_file() for name in skipped)
    with pytest.raises(ValueError, match="cut.jpg cannot be decoded"):
        train[2]


def test_webdataset_shards(tmp_path: Path) -> None:
    for shard in range(2):
        samples = [{"png": png(10 * shard + i), "cls": str(i).encode()} for i in range(3)]
        samples[1]["png"] = b"junk"
        write_tar(tmp_path / f"train-{shard}.tar", samples)
    write_tar(tmp_path / "test-0.tar", [{"png": png(99), "cls": b"1"}])
    train, test = (open_dataset(str(tmp_path), SMALL, split) for split in ("train", "test"))
    assert train.labels().tolist() == [0, 1, 2, 0, 1, 2] and train.num_classes == test.num_classes == 3
    images, _, skipped = train.read(range(6))
    assert (255 - images[:, 1, 0, 0]).tolist() == [0, 2, 10, 12]
    assert skipped == ["train-0.tar sample 0001", "train-1.tar sample 0001"]
    assert greens(test) == [99]
    single = open_dataset(str(tmp_path / "train-1.tar"), SMALL, "train")
    assert len(single) == 2


# errors


def sources(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "void").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.xyz").write_text("x")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    whole = write_tar(tmp_path / "cut.tar", [{"png": png(), "cls": b"0"}] * 1).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    write_parquet(tmp_path / "none.parquet", [])
    write_parquet(tmp_path / "one.parquet", [png()])
    write_parquet(tmp_path / "two" / "train.parquet", [png()] * 2, [0, -2])
    write_parquet(tmp_path / "two" / "test.parquet", [png()] * 2, [0, 1])
    pq.write_table(pa.table({"left": [png()] * 2, "right": [png()] * 2, "n": [1, 2]}), tmp_path / "unnamed.parquet")
    return {path.name: path for path in tmp_path.iterdir()} | {"notes.xyz": tmp_path / "text" / "notes.xyz"}


@pytest.mark.parametrize(
    ("name", "changes", "error", "match"),
    [
        ("void", {}, ValueError, "doesn't contain any data files.*must be a folder of parquet"),
        ("text", {}, ValueError, "must be a folder of parquet"),
        ("notes.xyz", {}, ValueError, r"is a file; it must be a folder or one of \.parquet, \.tar"),
        ("broken.parquet", {}, ValueError, "cannot be read"),
        ("cut.tar", {}, ValueError, "cannot be read: ReadError"),
        ("none.parquet", {}, ValueError, "empty"),
        ("one.parquet", {}, ValueError, "at least two"),
        (
            "unnamed.parquet",
            {},
            ValueError,
            r"no image column among \['left', 'n', 'right'\]: set dataset.image_column",
        ),
        (
            "two",
            {"image_column": "x"},
            ValueError,
            r"no column 'x'; it has \['img', 'label'\]: set dataset.image_column",
        ),
        ("two", {"image_column": "label"}, ValueError, "column 'label' .* must be image files"),
        ("two", {"label_column": "y"}, ValueError, r"no column 'y'; it has .* set dataset.label_column"),
        ("two", {"label_column": "img"}, ValueError, "labels must be class labels, integers or strings"),
        ("two", {"train_split": "big"}, ValueError, r"no split 'big'; it has \['test', 'train'\]"),
        ("two", {"test_split": "big"}, ValueError, r"no split 'big'; it has \['test', 'train'\]"),
        ("two", {"label_column": "label"}, ValueError, "class -2; classes count from 0"),
        ("two", {"image_size": 0}, ValueError, "image_size is 0"),
        ("two", {"memory_mib": -1}, ValueError, "memory_mib is -1"),
        ("absent.parquet", {}, FileNotFoundError, "does not exist; name a folder"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str | dict) else None,
)
def test_a_wrong_source_says_so_in_one_line(
    tmp_path: Path, name: str, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    path = sources(tmp_path).get(name, tmp_path / name)
    with pytest.raises(error, match=match) as caught:
        open_dataset(str(path), DatasetConfig(**{"image_size": 8, **changes}), "train")
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_name_says_so_in_one_line() -> None:
    with pytest.raises(FileNotFoundError, match="nobody/nothing.*hub did not provide it") as caught:
        open_dataset("nobody/nothing", SMALL, "train")
    assert "\n" not in str(caught.value)


def test_a_column_of_plain_bytes_is_read_when_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"left": [png(3)], "right": [png(4)]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"left": [png(5)], "right": [png(6)]}), tmp_path / "test.parquet")
    assert greens(open_dataset(str(tmp_path), DatasetConfig(image_size=8, image_column="right"), "train")) == [4]


def test_a_missing_image_is_skipped(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [png(0), None])
    write_parquet(tmp_path / "test.parquet", [png(0)])
    train = open_dataset(str(tmp_path), SMALL, "train")
    assert train.read([0, 1])[1:] == ([0], ["train.parquet row 1"])
    images, kept, skipped = train.read([1])
    assert images.shape == (0, 3, 8, 8) and images.dtype == torch.uint8 and not kept and len(skipped) == 1


# decoding


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GREY = np.full((8, 8), 100, dtype=np.uint8)
COLOUR = Image.new("RGB", (8, 8), (200, 100, 50))


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (encoded(Image.fromarray(GREY)), (100, 100, 100)),
        (encoded(Image.fromarray(GREY.astype(np.uint16) * 257)), (100, 100, 100)),
        (encoded(Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"), (100, 100, 100)),
        (encoded(Image.fromarray(GREY > 50)), (255, 255, 255)),
        (encoded(COLOUR.convert("P", palette=Image.Palette.ADAPTIVE)), (200, 100, 50)),
        (encoded(COLOUR.convert("RGBA")), (200, 100, 50)),
        (encoded(Image.new("RGBA", (8, 8), (200, 100, 50, 0))), (255, 255, 255)),
        (encoded(Image.new("LA", (8, 8), (0, 128))), (127, 127, 127)),
        (encoded(COLOUR.convert("CMYK"), "TIFF"), (200, 100, 50)),
    ],
    ids=["grey", "grey-16", "grey-32", "two-level", "palette", "rgba", "transparent", "grey-alpha", "cmyk"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_modes_convert(file: bytes, expected: tuple[int, int, int], channels: int) -> None:
    pixels = decode_image(file, 8, channels)
    if channels == 1:
        expected = (round(0.299 * expected[0] + 0.587 * expected[1] + 0.114 * expected[2]),)  # type: ignore[assignment]
    assert pixels.shape == (channels, 8, 8) and pixels.dtype == torch.uint8
    torch.testing.assert_close(pixels[:, 0, 0].int(), torch.tensor(expected, dtype=torch.int32), atol=1, rtol=0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_respected(kind: str) -> None:
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:32] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise: bright on the right
    shown = decode_image(encoded(Image.fromarray(pixels), kind, exif=exif), 32, 1)[0].float()
    assert shown[:, 20:].mean() > 250 and shown[:, :12].mean() < 5


@pytest.mark.parametrize(("width", "height"), [(20, 8), (8, 20), (800, 320)], ids=["20x8", "8x20", "800x320"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_centre_square_is_kept(width: int, height: int, kind: str) -> None:
    side = min(width, height)
    pixels = np.zeros((height, width), dtype=np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = 200
    shown = decode_image(encoded(Image.fromarray(pixels), kind), 8, 1)
    assert (shown[:, 1:-1, 1:-1].int() - 200).abs().max() <= 4
    assert shown.min() > 170  # the resize looks past the edge by a fraction of a pixel


def test_shrinking_is_antialiased() -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    assert (decode_image(encoded(Image.fromarray(stripes)), 16, 1).int() - 127).abs().max() < 30


# tensors


def test_tensor_dataset() -> None:
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1)
    dataset = TensorDataset(images, torch.tensor([0, 2, 1]), name="mine")
    assert dataset.num_classes == 3 and dataset.name(2) == "mine image 2" and int(dataset[-1]) == 2
    assert dataset.read([2, 0])[0].flatten().tolist() == [2, 0]
    with pytest.raises(IndexError, match="index is 3"):
        dataset[3]


@pytest.mark.parametrize(
    ("images", "labels", "match"),
    [
        (torch.zeros(2, 1, 4, 4), None, "images is torch.float32"),
        (torch.zeros(2, 1, 4, 5, dtype=torch.uint8), None, r"\(2, 1, 4, 5\)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "labels is"),
    ],
    ids=["float", "oblong", "labels-3"],
)
def test_tensor_dataset_refuses(images: torch.Tensor, labels: torch.Tensor | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TensorDataset(images, labels)
