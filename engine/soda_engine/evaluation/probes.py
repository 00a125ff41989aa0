"""How much of the labels a representation holds: a logistic, a linear and a nearest-neighbour probe of frozen features.

Whatever a probe has to choose it chooses on a stratified tenth held out from train; test is looked at once. With the
same features and the same seed a probe gives the same answer. Images whose label is unknown (−1) are left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from tqdm import trange

from soda_engine.evaluation.features import Features
from soda_engine.tables import table

# scikit-learn takes a second to import, which a command that probes nothing need not wait for.
if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

HELD_OUT_SHARE = 0.1
INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
LEARNING_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
MAX_SEARCH_IMAGES = 10_000
"""Images that the choice of the logistic probe's penalty is made on, at most: what matters at 10,000 does at 50,000."""


@dataclass(frozen=True, kw_only=True)
class LogisticResult:
    """What `logistic_probe` found."""

    accuracy: float
    """Share of test that is right."""
    inverse_penalty: float
    """The chosen C."""
    held_out_accuracies: dict[float, float]
    """Accuracy on the held-out part of train for each C."""
    iterations: int
    converged: bool
    """Whether the last fit met its tolerance before `max_iterations`."""


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """What `linear_probe` found."""

    accuracy: float
    """Share of test that is right."""
    lr: float
    """The chosen learning rate."""
    held_out_accuracies: dict[float, float]
    """Accuracy on the held-out part of train for each learning rate."""


@dataclass(frozen=True, kw_only=True)
class KnnResult:
    """What `knn_probe` found."""

    accuracy: float
    """Share of test that is right."""
    k: int
    temperature: float


class _Task(NamedTuple):
    """A checked pair of feature sets, with labels renumbered to 0 … num_classes − 1."""

    train_z: npt.NDArray[np.float32]
    train_labels: npt.NDArray[np.int64]
    test_z: npt.NDArray[np.float32]
    test_labels: npt.NDArray[np.int64]
    num_classes: int


def logistic_probe(
    train: Features,
    test: Features,
    *,
    inverse_penalties: tuple[float, ...] = INVERSE_PENALTIES,
    max_iterations: int = 1000,
    seed: int = 0,
) -> LogisticResult:
    """Fit scikit-learn's multinomial logistic regression (L-BFGS) to standardised features.

    C is the one of `inverse_penalties` that is best on a held-out tenth of (at most 10,000 images of) train, the
    smallest among equals; the model that is tested is then fitted to all of train.

    Args:
        train: labelled features, at least two classes.
        test: labelled features of the same dims; every class must occur in train.
        inverse_penalties: the values of C that are tried; one alone is used as it is.
        max_iterations: where L-BFGS stops if it has not converged; `converged` tells.
        seed: draws the held-out part.

    Raises:
        ValueError: labels, classes, dims or values are not as said above.
    """
    from sklearn.preprocessing import StandardScaler

    task = _check_task(train, test)
    if not inverse_penalties or min(inverse_penalties) <= 0:
        raise ValueError(f"inverse_penalties is {inverse_penalties}; it must hold at least one value, each above 0")
    scores: dict[float, float] = {}
    if len(inverse_penalties) > 1:
        rows = np.arange(len(task.train_labels))
        if len(rows) > MAX_SEARCH_IMAGES:
            rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_SEARCH_IMAGES, replace=False))
        fit_rows, held_out = (rows[part] for part in _hold_out(task.train_labels[rows], seed))
        scaler = StandardScaler().fit(task.train_z[fit_rows])
        fit_z, held_out_z = scaler.transform(task.train_z[fit_rows]), scaler.transform(task.train_z[held_out])
        for inverse_penalty in sorted(inverse_penalties):
            model, _ = _fit_logistic(fit_z, task.train_labels[fit_rows], inverse_penalty, max_iterations)
            scores[inverse_penalty] = float(model.score(held_out_z, task.train_labels[held_out]))
    chosen = max(scores, key=lambda c: scores[c]) if scores else inverse_penalties[0]
    scaler = StandardScaler().fit(task.train_z)
    model, converged = _fit_logistic(scaler.transform(task.train_z), task.train_labels, chosen, max_iterations)
    return LogisticResult(
        accuracy=float(model.score(scaler.transform(task.test_z), task.test_labels)),
        inverse_penalty=chosen,
        held_out_accuracies=scores,
        iterations=int(model.n_iter_[0]),
        converged=converged,
    )


def linear_probe(
    train: Features,
    test: Features,
    *,
    lrs: tuple[float, ...] = LEARNING_RATES,
    epochs: int = 50,
    batch_size: int = 512,
    momentum: float = 0.9,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> LinearResult:
    """Train a batch norm without parameters and a linear layer by SGD, for every learning rate at once.

    The layers of all rates are one weight [rates, d, classes], trained on the same batches; the rate falls along a
    half cosine to 0, without weight decay. The rate that is best on a held-out tenth of train, the smallest among
    equals, is tested with the weights it has: nothing is refitted.

    Args:
        train: labelled features, at least two classes.
        test: labelled features of the same dims; every class must occur in train.
        lrs: learning rates at the start.
        epochs: passes over train less the held-out part.
        batch_size: images a step; a last batch that is not full is left out of its epoch.
        momentum: SGD's.
        seed: draws the held-out part and the order of the images.
        device: where to train.
        progress: show a bar.

    Raises:
        ValueError: labels, classes, dims or values are not as said above.
    """
    task = _check_task(train, test)
    if not lrs or min(lrs) <= 0:
        raise ValueError(f"lrs is {lrs}; it must hold at least one rate, each above 0")
    if epochs < 1 or batch_size < 2:
        raise ValueError(f"epochs is {epochs} and batch_size {batch_size}; they must be at least 1 and 2")
    fit_rows, held_out = _hold_out(task.train_labels, seed)
    z = torch.from_numpy(task.train_z).to(device)
    labels = torch.from_numpy(task.train_labels).to(device)
    dim, size = z.shape[1], min(batch_size, len(fit_rows))
    steps = epochs * (len(fit_rows) // size)
    norm = nn.BatchNorm1d(dim, affine=False).to(device)
    weight = torch.zeros(len(lrs), dim, task.num_classes, device=device, requires_grad=True)
    bias = torch.zeros(len(lrs), 1, task.num_classes, device=device, requires_grad=True)
    # A rate's loss is multiplied by the rate and SGD's own is 1: the same updates as a rate each, since SGD with
    # momentum is linear in the gradient.
    rates = torch.tensor(lrs, device=device)
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=momentum)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.from_numpy(fit_rows)
    for _ in trange(epochs, unit="epoch", desc="linear probe", disable=not progress):
        order = rows[torch.randperm(len(rows), generator=generator)].to(device)
        for batch in order[: len(order) // size * size].split(size):
            logits = norm(z[batch]) @ weight + bias  # [rates, N, classes]
            targets = labels[batch].expand(len(lrs), -1)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            optimizer.zero_grad(set_to_none=True)
            (losses.view(len(lrs), -1).mean(1) * rates).sum().backward()
            optimizer.step()
            scheduler.step()
    norm.eval()
    held_out_z, held_out_labels = z[torch.from_numpy(held_out).to(device)], task.train_labels[held_out]
    scores = _linear_accuracies(norm, weight, bias, held_out_z, held_out_labels)
    chosen = max(sorted(range(len(lrs)), key=lambda i: lrs[i]), key=lambda i: scores[i])
    test_z = torch.from_numpy(task.test_z).to(device)
    [accuracy] = _linear_accuracies(norm, weight[chosen, None], bias[chosen, None], test_z, task.test_labels)
    return LinearResult(accuracy=accuracy, lr=lrs[chosen], held_out_accuracies=dict(zip(lrs, scores, strict=True)))


@torch.inference_mode()
def knn_probe(
    train: Features,
    test: Features,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 512,
    device: str | torch.device = "cpu",
) -> KnnResult:
    """Classify each test image by a vote of the k train images of largest cosine similarity s.

    A neighbour's vote weighs exp(s / temperature).

    Args:
        train: labelled features, at least two classes and k images.
        test: labelled features of the same dims; every class must occur in train.
        k: neighbours that vote.
        temperature: how fast a vote fades with distance.
        chunk_size: test images at a time; memory holds chunk_size * len(train) similarities.
        device: where to compute.

    Raises:
        ValueError: labels, classes, dims or values are not as said above.

    Reference: Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination", section 3.4.
    """
    task = _check_task(train, test)
    if not 1 <= k <= len(task.train_z):
        raise ValueError(f"k is {k}; it must be between 1 and the number of labelled train images, {len(task.train_z)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    bank = F.normalize(torch.from_numpy(task.train_z).to(device), dim=1)
    votes_of = F.one_hot(torch.from_numpy(task.train_labels), task.num_classes).float().to(device)
    predictions = []
    for chunk in torch.from_numpy(task.test_z).split(chunk_size):
        similarity, neighbours = (F.normalize(chunk.to(device), dim=1) @ bank.T).topk(k, dim=1)  # [N, k]
        # Softmax only scales the votes of a row by one factor, and cannot overflow.
        weights = torch.softmax(similarity / temperature, dim=1)
        predictions.append(torch.einsum("nk,nkc->nc", weights, votes_of[neighbours]).argmax(1).cpu())
    correct = torch.cat(predictions).numpy() == task.test_labels
    return KnnResult(accuracy=float(correct.mean()), k=k, temperature=temperature)


def compare_probes(
    features: Mapping[str, tuple[Features, Features]], *, k: int = 20, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Probe several representations of one data set.

    Args:
        features: the (train, test) features of each representation, such as z, untrained and pixels.
        k: neighbours of the k-NN probe.
        seed: of the logistic probe's choice.

    Returns:
        {"linear_probe": {name: accuracy}, "knn": {name: accuracy}}, where linear_probe is the logistic one.
    """
    return {
        "linear_probe": {name: logistic_probe(*pair, seed=seed).accuracy for name, pair in features.items()},
        "knn": {name: knn_probe(*pair, k=k).accuracy for name, pair in features.items()},
    }


def format_table(accuracies: Mapping[str, Mapping[str, float]]) -> str:
    """Lay `compare_probes`'s result out as text: a row a representation, a column a probe, in percent."""
    probes = list(accuracies)
    names = list(dict.fromkeys(name for row in accuracies.values() for name in row))
    rows = []
    for name in names:
        found = (accuracies[probe].get(name) for probe in probes)
        rows.append([name, *("–" if value is None else f"{100 * value:.2f}%" for value in found)])
    return table(["", *probes], rows)


def _check_task(train: Features, test: Features) -> _Task:
    """Check that `test` can be predicted from `train`, drop images of unknown label, and renumber the labels."""
    labelled = []
    for name, features in (("train", train), ("test", test)):
        known = () if features.labels is None else np.flatnonzero(features.labels >= 0)
        if features.labels is None or not len(known):
            raise ValueError(f"{name} features have no labels; a probe needs them (name the data set's label column)")
        labelled.append((features.z[known], features.labels[known]))
        bad = int((~np.isfinite(features.z)).any(axis=1).sum())
        if bad:
            raise ValueError(f"{name} features have NaN or infinite values in {bad} of {len(features)} rows")
    if train.z.shape[1] != test.z.shape[1]:
        raise ValueError(f"train features have {train.z.shape[1]} dims and test {test.z.shape[1]}; encode both alike")
    (train_z, given_labels), (test_z, test_labels) = labelled
    classes, train_labels = np.unique(given_labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"train features have one class, {classes[0]}; a probe needs at least two")
    unseen = np.setdiff1d(test_labels, classes)
    if len(unseen):
        raise ValueError(f"test features have {len(unseen)} classes that train lacks, such as {unseen[0]}")
    return _Task(train_z, train_labels, test_z, np.searchsorted(classes, test_labels), len(classes))


def _hold_out(labels: npt.NDArray[np.int64], seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split rows into those to fit and a stratified tenth; a class's only image is always fitted."""
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(labels))
    divisible = rows[np.bincount(labels)[labels] >= 2]
    if not len(divisible):
        raise ValueError("train features have one image a class; a probe needs two of some class to hold one out")
    num_classes = len(np.unique(labels[divisible]))
    num_held_out = max(round(HELD_OUT_SHARE * len(divisible)), num_classes)
    _, held_out = train_test_split(
        divisible, test_size=num_held_out, stratify=labels[divisible], random_state=seed, shuffle=True
    )
    held_out = np.sort(held_out)
    return np.setdiff1d(rows, held_out, assume_unique=True), held_out


def _fit_logistic(
    z: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], inverse_penalty: float, max_iterations: int
) -> tuple[LogisticRegression, bool]:
    """Fit one logistic regression; the second value tells whether it converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        # One thread: the small products of L-BFGS spend more time on waking threads than on computing (50,000 x 128 on
        # two busy cores: 11 s with one thread, 35 to 60 s with two), and the sums come in one order on every machine.
        with threadpool_limits(limits=1):
            model = LogisticRegression(C=inverse_penalty, max_iter=max_iterations).fit(z, labels)
    return model, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


@torch.inference_mode()
def _linear_accuracies(
    norm: nn.BatchNorm1d, weight: Tensor, bias: Tensor, z: Tensor, labels: npt.NDArray[np.int64]
) -> list[float]:
    """Measure the accuracy of each layer in `weight` [rates, d, classes], 4,096 images at a time."""
    predictions = [(norm(chunk) @ weight + bias).argmax(-1).cpu() for chunk in z.split(4096)]
    return [float(value) for value in (torch.cat(predictions, dim=1).numpy() == labels).mean(axis=1)]
