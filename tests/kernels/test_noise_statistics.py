"""What is drawn, on every backend: normals and uniforms have their distributions and are independent.

Seeds are fixed, so that a test gives the same p-values each time; planted defects show that the tests can fail. Every
draw is a million numbers, in Triton's interpreter too, where few large blocks make that quick.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from soda_kernels import _native, _philox, explain, philox_normal, philox_uniform, use_backend
from tests.harness.interpreter import is_interpreting

SIGNIFICANT = 1e-3
SAMPLES, ELEMENTS = 128, 8192
LARGEST = math.sqrt(66 * math.log(2))  # of the smallest word, 0: sqrt(-2 ln 2^-33)

Draw = Callable[..., Tensor]


def by_reference(draw: Draw, shape: tuple[int, int], **key: Any) -> Tensor:
    with use_backend("reference"):
        return draw(shape, **key)


def by_native(draw: Draw, shape: tuple[int, int], **key: Any) -> Tensor:
    assert explain(draw, shape, **key).choices[0].backend == "native"
    return draw(shape, **key)


def by_triton(
    draw: Draw, shape: tuple[int, int], *, seed: int, sample_ids: Any, step: int = 0, stream: str = "noise"
) -> Tensor:
    from soda_kernels.diffusion.config import TileConfig
    from soda_kernels.diffusion.triton_impl import plan_philox

    plan = plan_philox(
        torch.tensor(seed), torch.as_tensor(list(sample_ids)), torch.tensor(step), shape[1],
        _philox.STREAMS[stream], torch.float32, normal=draw is philox_normal,
        # The interpreter takes milliseconds a program.
        config=TileConfig(positions=ELEMENTS, channels=1, num_warps=4),
    )  # fmt: skip
    return plan.run()[0]


def on_gpu(draw: Draw, shape: tuple[int, int], **key: Any) -> Tensor:
    assert explain(draw, shape, **key, device="cuda").choices[0].backend == "triton"
    return draw(shape, **key, device="cuda").cpu()


_native.load()
BACKENDS = {
    "reference": (by_reference, ()),
    # Not in silence where it could be built: tests/packaging/test_native_build.py fails there.
    "native": (by_native, pytest.mark.skipif(not _native.native_status().available, reason="no native CPU library")),
    "triton": (by_triton, pytest.mark.skipif(not is_interpreting(), reason="compiled for a GPU: tested as gpu")),
    "gpu": (on_gpu, pytest.mark.gpu),
}
backends = pytest.mark.parametrize(
    "backend", [pytest.param(run, marks=marks, id=name) for name, (run, marks) in BACKENDS.items()]
)


def failures(normals: np.ndarray, *others: np.ndarray) -> list[str]:
    """Name the tests that normals [samples, elements] fail.

    Args:
        others: draws of the first samples with other keys, from which they must be independent.
    """
    normals = normals.astype(np.float64)
    found = {"Kolmogorov-Smirnov": stats.kstest(normals.ravel(), "norm").pvalue}
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        z = (np.mean(normals**power) - moment) / math.sqrt(variance / normals.size)
        found[f"moment {power}"] = 2 * stats.norm.sf(abs(z))
    found |= dependence(normals)
    found["squares at lag 1"] = stats.pearsonr(normals[:, :-1].ravel() ** 2, normals[:, 1:].ravel() ** 2).pvalue
    for index, other in enumerate(others):
        found[f"another key {index}"] = stats.pearsonr(normals[: len(other)].ravel(), other.ravel()).pvalue
    return [name for name, p in found.items() if not p > SIGNIFICANT]


def dependence(draws: np.ndarray) -> dict[str, float]:
    """Return p-values of correlations along samples [samples, elements], and between any two of them."""
    found = {
        f"lag {lag}": stats.pearsonr(draws[:, :-lag].ravel(), draws[:, lag:].ravel()).pvalue
        for lag in (1, 2, 3, 4, 8, 16)
    }
    found["neighbouring samples"] = stats.pearsonr(draws[:-1].ravel(), draws[1:].ravel()).pvalue
    r = np.corrcoef(draws)[np.triu_indices(len(draws), k=1)]
    degrees = draws.shape[1] - 2
    t = np.abs(r).max() * math.sqrt(degrees / max(1 - np.abs(r).max() ** 2, 1e-12))
    found["the two samples most alike"] = min(1.0, r.size * 2 * stats.t.sf(t, degrees))
    # r^2 of two independent normal samples has a beta distribution.
    mean, variance = stats.beta.stats(0.5, degrees / 2, moments="mv")
    found["all pairs of samples"] = 2 * stats.norm.sf(abs((np.mean(r**2) - mean) / math.sqrt(variance / r.size)))
    return found


@backends
def test_a_million_normals(backend: Draw) -> None:
    normals = backend(philox_normal, (SAMPLES, ELEMENTS), seed=0, sample_ids=range(SAMPLES)).numpy()
    key: dict[str, Any] = {"seed": 0, "sample_ids": range(8)}
    others = [
        backend(philox_normal, (8, ELEMENTS), **(key | change)).numpy()
        for change in (
            {"seed": 1}, {"seed": 2**32}, {"step": 1}, {"stream": "sampler"}, {"sample_ids": range(2**32, 2**32 + 8)}
        )
    ]  # fmt: skip
    assert failures(normals, *others) == []
    # Far out in the tails, and not beyond where they end.
    assert stats.norm.isf(0.5 * 1e-2 / normals.size * 1e4) < np.abs(normals).max() <= LARGEST


@backends
def test_a_million_uniforms(backend: Draw) -> None:
    uniforms = backend(philox_uniform, (SAMPLES, ELEMENTS), seed=0, sample_ids=range(SAMPLES)).double().numpy()
    assert uniforms.min() >= 0.0 and uniforms.max() < 1.0
    assert np.array_equal(uniforms * 2**24, np.floor(uniforms * 2**24))
    found = dependence(uniforms) | {
        "Kolmogorov-Smirnov": stats.kstest(uniforms.ravel(), "uniform").pvalue,
        "top 8 bits": stats.chisquare(np.bincount((uniforms.ravel() * 256).astype(int), minlength=256)).pvalue,
        "low 8 bits": stats.chisquare(np.bincount((uniforms.ravel() * 2**24).astype(int) % 256)).pvalue,
    }
    assert [name for name, p in found.items() if not p > SIGNIFICANT] == []


# Word, block, sample id and step, for seed 0 and stream "noise", found by running the cipher backwards: the first word
# of the block is an extreme one, and its second is below 256, which is angle 0.
EXTREMES = {
    "smallest": (0, 720, 20404039705596449, 2266793906),
    "largest": (2**32 - 1, 21, 23417246897919673, 2521823988),
}


@backends
@pytest.mark.parametrize("name", EXTREMES)
def test_the_extreme_words(backend: Draw, name: str) -> None:
    """The smallest word gives the largest normal, the largest one 0 and not NaN, and as a uniform no 1."""
    word, block, sample_id, step = EXTREMES[name]
    key: dict[str, Any] = {"seed": 0, "sample_ids": [sample_id], "step": step}
    element = 4 * block
    words = _philox.random_blocks(block + 1, *map(torch.tensor, (0, [sample_id], step)), _philox.STREAMS["noise"])
    assert int(words[0, block, 0]) == word and 0 <= int(words[0, block, 1]) < 256
    normal, of_sine = backend(philox_normal, (1, element + 4), **key)[0, element : element + 2].tolist()
    assert of_sine == 0.0
    if name == "smallest":
        largest = np.float32(LARGEST)
        assert abs(np.float32(normal) - largest) <= np.spacing(largest)
        assert pytest.approx(6.7637, abs=5e-5) == LARGEST
    else:
        assert normal == 0.0  # of 1 + 2^-33, which is 1 in fp32
    (uniform,) = backend(philox_uniform, (1, element + 4), **key)[0, element : element + 1].tolist()
    assert uniform == (word >> 8) / 2**24 < 1.0


def test_the_largest_word_in_fp64() -> None:
    _, block, sample_id, step = EXTREMES["largest"]
    key: dict[str, Any] = {"seed": 0, "sample_ids": [sample_id], "step": step, "dtype": torch.float64}
    shape, element = (1, 4 * block + 4), 4 * block
    assert float(philox_normal(shape, **key)[0, element]) == pytest.approx(2.0**-16, rel=1e-9)  # sqrt(-2 ln(1 - 2^-33))
    assert float(philox_uniform(shape, **key)[0, element]) == 1 - 2.0**-32


# Defects that the tests above must find: in the words of the cipher, or in the normals made of them.


def defective_words(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], None]) -> np.ndarray:
    draw = _philox.random_blocks

    def changed(*arguments: Any) -> Tensor:
        words = draw(*arguments)
        change(words)
        return words

    monkeypatch.setattr(_philox, "random_blocks", changed)
    return by_reference(philox_normal, (SAMPLES, ELEMENTS), seed=0, sample_ids=range(SAMPLES)).numpy()


def keep_low_half(words: Tensor) -> None:
    words &= 0xFFFF


def copy_word(source: int, target: int) -> Callable[[Tensor], None]:
    def change(words: Tensor) -> None:
        words[..., target] = words[..., source]

    return change


def repeat_block(words: Tensor) -> None:
    """As a counter that counts every other block only."""
    words[:, 1::2] = words[:, 0:-1:2]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (copy_word(0, 1), "moment 4"),
        (copy_word(0, 2), "squares at lag 1"),
        (copy_word(1, 3), "lag 2"),
        (repeat_block, "lag 4"),
        (keep_low_half, "Kolmogorov-Smirnov"),
    ],
    ids=["angle-is-radius", "radius-twice", "angle-twice", "block-twice", "half-a-word"],
)
def test_a_word_used_twice_is_found(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], None], found: str
) -> None:
    assert found in failures(defective_words(monkeypatch, change))


def reuse_sample(normals: np.ndarray) -> None:
    normals[103] = normals[17]


def share_some(normals: np.ndarray) -> None:
    """Of every sample a twentieth is that of the first."""
    normals[:, : ELEMENTS // 20] = normals[0, : ELEMENTS // 20]


def widen(normals: np.ndarray) -> None:
    normals *= math.sqrt(1.01)


def shift(normals: np.ndarray) -> None:
    normals += 0.005


def leave_out_sine(normals: np.ndarray) -> None:
    radius = np.hypot(normals[:, 0::2], normals[:, 1::2])
    normals[:, 1::2] = radius


def cosine_for_sine(normals: np.ndarray) -> None:
    normals[:, 1::2] = normals[:, 0::2]


def cut_tails(normals: np.ndarray) -> None:
    """As of a radius that is made of 8 bits."""
    np.clip(normals, -3.33, 3.33, out=normals)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (reuse_sample, "the two samples most alike"),
        (share_some, "all pairs of samples"),
        (widen, "moment 2"),
        (shift, "moment 1"),
        (leave_out_sine, "Kolmogorov-Smirnov"),
        (cosine_for_sine, "lag 1"),
        (cut_tails, "moment 4"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_normals_are_found(change: Callable[[np.ndarray], None], found: str) -> None:
    normals = by_reference(philox_normal, (SAMPLES, ELEMENTS), seed=0, sample_ids=range(SAMPLES)).numpy()
    change(normals)
    assert found in failures(normals)


def test_noise_that_does_not_depend_on_the_key_is_found() -> None:
    normals = by_reference(philox_normal, (SAMPLES, ELEMENTS), seed=0, sample_ids=range(SAMPLES)).numpy()
    assert failures(normals, normals) == ["another key 0"]
