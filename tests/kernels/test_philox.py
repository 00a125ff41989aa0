"""The counter RNG: known answers, what a number depends on, and the statistics of what is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from soda_kernels import philox_normal, philox_uniform, use_backend
from soda_kernels._philox import STREAMS, philox4x32
from tests.harness.interpreter import require_interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    require_interpreter()

SIGNIFICANT = 1e-3


def philox_words(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Philox4x32-10 in Python's integers, from the paper's section 5."""
    x, k = list(counter), list(key)
    for _ in range(10):
        product_0, product_1 = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [
            (product_1 >> 32) ^ x[1] ^ k[0],
            product_1 & 0xFFFFFFFF,
            (product_0 >> 32) ^ x[3] ^ k[1],
            product_0 & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x


def sample_words(num: int, seed: int, sample_id: int, step: int, stream: str) -> list[int]:
    """The words of a sample by the documented counter: (block, id low, id high | stream << 24, step)."""
    seed, sample_id = seed % 2**64, sample_id % 2**64
    high = (sample_id >> 32) & 0xFFFFFF | STREAMS[stream] << 24
    words: list[int] = []
    for block in range((num + 3) // 4):
        counter = (block, sample_id & 0xFFFFFFFF, high, step % 2**32)
        words += philox_words(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return words[:num]


# Random123's kat_vectors, lines "philox4x32 10".
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_published_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    assert [int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1))] == list(expected)
    assert philox_words(counter, key) == list(expected)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    ("seed", "sample_id", "step"),
    [(0, 0, 0), (7, 3, 2), (-1, 2**56 - 1, 2**32 - 1), (2**63 + 12345, 2**40 + 5, 10**6), (2**32, 2**32, 1)],
)
def test_counter_layout(seed: int, sample_id: int, step: int, stream: str) -> None:
    words = sample_words(11, seed, sample_id, step, stream)
    keywords = {"seed": seed, "sample_ids": [sample_id], "step": step, "stream": stream}
    uniform = philox_uniform((1, 11), **keywords, dtype=torch.float64)
    assert (uniform[0] * 2**32).long().tolist() == words
    assert philox_uniform((1, 11), **keywords)[0].tolist() == [(word >> 8) / 2**24 for word in words]

    words = sample_words(12, seed, sample_id, step, stream)
    normal: list[float] = []
    for a, b in zip(words[0::2], words[1::2], strict=True):
        radius, angle = math.sqrt(-2 * math.log(a / 2**32 + 2**-33)), 2 * math.pi * (b >> 8) / 2**24
        normal += [radius * math.cos(angle), radius * math.sin(angle)]
    exact = philox_normal((1, 11), **keywords, dtype=torch.float64)[0]
    assert exact.tolist() == pytest.approx(normal[:11], rel=1e-13, abs=1e-14)
    assert philox_normal((1, 11), **keywords)[0].tolist() == pytest.approx(normal[:11], rel=1e-5, abs=3e-6)


def test_seeds_wrap_to_64_bits() -> None:
    def draw(seed: int | Tensor) -> Tensor:
        return philox_normal((2, 9), seed=seed, sample_ids=[0, 1])

    assert torch.equal(draw(2**63), draw(-(2**63)))
    assert torch.equal(draw(2**64 - 1), draw(-1))
    assert torch.equal(draw(5), draw(torch.tensor(5)))
    assert torch.equal(draw(5), draw(torch.tensor(5, dtype=torch.int32)))


def test_a_sample_depends_on_its_own_key_alone() -> None:
    """Not on the batch's size or order, on how the shape is split, or on how much is drawn."""
    ids = torch.tensor([5, 17, 2**40, 3])
    steps = torch.tensor([0, 1, 2, 3])
    whole = philox_normal((4, 3, 5, 7), seed=1, sample_ids=ids, step=steps)
    for order in ([2], [3, 1], [1, 0, 3, 2]):
        part = philox_normal((len(order), 3, 5, 7), seed=1, sample_ids=ids[order], step=steps[order])
        assert torch.equal(part, whole[order])
    assert torch.equal(philox_normal((4, 105), seed=1, sample_ids=ids, step=steps), whole.flatten(1))
    assert torch.equal(philox_normal((4, 50), seed=1, sample_ids=ids, step=steps), whole.flatten(1)[:, :50])
    assert torch.equal(philox_normal((4, 3, 5, 7), seed=1, sample_ids=ids.tolist(), step=2)[2], whole[2])


def test_chunks_of_blocks_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    with use_backend("reference"):
        whole = philox_normal((3, 1001), seed=1, sample_ids=[0, 1, 2])
        monkeypatch.setattr("soda_kernels._philox._CHUNK_BLOCKS", 7)
        assert torch.equal(philox_normal((3, 1001), seed=1, sample_ids=[0, 1, 2]), whole)


def test_every_part_of_the_key_counts() -> None:
    base = {"seed": 1, "sample_ids": [2], "step": 3, "stream": "noise"}
    changes = [{}, *({"stream": stream} for stream in STREAMS if stream != "noise")]
    changes += [{"seed": seed} for seed in (0, -1, 1 + 2**32, 1 + 2**63)]
    changes += [{"sample_ids": [i]} for i in (0, 2 + 2**31, 2 + 2**32, 2 + 2**55)]
    changes += [{"step": step} for step in (0, 3 + 2**31, 3 + 2**16)]
    draws = {tuple(philox_uniform((1, 8), **(base | change))[0].tolist()) for change in changes}
    assert len(draws) == len(changes)
    # Key fields that swap or add up must not meet either.
    swapped = philox_uniform((1, 8), seed=2, sample_ids=[1], step=3)
    assert tuple(swapped[0].tolist()) not in draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_normals_of_every_dtype_are_those_of_fp64_rounded(dtype: torch.dtype) -> None:
    keywords = {"seed": 9, "sample_ids": range(50)}
    exact = philox_normal((50, 200), **keywords, dtype=torch.float64)
    actual = philox_normal((50, 200), **keywords, dtype=dtype)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    # fp32 rounds the angle to 2.4e-7 and the logarithm's argument to 3e-8, which a small radius amplifies.
    absolute = 0.0 if dtype == torch.float64 else 5e-6
    assert ((actual.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + absolute).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (2, 1, 1, 1)], ids=str)
def test_small_and_empty_shapes(shape: tuple[int, ...]) -> None:
    for draw in (philox_normal, philox_uniform):
        assert draw(shape, seed=0, sample_ids=range(shape[0])).shape == shape


# Statistics, on one million draws, by every implementation

MILLION = (125, 8000)
IMPLEMENTATIONS = ["reference", "device", "triton"]


def million(implementation: str, *, normal: bool) -> np.ndarray:
    """Draw fp32 numbers, fp64 normals of the reference: "device" is a CPU's, "triton" a GPU's or the interpreter's."""
    if implementation == "triton":
        from soda_kernels.diffusion.triton_impl import plan_philox

        key = (x.to(DEVICE) for x in (torch.tensor(0), torch.arange(MILLION[0]), torch.tensor(0)))
        (drawn,) = plan_philox(*key, MILLION[1], STREAMS["noise"], torch.float32, normal=normal).run()
        return drawn.double().cpu().numpy()
    draw = philox_normal if normal else philox_uniform
    if implementation == "device":
        return draw(MILLION, seed=0, sample_ids=range(MILLION[0])).double().numpy()
    dtype = torch.float64 if normal else torch.float32
    with use_backend("reference"):
        return draw(MILLION, seed=0, sample_ids=range(MILLION[0]), dtype=dtype).double().numpy()


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def normals(request: pytest.FixtureRequest) -> Iterator[np.ndarray]:
    with pytest.MonkeyPatch.context() as patch:
        # A program a sample, since the interpreter takes its time by the program.
        patch.setattr("soda_kernels.diffusion.triton_impl._PHILOX_BLOCK", 8192)
        yield million(request.param, normal=True)


# Triton's uniforms are the reference's bit for bit, which its own tests show.
@pytest.fixture(scope="module", params=["reference", "device"])
def uniforms(request: pytest.FixtureRequest) -> np.ndarray:
    return million(request.param, normal=False)


def test_normals_pass_kolmogorov_smirnov(normals: np.ndarray) -> None:
    assert stats.kstest(normals.ravel(), "norm").pvalue > SIGNIFICANT


def test_moments_of_normals(normals: np.ndarray) -> None:
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        z = (np.mean(normals**power) - moment) / math.sqrt(variance / normals.size)
        assert 2 * stats.norm.sf(abs(z)) > SIGNIFICANT, f"moment {power}"


def test_normals_are_not_correlated(normals: np.ndarray) -> None:
    flat = normals.ravel()
    tests = {f"lag {lag}": (flat[:-lag], flat[lag:]) for lag in (1, 2, 3, 4, 8)}
    tests["neighbouring samples"] = (normals[:-1].ravel(), normals[1:].ravel())
    tests["squares at lag 1"] = (flat[:-1] ** 2, flat[1:] ** 2)
    other = {"seed": {"seed": 1}, "step": {"step": 1}, "stream": {"stream": "sampler"}}
    for name, change in other.items():
        key = {"seed": 0, "sample_ids": range(MILLION[0])} | change
        tests[f"another {name}"] = (flat, philox_normal(MILLION, **key).numpy().ravel())
    for name, (a, b) in tests.items():
        assert stats.pearsonr(a, b).pvalue > SIGNIFICANT, name


def test_the_largest_normal_is_the_documented_one(normals: np.ndarray) -> None:
    assert np.abs(normals).max() < 6.7637
    assert math.sqrt(66 * math.log(2)) == pytest.approx(6.7637, abs=5e-5)
    # The smallest word, which is where the largest normal comes from.
    assert math.sqrt(-2 * math.log(2**-33)) == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-15)
    assert np.abs(normals).max() > stats.norm.isf(1e-4 / 2 / normals.size * 1e4)


def test_uniforms_are_uniform_and_below_one(uniforms: np.ndarray) -> None:
    assert uniforms.min() >= 0.0
    assert uniforms.max() < 1.0
    assert np.array_equal(uniforms * 2**24, np.floor(uniforms * 2**24))
    assert stats.kstest(uniforms.ravel(), "uniform").pvalue > SIGNIFICANT
    assert stats.chisquare(np.bincount((uniforms.ravel() * 256).astype(int), minlength=256)).pvalue > SIGNIFICANT


def test_the_largest_word_is_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2^32 words the last ones would round up to 1 in fp32 without the shift."""
    with use_backend("reference"):
        largest = torch.full((1, 1, 4), 0xFFFFFFFF)
        monkeypatch.setattr("soda_kernels._philox.random_blocks", lambda *_: largest)
        for dtype in (torch.float32, torch.float64):
            assert philox_uniform((1, 4), seed=0, sample_ids=[0], dtype=dtype).max() < 1
        assert philox_normal((1, 4), seed=0, sample_ids=[0]).isfinite().all()
        monkeypatch.setattr("soda_kernels._philox.random_blocks", lambda *_: torch.zeros_like(largest))
        assert float(philox_normal((1, 4), seed=0, sample_ids=[0]).abs().max()) == pytest.approx(6.7637, abs=5e-5)
