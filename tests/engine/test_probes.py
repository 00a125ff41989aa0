"""The three probes: what they find on features with a known answer, and what they refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from soda_engine.evaluation.features import Features
from soda_engine.evaluation.probes import (
    HELD_OUT_SHARE,
    _hold_out,
    compare_probes,
    format_table,
    knn_probe,
    linear_probe,
    logistic_probe,
)

PROBES = [logistic_probe, linear_probe, knn_probe]


def labelled(z: np.ndarray, labels: np.ndarray | list[int] | None) -> Features:
    known = None if labels is None else np.asarray(labels, np.int64)
    return Features(z=z.astype(np.float32), labels=known, sample_ids=np.arange(len(z)))


def clusters(count: int, *, spread: float, seed: int, dim: int = 8, names: tuple[int, ...] = (3, 5, 40)) -> Features:
    """Gaussian clusters of one class each, with labels that are not 0, 1, 2."""
    centres = np.random.default_rng(0).normal(size=(len(names), dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(names), count)
    return labelled(centres[labels] + spread * rng.normal(size=(count, dim)), np.array(names)[labels])


@pytest.mark.parametrize("probe", PROBES)
def test_separable_clusters_are_found_and_noise_is_not(probe: Callable[..., Any]) -> None:
    train, test = clusters(300, spread=0.1, seed=1), clusters(150, spread=0.1, seed=2)
    assert probe(train, test).accuracy == 1.0
    rng = np.random.default_rng(3)
    noise = dataclasses.replace(train, z=rng.normal(size=train.z.shape).astype(np.float32))
    assert probe(noise, dataclasses.replace(test, z=test.z[rng.permutation(150)])).accuracy < 0.6


@pytest.mark.parametrize("probe", PROBES)
def test_same_seed_same_result_whatever_the_global_state(probe: Callable[..., Any]) -> None:
    train, test = clusters(200, spread=1.5, seed=1), clusters(100, spread=1.5, seed=2)
    first = probe(train, test)
    torch.manual_seed(99)
    np.random.seed(99)
    assert probe(train, test) == first and first.accuracy < 1


@pytest.mark.parametrize("probe", [logistic_probe, linear_probe])
def test_scale_and_offset_of_a_feature_do_not_matter(probe: Callable[..., Any]) -> None:
    train, test = clusters(300, spread=0.1, seed=1), clusters(150, spread=0.1, seed=2)
    scale = np.array([1e-3, 1, 1e3, 1, 1, 1, 1, 1], np.float32)
    shifted = [dataclasses.replace(part, z=part.z * scale + 10 * scale) for part in (train, test)]
    assert probe(*shifted).accuracy == 1.0


@pytest.mark.parametrize("probe", PROBES)
def test_unknown_labels_are_left_out(probe: Callable[..., Any]) -> None:
    train, test = clusters(200, spread=1.5, seed=1), clusters(100, spread=1.5, seed=2)
    expected = probe(train, test)
    wild = np.full((7, 8), 50.0)
    padded = [
        labelled(np.concatenate([part.z, wild]), np.concatenate([part.labels, np.full(7, -1)]))
        for part in (train, test)
        if part.labels is not None
    ]
    assert probe(*padded) == expected


def test_logistic_chooses_the_penalty_and_converges() -> None:
    train, test = clusters(400, spread=2.0, seed=1, dim=60), clusters(400, spread=2.0, seed=2, dim=60)
    result = logistic_probe(train, test)
    scores = result.held_out_accuracies
    assert scores[result.inverse_penalty] == max(scores.values()) and len(scores) == 5
    assert result.inverse_penalty == min(c for c in scores if scores[c] == max(scores.values()))
    assert result.converged and result.iterations < 1000
    assert not logistic_probe(train, test, inverse_penalties=(100.0,), max_iterations=2).converged


def test_linear_matches_one_sgd_for_each_rate() -> None:
    train, test = clusters(120, spread=1.0, seed=1), clusters(60, spread=1.0, seed=2)
    rates = (0.01, 0.3, 2.0)
    together = linear_probe(train, test, lrs=rates, epochs=5, batch_size=32)
    for rate in rates:
        alone = linear_probe(train, test, lrs=(rate,), epochs=5, batch_size=32)
        assert alone.held_out_accuracies[rate] == together.held_out_accuracies[rate]
    assert together.lr in rates


def test_linear_updates_are_those_of_torch_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = clusters(90, spread=1.0, seed=1), clusters(60, spread=1.0, seed=2)
    found: list[torch.Tensor] = []
    accuracies = "soda_engine.evaluation.probes._linear_accuracies"

    def keep(norm: object, weight: torch.Tensor, *_: object) -> list[float]:
        found.append(weight.detach().clone())
        return [0.0] * len(weight)

    monkeypatch.setattr(accuracies, keep)
    linear_probe(train, test, lrs=(0.05, 0.5), epochs=4, batch_size=1000)
    assert train.labels is not None
    classes = np.searchsorted([3, 5, 40], train.labels)
    rows, _ = _hold_out(classes, seed=0)
    z, targets = torch.from_numpy(train.z[rows]), torch.from_numpy(classes[rows])
    z = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
    for index, rate in enumerate((0.05, 0.5)):
        layer = torch.nn.Linear(8, 3)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
        for _ in range(4):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(z), targets).backward()
            optimizer.step()
            scheduler.step()
        torch.testing.assert_close(found[0][index].T, layer.weight.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [(40, 40), (95, 5), (30, 2, 1)], ids=["even", "rare", "a_single_image"])
def test_held_out_part_is_stratified(counts: tuple[int, ...]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    fitted, held_out = _hold_out(labels, seed=0)
    assert sorted([*fitted, *held_out]) == list(range(len(labels)))
    assert set(labels[fitted]) == set(labels)
    divisible = sum(count for count in counts if count > 1)
    assert len(held_out) == max(round(HELD_OUT_SHARE * divisible), sum(count > 1 for count in counts))
    for label, count in enumerate(counts):
        expected = len(held_out) * count / divisible if count > 1 else 0
        assert abs((labels[held_out] == label).sum() - expected) < 1


def test_knn_votes_by_similarity_and_temperature() -> None:
    # One neighbour in the query's direction and two 60 degrees off: the near one wins while votes fade fast.
    train = labelled(np.array([[2.0, 0.0], [0.5, 3**0.5 / 2], [0.5, -(3**0.5) / 2]]), [7, 9, 9])
    test = labelled(np.array([[5.0, 0.0]]), [7])
    assert knn_probe(train, test, k=3, temperature=0.07).accuracy == 1
    assert knn_probe(train, test, k=3, temperature=10.0).accuracy == 0
    assert knn_probe(train, test, k=1, temperature=10.0).accuracy == 1
    assert knn_probe(train, test, k=3, temperature=1e-4).accuracy == 1


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_knn_agrees_with_scikit_learn(chunk_size: int) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    train, test = clusters(200, spread=1.5, seed=1), clusters(50, spread=1.5, seed=2)
    reference = KNeighborsClassifier(11, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = reference.fit(train.z, train.labels).score(test.z, test.labels)
    assert knn_probe(train, test, k=11, chunk_size=chunk_size).accuracy == pytest.approx(expected)


GOOD = clusters(60, spread=1.0, seed=1)


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (dataclasses.replace(GOOD, labels=None), GOOD, "train features have no labels"),
        (GOOD, dataclasses.replace(GOOD, labels=np.full(60, -1)), "test features have no labels"),
        (dataclasses.replace(GOOD, labels=np.full(60, 3)), GOOD, "one class, 3"),
        (GOOD, dataclasses.replace(GOOD, labels=np.full(60, 8)), "1 classes that train lacks, such as 8"),
        (GOOD, dataclasses.replace(GOOD, z=np.full_like(GOOD.z, np.nan)), "test features have NaN .* 60 of 60 rows"),
        (GOOD, dataclasses.replace(GOOD, z=GOOD.z[:, :5].copy()), "8 dims and test 5"),
    ],
    ids=["no_labels", "all_unknown", "one_class", "unseen", "nan", "dims"],
)
def test_bad_features_are_one_line(probe: Callable[..., Any], train: Features, test: Features, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        probe(train, test)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("probe", "options"),
    [
        (knn_probe, {"k": 61}),
        (knn_probe, {"k": 0}),
        (knn_probe, {"temperature": 0.0}),
        (linear_probe, {"lrs": ()}),
        (linear_probe, {"epochs": 0}),
        (logistic_probe, {"inverse_penalties": (0.0,)}),
    ],
)
def test_bad_options_are_named(probe: Callable[..., Any], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        probe(GOOD, GOOD, **options)


def test_comparison_is_a_row_a_representation() -> None:
    sharp = (clusters(200, spread=0.1, seed=1), clusters(50, spread=0.1, seed=2))
    blurred = (clusters(200, spread=4.0, seed=1), clusters(50, spread=4.0, seed=2))
    table = compare_probes({"z": sharp, "pixels": blurred})
    assert list(table) == ["linear_probe", "knn"]
    assert all(row["z"] == 1.0 > row["pixels"] for row in table.values())
    lines = format_table(table).splitlines()
    assert lines[0].split() == ["linear_probe", "knn"] and lines[1].split() == ["z", "100.00%", "100.00%"]
    assert len({len(line) for line in lines}) == 1
