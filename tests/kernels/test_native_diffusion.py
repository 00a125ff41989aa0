"""The native CPU kernels of noise-schedule sampling: values, layouts and bits, in each instruction set here."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from soda_kernels import NoiseSchedule, _native, _philox, add_noise, denoising_loss, explain, sampler_step
from soda_kernels.diffusion.reference import METHODS, SAMPLINGS, TARGETS
from tests.numerics import assert_accurate, assert_accurate_in_norm, ulp

_native.load()
# Not in silence where it could be built: tests/packaging/test_native_build.py fails there.
pytestmark = pytest.mark.skipif(not _native.native_status().available, reason=str(_native.native_status()))

NATIVE, REFERENCE = torch.ops.soda_kernels, torch.ops.soda_kernels_reference
SCHEDULE = NoiseSchedule.cosine(100)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Three, four and other numbers of channels; whole blocks of four places and not; one tile and several; one place.
SHAPES = [
    (2, 3, 8, 8), (3, 5, 7, 9), (2, 3, 64, 70), (2, 4, 33, 35), (1, 40, 65, 3), (2, 8, 4, 4), (2, 3, 1, 1), (3, 6),
    (2, 4, 3, 5, 6), (1, 2, 3000),
]  # fmt: skip


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layouts(shape: tuple[int, ...]) -> list[torch.memory_format]:
    return [torch.contiguous_format, *{4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(len(shape), [])]


def key(batch: int, *, steps: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """A seed and sample ids of more than 32 bits, and one step or one for each sample."""
    step = torch.arange(batch) * 5 if steps else torch.tensor(7)
    return torch.tensor(-123456789012345), torch.arange(batch) * 7919 + 2**33, step


def images(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shape) + shape[1])
    return [torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(count)]


def bytes_like(x: Tensor) -> Tensor:
    return (x.float() * 60 + 127).clamp(0, 255).to(torch.uint8)


def noising_arguments(x0: Tensor, dtype: torch.dtype, *, drawn: bool = False) -> tuple[Any, ...]:
    index = None if drawn else torch.arange(x0.shape[0]) * 37 % 100
    return x0, index, SCHEDULE.alpha, SCHEDULE.sigma, *key(x0.shape[0]), "uniform", 0, 1, dtype


def loss_arguments(prediction: Tensor, x0: Tensor, target: str, weighted: bool) -> tuple[Any, ...]:
    batch = x0.shape[0]
    weights = torch.linspace(0.5, 2, 100, dtype=torch.bfloat16) if weighted else None
    tables = SCHEDULE.alpha, SCHEDULE.sigma, weights
    return prediction, x0, torch.arange(batch) * 37 % 100, *tables, *key(batch, steps=weighted), target


def step_arguments(
    x: list[Tensor], method: str, target: str, *, guided: bool = True, eta: float = 0.0, clip: float | None = None,
    rescale: float = 0.0, previous: bool = False, next_index: int = 30,
) -> tuple[Any, ...]:  # fmt: skip
    index = [torch.tensor(40), torch.tensor(next_index)]
    last = (x[3], torch.tensor(55)) if previous else (None, None)
    return (
        x[0], x[1], x[2] if guided else None, SCHEDULE.alpha, SCHEDULE.sigma, SCHEDULE.logsnr, *index, method, target,
        3.0 if guided else 1.0, eta, clip, rescale, *last, *key(x[0].shape[0])[:2],
    )  # fmt: skip


def widened(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """In fp64, tables and all; bytes are what they stand for."""

    def widen(x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            return x.double() / 127.5 - 1
        return x.double() if x.is_floating_point() else x

    return tuple(
        torch.float64 if isinstance(a, torch.dtype) else a for a in tree_map_only(Tensor, widen, arguments)
    )  # fmt: skip


def check(name: str, arguments: tuple[Any, ...]) -> None:
    """Hold an op to the reference's accuracy, each of its results written, in the reference's dtype and layout."""
    with _native.poisoned_results() as poisoned:
        actual = tree_leaves(getattr(NATIVE, name)(*arguments))
    assert poisoned[0], f"{name} did not run native code"
    stock, exact = (tree_leaves(getattr(REFERENCE, name)(*a)) for a in (arguments, widened(arguments)))
    for result, composed, true in zip(actual, stock, exact, strict=True):
        assert (result.shape, result.dtype, result.stride()) == (composed.shape, composed.dtype, composed.stride())
        if result.dtype == torch.int64:
            assert torch.equal(result, composed)
        elif result.numel():
            (assert_accurate if result.ndim > 1 else assert_accurate_in_norm)(result, composed, true, name)


# Numbers


def test_normals_of_many_words_and_of_the_extreme_ones(isa: str) -> None:
    """Within 4 ulps of the reference's, where the radius or the angle is at an end and where a quadrant begins."""
    ends = torch.tensor([0, 1, 255, 2**31, 2**32 - 1, 2**32 - 127, 2**32 - 129, 2**32 - 2**9])
    quarters = torch.cat([torch.arange(-3, 4) * 256 + quarter * 2**29 for quarter in range(9)]).remainder(2**32)
    pairs = torch.cartesian_prod(torch.cat((ends, quarters)), torch.cat((ends, quarters)))
    many = _philox.random_blocks(2**20, torch.tensor(5), torch.arange(4), torch.tensor(0), 1).view(-1, 4)
    words = torch.cat((torch.cat((pairs, pairs.flip(1)), dim=1), many))
    normals = _native.normals_of_words(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_philox, "random_blocks", lambda *_: words[None])
        expected = _philox.normal(words.numel(), *key(1), 1, torch.float32).view(-1, 4)
    assert normals.isfinite().all()
    assert ((normals.double() - expected.double()).abs() <= 4 * ulp(expected, torch.float32)).all()
    assert float(normals.abs().max()) == pytest.approx(6.7637, abs=5e-5)


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("num", [1, 5, 31, 1027, 5000])
def test_numbers_of_a_key(isa: str, num: int, steps: bool) -> None:
    for stream in _philox.STREAMS.values():
        arguments = (*key(3, steps=steps), num, stream, torch.float32)
        uniforms, normals = NATIVE.philox_uniform(*arguments), NATIVE.philox_normal(*arguments)
        assert torch.equal(uniforms, REFERENCE.philox_uniform(*arguments))
        expected = REFERENCE.philox_normal(*arguments)
        assert ((normals.double() - expected.double()).abs() <= 4 * ulp(expected, torch.float32)).all()
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(NATIVE.philox_normal(*arguments[:-1], dtype), normals.to(dtype))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_step_indices(isa: str, batch: int, sampling: str) -> None:
    for num_steps, steps in itertools.product((1, 100, 2**20 + 1), (False, sampling != "stratified")):
        arguments = (*key(batch, steps=steps), num_steps, sampling, 3, 2 * batch + 1)
        actual, expected = NATIVE.draw_step_index(*arguments), REFERENCE.draw_step_index(*arguments)
        if sampling == "logit_normal":  # of a normal that is off by some ulps
            assert ((actual - expected).abs() <= 1 + num_steps * 2e-6).all()
        else:
            assert torch.equal(actual, expected)


# Images


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_add_noise(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for layout in layouts(shape):
        (x0,) = images(shape, layout, dtype, 1)
        for x, out, drawn in ((x0, dtype, False), (x0, torch.float64, True), (bytes_like(x0), dtype, False)):
            check("add_noise", noising_arguments(x, out, drawn=drawn))
        check("add_noise_backward", (x0, torch.arange(shape[0]), SCHEDULE.alpha))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_denoising_loss(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for layout, target in itertools.product(layouts(shape), TARGETS):
        prediction, x0, other = images(shape, layout, dtype, 3)
        for x in (x0, bytes_like(x0), x0.float(), other.contiguous()):
            for weighted, saves in ((False, dtype != torch.float16), (True, False)):
                arguments = loss_arguments(prediction, x, target, weighted)
                check("denoising_loss", (*arguments, saves))
                dloss = torch.linspace(300, 400, shape[0]) if weighted else torch.tensor(512.0).expand(shape[0])
                check("denoising_loss_backward", (dloss, *arguments))
        check("scale_samples", (prediction, torch.linspace(1, 2, shape[0])))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_sampler_step(isa: str, dtype: torch.dtype, target: str, method: str) -> None:
    for shape in ((2, 3, 8, 8), (2, 4, 33, 35), (1, 3, 64, 70)):
        for layout, next_index, clip in itertools.product(layouts(shape), (30, -1), (None, 1.0)):
            x = images(shape, layout, dtype, 4)
            options = {"next_index": next_index, "clip": clip}
            check("sampler_step", step_arguments(x, method, target, guided=False, **options))
            check("sampler_step", step_arguments(x, method, target, **options))
            check("sampler_step", step_arguments(x, method, target, rescale=0.7, **options))
            if method == "ddim":
                check("sampler_step", step_arguments(x, method, target, eta=0.6, **options))
            if method == "dpmpp_2m":
                check("sampler_step", step_arguments(x, method, target, previous=True, **options))


def every_op(x: list[Tensor], part: slice = slice(None)) -> list[Tensor]:
    """Results of all ops that take images, for some of the samples."""
    noising = noising_arguments(x[0], torch.float32)
    calls = [
        (NATIVE.add_noise, noising), (NATIVE.add_noise, (*noising[:-1], torch.bfloat16)),
        *((NATIVE.denoising_loss, (*loss_arguments(x[1], x[0], target, True), True)) for target in TARGETS),
        (NATIVE.denoising_loss_backward, (torch.ones(len(x[0])), *loss_arguments(x[1], x[0], "v", False))),
        (NATIVE.sampler_step, step_arguments(x, "ddpm", "eps", rescale=0.5)),
        (NATIVE.sampler_step, step_arguments(x, "dpmpp_2m", "v", previous=True, clip=1.0)),
    ]  # fmt: skip
    whole = len(x[0])

    def cut(t: Tensor) -> Tensor:
        return t[part] if t.ndim and len(t) == whole else t

    return tree_leaves([op(*tree_map_only(Tensor, cut, arguments)) for op, arguments in calls])


@pytest.mark.parametrize("layout", layouts((1, 1, 1, 1)), ids=["nchw", "nhwc"])
def test_bits_depend_on_no_thread_count_no_run_and_no_neighbour(isa: str, layout: torch.memory_format) -> None:
    x = images((7, 3, 70, 70), layout, torch.float32, 4)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            runs.append(every_op(x))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    for part, whole in zip(every_op(x, slice(4, 6)), runs[0], strict=True):
        assert torch.equal(part, whole[4:6])


def test_noise_does_not_depend_on_the_layout_and_strides_change_no_bit(isa: str) -> None:
    x = images((2, 3, 33, 40), torch.contiguous_format, torch.float32, 4)
    plain = every_op(x)
    spread = [torch.stack((t, t + 1), dim=-1)[..., 0] for t in x]
    assert all(torch.equal(a, b) for a, b in zip(every_op(spread), plain, strict=True))
    last = every_op([t.contiguous(memory_format=torch.channels_last) for t in x])
    for a, b in zip(last, plain, strict=True):
        if a.ndim > 1:
            assert a.is_contiguous(memory_format=torch.channels_last) and b.is_contiguous()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    noising = noising_arguments(x[0], torch.float32)
    other = noising_arguments(x[0].contiguous(memory_format=torch.channels_last), torch.float32)
    assert torch.equal(NATIVE.add_noise(*noising)[0], NATIVE.add_noise(*other)[0])


def test_a_sample_that_does_not_vary_is_not_rescaled(isa: str) -> None:
    x = [torch.full((2, 3, 40, 41), value) for value in (0.1, 0.3, 0.7)]
    plain, rescaled = (NATIVE.sampler_step(*step_arguments(x, "ddim", "x0", rescale=r)) for r in (0.0, 0.8))
    assert all(torch.equal(a, b) for a, b in zip(plain, rescaled, strict=True))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_an_outlier_that_comes_first_costs_no_digits_of_the_rescaling(isa: str, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for shape, outlier in (((4, 3, 256, 256), 1e3), ((1, 3, 64, 70), -1e6)):
        x = images(shape, layout, torch.float32, 4)
        for guidance in x[1:3]:
            guidance[:, 0, 0, 0] = outlier
        arguments = step_arguments(x, "ddim", "x0", rescale=0.7)
        check("sampler_step", arguments)
        # Of each sample's own scale: of all elements but the first.
        actual, stock, exact = (
            op(*a)[1].flatten(1)[:, 1:]
            for op, a in ((NATIVE.sampler_step, arguments), (REFERENCE.sampler_step, arguments),
                          (REFERENCE.sampler_step, widened(arguments)))
        )  # fmt: skip
        assert_accurate_in_norm(actual, stock, exact)


@pytest.mark.parametrize("exponent", [-84, 84])
def test_the_rescaling_has_no_scale(isa: str, exponent: int) -> None:
    """At 5e-26 and at 2e25, where a square is no fp32 number, the factors are those of the images at 1."""
    x = images((2, 3, 40, 41), torch.contiguous_format, torch.float32, 4)
    scaled = [t * 2.0**exponent for t in x]
    _, plain = NATIVE.sampler_step(*step_arguments(x, "ddim", "x0", rescale=0.7))
    _, actual = NATIVE.sampler_step(*step_arguments(scaled, "ddim", "x0", rescale=0.7))
    assert torch.equal(actual, plain * 2.0**exponent)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_where_it_is(isa: str, value: float) -> None:
    x = images((2, 3, 9, 9), torch.contiguous_format, torch.float32, 4)
    x[0][1, 2, 3, 4] = value
    for target, clip, next_index in itertools.product(TARGETS, (1.0, None), (30, -1)):
        for method, eta in (("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0), ("dpmpp_2m", 0.0)):
            arguments = step_arguments(
                x, method, target, eta=eta, clip=clip, previous=method == "dpmpp_2m", next_index=next_index
            )
            steps = NATIVE.sampler_step(*arguments), REFERENCE.sampler_step(*arguments)
            for actual, expected in zip(*steps, strict=True):
                limits = [step.nan_to_num(7.0, 8.0, 9.0).where(~step.isfinite(), 0.0) for step in (actual, expected)]
                assert torch.equal(*limits), (method, target)
    loss, _ = NATIVE.denoising_loss(*loss_arguments(x[0], x[1], "eps", False), False)
    assert loss.isfinite().tolist() == [True, False]


# What the library does not take


def test_what_the_kernels_do_not_take_goes_to_the_reference() -> None:
    for shape, dtype in (((0, 3, 4, 4), torch.float32), ((2, 3, 0), torch.float32), ((2, 3, 4, 5), torch.float64)):
        x = images(shape, torch.contiguous_format, dtype, 4)
        calls = {
            "add_noise": noising_arguments(x[0], dtype),
            "denoising_loss": (*loss_arguments(x[1], x[0], "v", True), True),
            "denoising_loss_backward": (torch.ones(shape[0]), *loss_arguments(x[1], x[0], "v", True)),
            "scale_samples": (x[0], torch.ones(shape[0])),
            "sampler_step": step_arguments(x, "ddpm", "v"),
            "philox_normal": (*key(shape[0]), x[0][:1].numel(), 1, torch.float64),
            "draw_step_index": (*key(shape[0]), 10, "stratified", 0, 5),
        }
        for name, arguments in calls.items():
            results = (tree_leaves(getattr(ops, name)(*arguments)) for ops in (NATIVE, REFERENCE))
            for actual, expected in zip(*results, strict=True):
                assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
                torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_strata_that_the_kernels_do_not_take_go_to_the_reference() -> None:
    (x0,) = images((3, 3, 4, 4), torch.contiguous_format, torch.float32, 1)
    for first, total in ((-5, 7), (-(2**40), 7), (2**40, 7), (0, 2**33)):
        arguments = (*key(3), 10, "stratified", first, total)
        indices = REFERENCE.draw_step_index(*arguments)
        assert torch.equal(NATIVE.draw_step_index(*arguments), indices)
        noising = (*noising_arguments(x0, torch.float32, drawn=True)[:7], "stratified", first, total, torch.float32)
        for actual, expected in zip(NATIVE.add_noise(*noising), REFERENCE.add_noise(*noising), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("stream", [-1, 256, 300])
@pytest.mark.parametrize("name", ["philox_uniform", "philox_normal"])
def test_a_stream_of_more_than_8_bits_goes_to_the_reference(name: str, stream: int) -> None:
    arguments = (*key(3), 9, stream, torch.float32)
    actual, expected = (getattr(ops, name)(*arguments) for ops in (NATIVE, REFERENCE))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_an_index_out_of_range_is_refused_in_words() -> None:
    x0, key_of = torch.zeros(2, 3, 4, 4), {"seed": 1, "sample_ids": [0, 1]}
    for index in ([0, 100], [-1, 0]):
        for call in (
            lambda index: add_noise(x0, index, SCHEDULE, **key_of),
            lambda index: denoising_loss(x0, x0, index, SCHEDULE, target="v", **key_of),
        ):
            with pytest.raises(ValueError, match="step_index holds values from"):
                call(torch.tensor(index))
    with pytest.raises(ValueError, match="step_index holds values from 100"):
        sampler_step(x0, x0, None, SCHEDULE, torch.tensor(100), torch.tensor(3))
    for index in (-2, 100):
        with pytest.raises(ValueError, match=f"next_index holds values from {index}"):
            sampler_step(x0, x0, None, SCHEDULE, torch.tensor(99), torch.tensor(index))
    with pytest.raises(ValueError, match="previous_index holds values from 100"):
        sampler_step(x0, x0, None, SCHEDULE, torch.tensor(9), torch.tensor(3), method="dpmpp_2m", previous_x0=x0,
                     previous_index=torch.tensor(100))  # fmt: skip


def test_the_op_itself_refuses_what_would_be_read_out_of_bounds() -> None:
    x = images((2, 3, 4, 4), torch.contiguous_format, torch.float32, 4)
    noising, loss = noising_arguments(x[0], torch.float32), loss_arguments(x[0], x[1], "v", False)
    step = step_arguments(x, "dpmpp_2m", "eps", previous=True)

    drawn = noising_arguments(x[0], torch.float32, drawn=True)

    def refuses(name: str, message: str, arguments: tuple[Any, ...], at: int, value: Any) -> None:
        with pytest.raises(RuntimeError, match=message):
            getattr(NATIVE, name)(*arguments[:at], value, *arguments[at + 1 :])

    refuses("add_noise", "step_index must have shape", noising, 1, torch.zeros(3, dtype=torch.int64))
    refuses("add_noise", "sample_ids must be", noising, 5, torch.arange(3))
    refuses("add_noise", "step must be", noising, 6, torch.arange(3))
    refuses("add_noise", "seed must be", noising, 4, torch.arange(2))
    refuses("denoising_loss_backward", "dloss must have shape", (torch.ones(3), *loss), 0, torch.ones(3))
    refuses("denoising_loss", "x0 does not have the shape", (*loss, False), 1, x[1][..., :3])
    refuses("denoising_loss", "target is score", (*loss, False), 9, "score")
    refuses("sampler_step", "cond does not have the shape", step, 1, x[1][:1])
    refuses("sampler_step", "uncond does not have the dtype", step, 2, x[2].half())
    refuses("sampler_step", "method is euler", step, 8, "euler")
    refuses("sampler_step", "previous_x0 and previous_index", step, 15, None)
    refuses("draw_step_index", "num_strata", (*key(2), 10, "stratified", 0, 0), 4, "stratified")
    refuses("draw_step_index", "sampling is foo", (*key(2), 10, "foo", 0, 1), 4, "foo")
    refuses("add_noise", "sampling is foo", drawn, 7, "foo")
    # The reference's errors, which reach the caller without their words.
    for at, count in itertools.product((6, 7, 15), (0, 2)):
        refuses("sampler_step", "API call failed", step, at, torch.zeros(count, dtype=torch.int64))
    refuses("denoising_loss", "API call failed", (*loss, False), 5, torch.ones(10, 10))
    refuses("denoising_loss_backward", "API call failed", (torch.ones(2), *loss), 6, torch.ones(10, 10))


def test_what_lies_on_another_device_is_not_read() -> None:
    """Where a caller sends such a call to the CPU's kernels; the shape function that it gets to instead refuses it."""
    x = images((2, 3, 4, 4), torch.contiguous_format, torch.float32, 4)
    loss = (torch.ones(2), *loss_arguments(x[0], x[1], "v", True))
    calls = {
        "add_noise": (noising_arguments(x[0], torch.float32), (1, 2, 3)),
        "add_noise_backward": ((x[0], torch.arange(2), SCHEDULE.alpha), (1, 2)),
        "denoising_loss": ((*loss[1:], False), (2, 3, 4, 5)),
        "denoising_loss_backward": (loss, (0, 3, 4, 5, 6)),
        "scale_samples": ((x[0], torch.ones(2)), (1,)),
        "sampler_step": (step_arguments(x, "dpmpp_2m", "eps", previous=True), (3, 4, 5, 6, 7, 15)),
    }
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with _native.poisoned_results() as poisoned:
        for name, (arguments, places) in calls.items():
            for at in places:
                moved = *arguments[:at], arguments[at].to("meta"), *arguments[at + 1 :]
                with pytest.raises(RuntimeError):
                    getattr(NATIVE, name).default.redispatch(cpu, *moved)
    assert not poisoned[0]


def test_explain_tells_the_library() -> None:
    x0 = torch.zeros(2, 3, 4, 4)
    told = explain(add_noise, x0, torch.tensor([1, 2]), SCHEDULE, seed=1, sample_ids=[0, 1])
    assert [(choice.op, choice.backend) for choice in told.choices] == [("add_noise", "native")]
    told = explain(add_noise, x0.double(), torch.tensor([1, 2]), SCHEDULE, seed=1, sample_ids=[0, 1])
    assert [(choice.op, choice.backend) for choice in told.choices] == [("add_noise", "reference")]


def test_the_environment_variable_chooses_the_instruction_set() -> None:
    code = (
        "import torch; from soda_kernels import native_status, philox_normal; print(native_status().isa, "
        "philox_normal((1, 4), seed=1, sample_ids=[0]).tolist())"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, _native.ISA_VARIABLE: "generic"}, capture_output=True,
        text=True, cwd=Path(_native.__file__).parents[1], check=False,
    )  # fmt: skip
    assert finished.stdout.startswith("generic [["), finished.stderr
