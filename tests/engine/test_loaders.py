"""The order of training images, resuming, sharing between processes, and unreadable images."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from soda_engine.data.datasets import ImageDataset, KeptDataset, TensorDataset
from soda_engine.data.loaders import Batch, eval_loader, permutation, train_loader


def numbered(count: int) -> TensorDataset:
    """Images whose pixel is their index, with the index's last digit as the label."""
    images = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return TensorDataset(images, torch.arange(count) % 10)


class Unreadable(ImageDataset):
    """A set of `count` images of which those in `broken` cannot be decoded."""

    def __init__(self, count: int, broken: set[int]) -> None:
        super().__init__(image_size=1, channels=1, labels=torch.arange(count), num_classes=count, class_names=None)
        self.count, self.broken, self.asked = count, broken, list[int]()

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[int], list[str]]:
        self.asked += indices
        kept = [place for place, index in enumerate(indices) if index not in self.broken]
        pixels = torch.tensor([indices[place] for place in kept], dtype=torch.uint8).reshape(-1, 1, 1, 1)
        return pixels, kept, [self.name(index) for index in indices if index in self.broken]


def take(batches: itertools.islice[Batch]) -> tuple[list[int], list[int]]:
    """The sample ids and epochs of several batches, one after another."""
    parts = list(batches)
    return [i for b in parts for i in b.sample_ids.tolist()], [e for b in parts for e in b.epochs.tolist()]


def test_each_epoch_is_a_new_permutation() -> None:
    ids, epochs = take(itertools.islice(train_loader(numbered(30), batch_size=12, seed=0), 5))
    assert epochs == [0] * 30 + [1] * 30
    assert sorted(ids[:30]) == sorted(ids[30:]) == list(range(30))
    assert ids[:30] != ids[30:] and ids[:30] != sorted(ids[:30])
    assert take(itertools.islice(train_loader(numbered(30), batch_size=12, seed=1), 5))[0] != ids


def test_the_order_is_fixed_once_and_for_all() -> None:
    # Written down when the order was first drawn: a change would make resumed runs see other images.
    assert permutation(8, 3, 1).tolist() == PERMUTATION_8_3_1
    assert permutation(8, 3, 1) is permutation(8, 3, 1)
    assert np.array_equal(permutation(8, -1, 0), permutation(8, 2**64 - 1, 0))


PERMUTATION_8_3_1 = [0, 7, 6, 1, 5, 3, 2, 4]


def test_a_batch_holds_its_images_labels_and_ids() -> None:
    for batch in itertools.islice(train_loader(numbered(7), batch_size=5, seed=0), 3):
        assert batch.images.shape == (5, 1, 1, 1) and batch.images.dtype == torch.uint8 and len(batch) == 5
        assert batch.images.flatten().tolist() == batch.sample_ids.tolist() == batch.labels.tolist()
        assert batch.sample_ids.dtype == batch.epochs.dtype == batch.labels.dtype == torch.int64
        assert batch.skipped == []


@pytest.mark.parametrize("start", [0, 12, 31, 1000], ids=lambda start: f"from-{start}")
@pytest.mark.parametrize("workers", [0, 2], ids=["here", "2-workers"])
def test_resuming_needs_the_position_alone(start: int, workers: int) -> None:
    whole = take(itertools.islice(train_loader(numbered(30), batch_size=1, seed=4), start + 24))
    loader = train_loader(numbered(30), batch_size=12, seed=4, start_image=start, workers=workers)
    ids, epochs = take(itertools.islice(loader, 2))
    assert (ids, epochs) == (whole[0][start:], whole[1][start:])


@pytest.mark.parametrize("world_size", [2, 3], ids=lambda size: f"{size}-processes")
def test_processes_share_each_batch_in_order(world_size: int) -> None:
    whole = train_loader(numbered(20), batch_size=12, seed=0, start_image=6)
    shares = [
        train_loader(numbered(20), batch_size=12, seed=0, start_image=6, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for _ in range(4):
        parts = [next(share).sample_ids for share in shares]
        assert torch.equal(torch.cat(parts), next(whole).sample_ids)


def test_loading_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    next(train_loader(numbered(4), batch_size=2, seed=0))
    next(iter(eval_loader(numbered(4), batch_size=2)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1], ids=["here", "1-worker"])
def test_evaluation_is_in_order_and_ends(workers: int) -> None:
    batches = list(eval_loader(numbered(10), batch_size=4, workers=workers))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert take(itertools.islice(batches, 3)) == (list(range(10)), [0] * 10)
    assert list(eval_loader(numbered(0), batch_size=4)) == []


@pytest.mark.parametrize("workers", [0, 1], ids=["here", "1-worker"])
def test_unreadable_images_are_left_out_and_named(workers: int) -> None:
    batches = list(eval_loader(Unreadable(6, {0, 1, 4}), batch_size=2, workers=workers))
    assert [batch.sample_ids.tolist() for batch in batches] == [[], [2, 3], [5]]
    assert [batch.labels.tolist() for batch in batches] == [[], [2, 3], [5]]
    assert [batch.skipped for batch in batches] == [["image 0", "image 1"], [], ["image 4"]]
    assert batches[0].images.shape == (0, 1, 1, 1) and len(batches[0].epochs) == 0


def test_a_kept_image_is_decoded_once_and_read_as_ever() -> None:
    decoded = Unreadable(6, {4})
    kept = KeptDataset(decoded)
    for indices in ([3, 1], [1, 5, 3, 3], [4, 0, 2, 4, 5]):
        expected, found = Unreadable(6, {4}).read(indices), kept.read(indices)
        assert torch.equal(found[0], expected[0]) and found[1:] == expected[1:]
    assert decoded.asked == [1, 3, 5, 0, 2, 4]
    assert int(kept[-1]) == 5 and len(kept) == 6 and kept.labels() is decoded.labels()
    found[0].zero_()  # what is handed out is the caller's own
    assert kept.read([5])[0].item() == 5
    kept.read([4])
    assert decoded.asked[6:] == [4]  # what could not be decoded is tried again


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="processes share memory that was there before")
def test_what_a_loader_process_decodes_is_there_for_all() -> None:
    decoded = Unreadable(8, set())
    kept = KeptDataset(decoded)
    ids = take(itertools.islice(train_loader(kept, batch_size=4, seed=0, workers=2), 2))[0]
    assert sorted(ids) == list(range(8)) and decoded.asked == []
    assert kept.read(ids)[0].flatten().tolist() == ids and decoded.asked == []


@pytest.mark.parametrize("world_size", [1, 2], ids=["alone", "2-processes"])
def test_an_epoch_without_one_readable_image_ends_the_run(world_size: int) -> None:
    loader = train_loader(Unreadable(10, set(range(10))), batch_size=4, seed=0, world_size=world_size)
    message = r"none of \d+ images in a row could be decoded, the last being image \d"
    with pytest.raises(ValueError, match=message) as caught:
        for _ in zip(range(100), loader, strict=False):
            pass
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="none of 10 images"):
        list(eval_loader(Unreadable(10, set(range(10))), batch_size=4))


def test_one_readable_image_keeps_a_run_going() -> None:
    loader = train_loader(Unreadable(10, set(range(1, 10))), batch_size=1, seed=0)
    assert take(itertools.islice(loader, 200))[0] == [0] * 20


def test_a_batch_moves_without_its_labels_too() -> None:
    dataset = TensorDataset(torch.zeros(2, 1, 1, 1, dtype=torch.uint8))
    batch = next(train_loader(dataset, batch_size=2, seed=0)).to("meta")
    assert batch.labels is None and batch.images.is_meta and batch.sample_ids.is_meta and batch.epochs.is_meta


@pytest.mark.gpu
def test_a_pinned_batch_reaches_the_gpu() -> None:
    batch = next(train_loader(numbered(8), batch_size=4, seed=0, workers=1, pin_memory=True))
    assert all(x.is_pinned() for x in (batch.images, batch.labels, batch.sample_ids, batch.epochs))
    moved = batch.to("cuda")
    assert torch.equal(moved.sample_ids.cpu(), batch.sample_ids) and moved.labels.is_cuda


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 5, "world_size": 2}, "batch_size is 5; it must be a positive multiple of world_size 2"),
        ({"rank": 1}, "rank is 1 of world_size 1"),
        ({"start_image": -1}, "start_image is -1"),
        ({"workers": -1}, "workers is -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_refused_at_once(changes: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        train_loader(numbered(4), **{"batch_size": 4, "seed": 0, **changes})


def test_an_empty_set_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="empty"):
        train_loader(numbered(0), batch_size=4, seed=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        eval_loader(numbered(4), batch_size=0)
