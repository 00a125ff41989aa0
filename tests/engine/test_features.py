"""Encoding a data set, and the files that keep its features."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from soda_engine.data.datasets import TensorDataset
from soda_engine.evaluation.features import (
    Features,
    encode_dataset,
    load_features,
    pixel_features,
    save_features,
)

SUFFIXES = [".npz", ".safetensors"]


class Broken(TensorDataset):
    """A set whose odd images cannot be read."""

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[int], list[str]]:
        kept = [place for place, index in enumerate(indices) if index % 2 == 0]
        images, _, _ = super().read([indices[place] for place in kept])
        return images, kept, [self.name(index) for index in indices if index % 2]


class MeanEncoder(nn.Module):
    """A model whose z is the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def encode(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3)) * self.scale


def images(count: int, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, channels, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def features(labels: bool = True, skipped: tuple[str, ...] = ()) -> Features:
    z = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    known = np.array([2, 0, 1, -1, 0]) if labels else None
    return Features(z=z, labels=known, sample_ids=np.array([0, 1, 2, 4, 7]), skipped=skipped)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_encode_keeps_order_and_labels_whatever_the_batch(batch_size: int) -> None:
    pixels, labels = images(7), torch.arange(7) % 3
    found = encode_dataset(MeanEncoder(), TensorDataset(pixels, labels), batch_size=batch_size)
    np.testing.assert_array_equal(found.z, pixels.float().mean((2, 3)).numpy())
    np.testing.assert_array_equal(found.labels, labels.numpy())
    np.testing.assert_array_equal(found.sample_ids, np.arange(7))
    assert found.z.dtype == np.float32 and found.skipped == ()


def test_encode_counts_skipped_images_and_keeps_rows_aligned() -> None:
    pixels, labels = images(6), torch.arange(6) % 3
    found = encode_dataset(MeanEncoder(), Broken(pixels, labels, name="set"), batch_size=4)
    np.testing.assert_array_equal(found.sample_ids, [0, 2, 4])
    np.testing.assert_array_equal(found.labels, labels[[0, 2, 4]].numpy())
    np.testing.assert_array_equal(found.z, pixels[[0, 2, 4]].float().mean((2, 3)).numpy())
    assert found.skipped == ("set image 1", "set image 3", "set image 5")


def test_encode_without_labels() -> None:
    assert encode_dataset(MeanEncoder(), TensorDataset(images(3))).labels is None


def test_encode_of_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="no readable image"):
        encode_dataset(MeanEncoder(), TensorDataset(images(0)))


@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_features_are_the_flat_image(channels: int) -> None:
    pixels = images(4, channels)
    found = pixel_features(TensorDataset(pixels), batch_size=3)
    np.testing.assert_array_equal(np.rint((found.z + 1) * 127.5), pixels.reshape(4, -1).numpy())
    assert found.z.min() >= -1 and found.z.max() <= 1


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no_labels"])
@pytest.mark.parametrize("skipped", [(), ("a.png", "ü, b.png")], ids=["all_read", "two_skipped"])
def test_file_round_trip(tmp_path: Path, suffix: str, labels: bool, skipped: tuple[str, ...]) -> None:
    saved = features(labels, skipped)
    path = save_features(saved, tmp_path / "new" / f"z{suffix}")
    loaded = load_features(path)
    np.testing.assert_array_equal(loaded.z, saved.z)
    np.testing.assert_array_equal(loaded.sample_ids, saved.sample_ids)
    assert (loaded.labels is None) == (saved.labels is None) and loaded.skipped == skipped
    if saved.labels is not None and loaded.labels is not None:
        np.testing.assert_array_equal(loaded.labels, saved.labels)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_features(features(), tmp_path / f"z{suffix}")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("soda_engine.evaluation.features.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_features(features(labels=False), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["z.pt", "z.npy", "z"])
def test_wrong_suffix_is_one_line(tmp_path: Path, name: str) -> None:
    for attempt in (lambda: save_features(features(), tmp_path / name), lambda: load_features(tmp_path / name)):
        with pytest.raises(ValueError, match=r"must end in \.npz or \.safetensors") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class Trap:
    """Unpickling one of these raises."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pickles_are_refused(tmp_path: Path, suffix: str) -> None:
    raw = tmp_path / f"raw{suffix}"
    raw.write_bytes(pickle.dumps(Trap()))
    objects = io.BytesIO()
    np.save(objects, np.array([Trap()], dtype=object), allow_pickle=True)
    inside = tmp_path / f"inside{suffix}"
    with zipfile.ZipFile(inside, "w") as archive:
        archive.writestr("z.npy", objects.getvalue())
    for path in (raw, inside):
        with pytest.raises(ValueError, match="cannot be read"):
            load_features(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = save_features(features(), tmp_path / f"z{suffix}")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot be read"):
        load_features(path)


def test_file_of_something_else_names_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(ValueError, match="no array 'z'"):
        load_features(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_features(tmp_path / "absent.npz")


def test_columns_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="labels has shape"):
        Features(z=np.zeros((3, 2), np.float32), labels=np.zeros(2, np.int64), sample_ids=np.arange(3))
