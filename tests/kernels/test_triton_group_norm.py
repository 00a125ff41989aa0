"""The Triton kernels of modulated group norm: every variant against the composition, and what they do with memory.

Where there is a GPU they run on it, compiled. Without one they run in Triton's interpreter, which turns fp32 into bf16
by cutting digits off where a GPU rounds; the checks of memory need the interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from soda_kernels import modulated_group_norm
from soda_kernels._tuning import power_of_two
from soda_kernels.group_norm import api, ops, reference
from soda_kernels.group_norm.config import GroupNormConfig, candidates, heuristic
from soda_kernels.group_norm.config import Problem as Shape
from tests.harness.memory import check_memory
from tests.kernels import compositions
from tests.kernels.norm_problems import FORMS, LAYOUTS, Form, Problem, problem
from tests.numerics import assert_accurate_in_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
in_the_interpreter = pytest.mark.skipif(DEVICE == "cuda", reason="only Triton's interpreter shows accesses to memory")

VARIANTS = ("resident", "looped", "split")
SHAPES = [
    ((2, 8), 4),
    ((3, 12), 6),
    ((3, 6, 5), 3),
    ((2, 7, 4, 4), 1),
    ((2, 5, 3, 3), 5),
    ((1, 96, 3, 3), 32),
    ((2, 8, 1, 1), 2),
    ((1, 4, 17, 13), 2),
    ((9, 4, 2, 1), 2),
    ((2, 6, 2, 3, 5), 3),
    ((2, 16, 8, 8), 2),
]


def forced(shape: Shape, variant: str) -> GroupNormConfig:
    """A config of a variant whose tiles are far smaller than a heuristic's, so that small inputs have many."""
    straddles = shape.channels % shape.group_channels != 0
    if straddles or variant == "split":
        return GroupNormConfig(variant="split", slab=8, rows=16, num_warps=1, groups=shape.num_groups, tiles=2)
    parts = [c // shape.group_channels for c in (shape.channels, shape.skip_channels) if c]
    groups = math.gcd(*parts) if shape.num_samples % 2 else 1  # both one and several groups a program occur
    slab = power_of_two(groups * shape.group_channels)
    rows = power_of_two(shape.spatial) if variant == "resident" else 16
    samples = 2 if variant == "resident" else 1
    return GroupNormConfig(variant=variant, slab=slab, rows=rows, num_warps=1, groups=groups, samples=samples)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Let the public function run what it would run on a GPU, in the variant that the test's parameter names."""
    from soda_kernels.group_norm import triton_impl

    variant = getattr(request, "param", None)
    if variant:
        monkeypatch.setattr(triton_impl, "choose", lambda shape, device: forced(shape, variant))
    namespace = SimpleNamespace(
        modulated_group_norm=SimpleNamespace(default=ops._gpu_forward),
        modulated_group_norm_backward=SimpleNamespace(default=ops._gpu_backward),
    )
    monkeypatch.setattr(api, "current_ops", lambda: namespace)


every_variant = pytest.mark.parametrize("interpreted", VARIANTS, indirect=True)


def cases() -> Iterator[Any]:
    """Every shape in its layouts with a form that turns over them; every form on one shape."""
    for index, (shape, groups) in enumerate(SHAPES):
        for layout in ["nchw", *{4: ["nhwc"], 5: ["ndhwc"]}.get(len(shape), [])]:
            form = FORMS[(index + (layout != "nchw")) % len(FORMS)]
            yield pytest.param(shape, groups, layout, form, id=f"{'x'.join(map(str, shape))}-g{groups}-{layout}-{form}")
    for form in FORMS:
        for layout in ("nchw", "nhwc"):
            yield pytest.param((3, 12, 5, 3), 4, layout, form, id=f"3x12x5x3-g4-{layout}-{form}")


def assert_within_rounding(actual: Tensor, composition: Tensor, exact: Tensor, name: str = "result") -> None:
    """For a handful of fp32 values, where the composition's own error is a draw: 2e-5 of the largest, or of 1."""
    error, allowed = float((actual.double() - exact).abs().max()), 2e-5 * max(1.0, float(exact.abs().max()))
    assert error <= allowed, f"{name} is off by up to {error:.3g}, where {allowed:.3g} is allowed"


def assert_matches(case: Problem, assert_close: Callable[..., None]) -> None:
    """Outputs and every gradient are close enough to the fp64 composition, and in the case's layout."""
    actual, composed = case.fused(), case.composed()
    double = case.to(torch.float64)
    exact = double.composed()
    output_gradients = [torch.randn(out.shape).to(out) for out in actual]
    for out, plain, truth in zip(actual, composed, exact, strict=True):
        assert out.stride() == case.leaves["x"].stride() or case.form.pair
        assert_close(out, plain, truth)
    gradients, plain_gradients = case.gradients(actual, output_gradients), case.gradients(composed, output_gradients)
    exact_gradients = double.gradients(exact, [gradient.double() for gradient in output_gradients])
    for name, gradient in gradients.items():
        assert gradient.dtype == case.leaves[name].dtype
        assert gradient.stride() == case.leaves[name].stride()
        assert_close(gradient, plain_gradients[name], exact_gradients[name], name)


@every_variant
@pytest.mark.parametrize(("shape", "num_groups", "layout", "form"), list(cases()))
def test_values_and_gradients(
    interpreted: None, shape: tuple[int, ...], num_groups: int, layout: str, form: Form
) -> None:
    assert_matches(problem(shape, num_groups, layout, form, torch.float32, device=DEVICE), assert_within_rounding)


@every_variant
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_the_tolerance_rule(interpreted: None, dtype: torch.dtype, parameter_dtype: torch.dtype, layout: str) -> None:
    for form in (FORMS[3], FORMS[7]):
        case = problem((2, 24, 9, 7), 4, layout, form, dtype, parameter_dtype, DEVICE)
        assert_matches(case, assert_accurate_in_norm)


@every_variant
def test_groups_of_one_value(interpreted: None) -> None:
    case = problem((3, 6), 6, "nchw", FORMS[3], torch.float32, device=DEVICE)
    (y,), (expected,) = case.fused(), case.composed()
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    # Zero but for rounding, which 1 / sqrt(eps) = 316 amplifies.
    assert case.gradients((y,), [torch.ones_like(y)])["x"].abs().max() < 1e-4


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(2, 32, 16, 16), (3, 12, 20, 20)], ids=lambda shape: "x".join(map(str, shape)))
def test_the_heuristics_own_choice(interpreted: None, shape: tuple[int, ...], layout: str) -> None:
    # With no factor, which makes the seed another draw: the interpreter adds one number after the other, so that over
    # 12 seeds gradients of weight and bias were off by 2.2 to 2.5 times the composition's error, with it and without.
    form = replace(FORMS[6], residual_scale=1.0)
    assert_matches(problem(shape, 4, layout, form, torch.float32, device=DEVICE), assert_accurate_in_norm)


@every_variant
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["far", "constant", "plain"])
def test_error_in_norm_is_at_most_twice_torchs(interpreted: None, layout: str, dtype: torch.dtype, kind: str) -> None:
    offset, deviation = {"far": (10_000.0, 0.1), "constant": (3.7, 0.0), "plain": (0.5, 1.0)}[kind]
    x = (offset + deviation * torch.randn(2, 16, 12, 10)).to(DEVICE, dtype).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = (torch.rand(16) + 0.5).to(DEVICE, dtype), torch.randn(16).to(DEVICE, dtype)
    exact = torch.nn.functional.group_norm(x.double(), 4, weight.double(), bias.double())
    torchs = torch.nn.functional.group_norm(x, 4, weight, bias)
    ours = modulated_group_norm(x, 4, weight, bias, activation=None)
    assert isinstance(ours, Tensor)
    assert_accurate_in_norm(ours, torchs, exact)


@every_variant
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_sum_and_its_parts_have_the_same_bits(interpreted: None, layout: str) -> None:
    """So that a backward may compute the norm of a sum again from the sum, which alone was kept."""
    parts = [torch.randn(3, 12, 5, 7).to(DEVICE, torch.float16).contiguous(memory_format=LAYOUTS[layout]) for _ in "ab"]
    y, summed = modulated_group_norm(parts[0], 4, residual=parts[1], residual_scale=2**-0.5)
    assert isinstance(summed, Tensor)
    again = modulated_group_norm(summed, 4)
    assert isinstance(again, Tensor) and torch.equal(again, y)


@every_variant
def test_the_same_bits_again_and_for_a_slice_of_the_batch(interpreted: None) -> None:
    case = problem((4, 12, 5, 7), 4, "nhwc", FORMS[3], torch.float32, device=DEVICE)
    dy = torch.randn(4, 12, 5, 7).to(DEVICE).contiguous(memory_format=torch.channels_last)
    first, second = ((out := case.fused())[0], case.gradients(out, [dy])), case.fused()[0]
    again = case.gradients(case.fused(), [dy])
    assert torch.equal(first[0], second)
    assert all(torch.equal(first[1][name], again[name]) for name in again)
    names = [name for name in case.leaves if name not in ("weight", "bias")]
    leaves = {name: t.detach()[1:3].requires_grad_() if name in names else t for name, t in case.leaves.items()}
    part = replace(case, leaves=leaves)
    sliced = part.fused()
    assert torch.equal(sliced[0], first[0][1:3])
    gradients = part.gradients(sliced, [dy[1:3]])
    assert all(torch.equal(gradients[name], first[1][name][1:3]) for name in names)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_slice_has_the_same_bits_in_the_configs_that_the_heuristic_takes(interpreted: None, layout: str) -> None:
    x = torch.randn(24, 32, 6, 6).to(DEVICE).contiguous(memory_format=LAYOUTS[layout])
    part = x[:3]
    configs = [heuristic(Shape.of(t, None, 16, backward=False, dropout=False)) for t in (x, part)]
    assert configs[0].samples != configs[1].samples and configs[0].variant == configs[1].variant == "resident"
    whole = modulated_group_norm(x, 16)
    assert isinstance(whole, Tensor)
    assert torch.equal(modulated_group_norm(part, 16), whole[:3])


@every_variant
@pytest.mark.parametrize("space", [(8, 9), (5, 7)], ids=["eights", "odd"])
def test_a_seed_for_each_sample(interpreted: None, space: tuple[int, int]) -> None:
    x = torch.randn(4, 8, *space).to(DEVICE).contiguous(memory_format=torch.channels_last)
    long = torch.tensor([11, 0, 2**40 + 11, 0, -3, 0, 11, 0], device=DEVICE)
    for seed in (long[::2].clone(), long[::2], torch.tensor([7], device=DEVICE).expand(4)):
        y = modulated_group_norm(x, 2, activation=None, dropout_p=0.5, seed=seed)
        assert isinstance(y, Tensor)
        kept = compositions.dropout_factor(x.shape, 0.5, seed.cpu()) != 0
        assert torch.equal(y.cpu() != 0, kept)


@every_variant
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_group(interpreted: None, value: float) -> None:
    x = torch.randn(2, 8, 8, 4).to(DEVICE)
    x[0, 3, 2, 1] = value
    y = modulated_group_norm(x, 2, dropout_p=0.5, seed=3)
    assert isinstance(y, Tensor)
    assert y[0, :4].isnan().all() and y[0, 4:].isfinite().all() and y[1].isfinite().all()


@every_variant
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_gradient_in_the_other_layout(interpreted: None, layout: str) -> None:
    case = problem((2, 12, 4, 5), 4, layout, FORMS[6], torch.float32, device=DEVICE)
    other = LAYOUTS["nhwc" if layout == "nchw" else "nchw"]
    gradients = [torch.randn(2, 12, 4, 5).to(DEVICE) for _ in range(2)]
    expected = case.gradients(case.fused(), gradients)
    actual = case.gradients(case.fused(), [g.contiguous(memory_format=other) for g in gradients])
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@every_variant
def test_modulations_are_read_where_they_lie(interpreted: None) -> None:
    x = torch.randn(3, 8, 4, 4).to(DEVICE)
    embedding = torch.randn(3, 32).to(DEVICE)
    scale1, shift1, scale2, shift2 = embedding.chunk(4, dim=1)
    interleaved = torch.randn(3, 8, 2).to(DEVICE)[..., 0]
    actual = modulated_group_norm(x, 2, modulations=[(scale1, shift1), (scale2, interleaved)])
    dense = [(scale1.clone(), shift1.clone()), (scale2.clone(), interleaved.clone())]
    assert torch.equal(actual, modulated_group_norm(x, 2, modulations=dense))


@every_variant
@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0), (2, 8, 0, 3)], ids=lambda shape: "x".join(map(str, shape)))
def test_nothing_to_compute(interpreted: None, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    weight = torch.randn(8, device=DEVICE, requires_grad=True)
    y = modulated_group_norm(x, 4, weight)
    assert isinstance(y, Tensor) and y.shape == shape
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == shape and not dweight.count_nonzero()


def test_the_gpu_runs_the_reference_for_fp64() -> None:
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    arguments = (x, None, None, None, None, [], 4, 1.0, 1e-5, True, 0.0, None)
    actual, expected = ops._gpu_forward(*arguments), reference.forward(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def plans(variant: str, layout: str, form: Form, shape: tuple[int, ...], num_groups: int) -> Iterator[tuple[Any, Any]]:
    """The forward and backward plans of a case in a variant, each with the op's arguments."""
    from soda_kernels.group_norm.triton_impl import plan_backward, plan_forward

    case = problem(shape, num_groups, layout, form, torch.float32, device=DEVICE)
    leaves = {name: leaf.detach() for name, leaf in case.leaves.items()}
    modulations = [leaves[f"{kind}{i}"] for i in range(form.modulations) for kind in ("scale", "shift")]
    x, skip, residual = leaves["x"], leaves.get("skip"), leaves.get("residual")
    parameters = leaves.get("weight"), leaves.get("bias"), modulations
    seed = torch.tensor(5, device=DEVICE) if form.dropout_p else None
    ending = form.scale_offset, form.activation == "silu", form.dropout_p, seed

    def config(backward: bool) -> GroupNormConfig:
        return forced(Shape.of(x, skip, num_groups, backward=backward, dropout=form.dropout_p > 0), variant)

    arguments = (x, skip, residual, *parameters, num_groups, ending[0], 1e-5, *ending[1:], form.residual_scale)
    forward = plan_forward(*arguments, config=config(False))
    yield forward, arguments
    y, summed, mean, rstd = reference.forward(*arguments)
    dsummed = None if residual is None else torch.randn_like(summed)
    normalized = x if residual is None else summed
    arguments = (torch.randn_like(y), dsummed, normalized, skip, *parameters, mean, rstd, *ending, form.residual_scale)
    yield plan_backward(*arguments, config=config(True)), arguments


@in_the_interpreter
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_memory_is_used_as_it_should_be(variant: str, layout: str, form: Form) -> None:
    shape, num_groups = ((3, 18, 5, 3), 3) if form.pair else ((3, 12, 5, 5), 4)
    for plan, arguments in plans(variant, layout, form, shape, num_groups):
        assert check_memory(plan, arguments) == []


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_launches(layout: str) -> None:
    launches = {
        variant: [len(plan.launches) for plan, _ in plans(variant, layout, FORMS[3], (2, 8, 4, 4), 2)]
        for variant in VARIANTS
    }
    assert launches == {"resident": [1, 2], "looped": [1, 2], "split": [3, 4]}
    plain = [len(plan.launches) for plan, _ in plans("resident", layout, FORMS[0], (2, 8, 4, 4), 2)]
    assert plain == [1, 1]  # no weight, so nothing to reduce over the batch


def test_offsets_beyond_two_to_the_31() -> None:
    from tests.kernels.offsets_triton import tile_offsets

    out = torch.empty(8, 4, dtype=torch.int64, device=DEVICE)
    x = torch.empty(1, device=DEVICE)
    for channels_last in (False, True):
        for sample, row, channel, space, channels in [
            (3, 16, 8, 2**27, 64), (2**20, 0, 4, 2**10, 2**8), (5, 2**29, 12, 2**30, 16), (1, 8, 4, 2**30, 2**28),
        ]:  # fmt: skip
            wide = (8 * channels if channels_last else 4 * space) >= 2**31
            tile_offsets[(1,)](x, out, sample, row, channel, space, channels, 8, 4, channels_last, wide)
            rows, columns = row + torch.arange(8)[:, None], channel + torch.arange(4)[None, :]
            steps = (channels, 1) if channels_last else (1, space)
            expected = sample * space * channels + rows * steps[0] + columns * steps[1]
            assert torch.equal(out.cpu(), expected * 4)  # bytes


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("channels", "skip", "groups", "space"),
    [(1, 0, 1, 1), (10, 0, 5, 49), (96, 0, 32, 4096), (257, 0, 1, 9), (4096, 0, 4096, 2), (12, 5, 17, 3), (2, 3, 1, 7)],
)  # fmt: skip
def test_every_shape_has_a_config(
    backward: bool, channels_last: bool, channels: int, skip: int, groups: int, space: int
) -> None:
    shape = Shape(
        backward=backward, num_samples=2, channels=channels, skip_channels=skip, num_groups=groups, spatial=space,
        channels_last=channels_last, element_bytes=2, dropout=False,
    )  # fmt: skip
    assert any(config.variant == "split" for config in candidates(shape))
    for config in candidates(shape):
        assert config.slab & (config.slab - 1) == config.rows & (config.rows - 1) == 0
        if config.variant != "split":
            assert config.slab >= config.groups * shape.group_channels
            assert channels // shape.group_channels % config.groups == 0


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_the_heuristic_over_shapes(backward: bool, channels_last: bool, element_bytes: int, dropout: bool) -> None:
    """A megabyte fills 132 multiprocessors, and the batch changes no tile of a variant."""
    for channels, skip, groups in [
        (64, 0, 32), (192, 0, 32), (320, 0, 32), (384, 192, 32), (1280, 0, 32), (96, 0, 8), (257, 0, 1), (40, 0, 5),
    ]:  # fmt: skip
        for space in (16, 49, 64, 196, 1024, 4096, 65536):
            tiles: dict[str, GroupNormConfig] = {}
            for batch in (1, 2, 3, 8, 32, 256):
                shape = Shape(
                    backward=backward, num_samples=batch, channels=channels, skip_channels=skip, num_groups=groups,
                    spatial=space, channels_last=channels_last, element_bytes=element_bytes, dropout=dropout,
                )  # fmt: skip
                config = heuristic(shape)
                assert shape.bytes < 1 << 20 or config.num_programs(shape) >= 132, shape
                same = replace(config, samples=1)
                assert tiles.setdefault(config.variant, same) == same, shape
