"""Noising and the denoising loss: formulas, gradients, and that both draw the same noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soda_kernels import NoiseSchedule, add_noise, denoising_loss, philox_normal
from soda_kernels.diffusion.api import saves_gradient
from tests.numerics import assert_accurate, assert_exact

SCHEDULE = NoiseSchedule.inverted_cosine(50, dtype=torch.float64)
SHAPES = [(4, 3), (4, 3, 5), (4, 3, 5, 7), (4, 2, 3, 5, 2), (0, 3, 4, 4), (300, 1, 2, 2)]
TARGETS = ["eps", "v", "x0"]


def key(batch: int) -> dict[str, Any]:
    return {"seed": 3, "sample_ids": torch.arange(batch) * 7 + 2**33, "step": 5}


def step_indices(batch: int) -> Tensor:
    return torch.arange(batch) * 13 % SCHEDULE.num_steps


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (x.ndim - 1))


def noised(x0: Tensor, step_index: Tensor, noise: Tensor) -> Tensor:
    """Ho et al. 2020, equation 4, in x0's dtype."""
    alpha_bar = SCHEDULE.alpha_bar[step_index]
    alpha, sigma = per_sample(alpha_bar.sqrt().to(x0.dtype), x0), per_sample((1 - alpha_bar).sqrt().to(x0.dtype), x0)
    return alpha * x0 + sigma * noise


def losses(prediction: Tensor, x0: Tensor, step_index: Tensor, noise: Tensor, target: str) -> Tensor:
    """The mean squared error of each sample in the tensors' dtype."""
    alpha_bar = SCHEDULE.alpha_bar[step_index]
    alpha, sigma = per_sample(alpha_bar.sqrt().to(x0.dtype), x0), per_sample((1 - alpha_bar).sqrt().to(x0.dtype), x0)
    goal = {"eps": noise, "v": alpha * noise - sigma * x0, "x0": x0}[target]
    return (prediction - goal).square().flatten(1).mean(1)


def noise_like(x0: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return philox_normal(x0.shape, **key(len(x0)), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_add_noise_and_its_gradient_equal_the_formula_in_fp64(shape: tuple[int, ...]) -> None:
    x0, index = torch.randn(shape).double().requires_grad_(), step_indices(shape[0])
    actual, exact = add_noise(x0, index, SCHEDULE, **key(shape[0])), noised(x0, index, noise_like(x0))
    assert_exact(actual, exact)
    dx_t = torch.randn(shape).double()
    assert_exact(torch.autograd.grad(actual, x0, dx_t)[0], torch.autograd.grad(exact, x0, dx_t)[0])


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_loss_and_its_gradient_equal_the_formula_in_fp64(shape: tuple[int, ...], target: str, weighted: bool) -> None:
    x0, prediction, index = torch.randn(shape).double(), torch.randn(shape).double(), step_indices(shape[0])
    weights = torch.rand(SCHEDULE.num_steps).double() if weighted else None
    prediction.requires_grad_()
    actual = denoising_loss(prediction, x0, index, SCHEDULE, target=target, weights=weights, **key(shape[0]))
    exact = losses(prediction, x0, index, noise_like(x0), target)
    exact = exact if weights is None else weights[index] * exact
    assert_exact(actual, exact)
    dloss = torch.randn(shape[0]).double()
    assert_exact(torch.autograd.grad(actual, prediction, dloss)[0], torch.autograd.grad(exact, prediction, dloss)[0])


@settings(max_examples=20)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=5), target=st.sampled_from(TARGETS),
    channels_last=st.booleans(),
)  # fmt: skip
def test_any_shape(shape: list[int], target: str, channels_last: bool) -> None:
    x0, prediction, index = torch.randn(shape).double(), torch.randn(shape).double(), step_indices(shape[0])
    if channels_last and len(shape) == 4:
        x0 = x0.contiguous(memory_format=torch.channels_last)
    noise = noise_like(x0)
    assert_exact(add_noise(x0, index, SCHEDULE, **key(shape[0])), noised(x0, index, noise))
    actual = denoising_loss(prediction, x0, index, SCHEDULE, target=target, **key(shape[0]))
    assert_exact(actual, losses(prediction, x0, index, noise, target))


def test_gradcheck() -> None:
    x0, prediction, index = torch.randn(2, 2, 3).double(), torch.randn(2, 2, 3).double(), torch.tensor([4, 31])
    prediction.requires_grad_()
    for target in TARGETS:
        assert torch.autograd.gradcheck(
            lambda p, target=target: denoising_loss(p, x0, index, SCHEDULE, target=target, **key(2)), prediction
        )
    assert torch.autograd.gradcheck(lambda x: add_noise(x, index, SCHEDULE, **key(2)), x0.requires_grad_())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
@pytest.mark.parametrize("target", TARGETS)
def test_low_precision_is_within_the_tolerance_rule(target: str, dtype: torch.dtype) -> None:
    schedule = NoiseSchedule.inverted_cosine(50)
    x0, prediction, index = torch.randn(4, 3, 9, 7).to(dtype), torch.randn(4, 3, 9, 7).to(dtype), step_indices(4)
    exact_noise, noise = noise_like(x0), noise_like(x0, dtype)
    x_t = add_noise(x0, index, schedule, **key(4))
    assert x_t.dtype == dtype
    assert_accurate(x_t, noised(x0, index, noise), noised(x0.double(), index, exact_noise), "x_t")

    prediction.requires_grad_()
    double = prediction.detach().double().requires_grad_()
    actual = denoising_loss(prediction, x0, index, schedule, target=target, **key(4))
    composed = losses(prediction, x0, index, noise, target)
    exact = losses(double, x0.double(), index, exact_noise, target)
    assert actual.dtype == torch.float32
    assert_accurate(actual, composed, exact, "loss")
    gradients = [torch.autograd.grad(loss.sum(), p)[0] for loss, p in
                 ((actual, prediction), (composed, prediction), (exact, double))]  # fmt: skip
    assert gradients[0].dtype == dtype
    assert_accurate(*gradients, name="dprediction")


def test_a_bf16_prediction_is_scored_against_fp32_images() -> None:
    x0, index = torch.randn(2, 3, 4, 4), step_indices(2)
    prediction = torch.randn(2, 3, 4, 4).bfloat16().requires_grad_()
    loss = denoising_loss(prediction, x0, index, SCHEDULE, target="v", **key(2))
    widened = denoising_loss(prediction.detach().float(), x0, index, SCHEDULE, target="v", **key(2))
    assert torch.equal(loss, widened)
    assert torch.autograd.grad(loss.sum(), prediction)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_knows_the_noise_that_was_added(target: str, dtype: torch.dtype) -> None:
    """The target, worked out from x_t and x0 alone, has no loss; with another key it does."""
    schedule = NoiseSchedule.inverted_cosine(50, dtype=dtype)
    x0, index = torch.randn(4, 3, 8, 8, dtype=dtype), step_indices(4)
    x_t = add_noise(x0, index, schedule, **key(4))
    alpha, sigma = per_sample(schedule.alpha[index], x0), per_sample(schedule.sigma[index], x0)
    noise = (x_t - alpha * x0) / sigma
    perfect = {"eps": noise, "v": alpha * noise - sigma * x0, "x0": x0}[target]
    loss = denoising_loss(perfect, x0, index, schedule, target=target, **key(4))
    assert float(loss.max()) < (1e-12 if dtype == torch.float32 else 1e-28)
    if target != "x0":
        for change in ({"seed": 4}, {"step": 6}, {"sample_ids": torch.arange(4)}):
            other = denoising_loss(perfect, x0, index, schedule, target=target, **(key(4) | change))
            assert float(other.min()) > 1e-3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_bytes_stand_for_images_in_fp32(layout: torch.memory_format) -> None:
    octets = torch.arange(4 * 3 * 8 * 8).byte().view(4, 3, 8, 8).contiguous(memory_format=layout)
    x0, index = octets.float() / 127.5 - 1, step_indices(4)
    x_t = add_noise(octets, index, SCHEDULE, **key(4))
    assert x_t.dtype == torch.float32
    assert x_t.is_contiguous(memory_format=layout)
    assert torch.equal(x_t, add_noise(x0, index, SCHEDULE, **key(4)))
    prediction = torch.randn(4, 3, 8, 8, requires_grad=True)
    for target in TARGETS:
        loss, expected = (
            denoising_loss(prediction, images, index, SCHEDULE, target=target, **key(4)) for images in (octets, x0)
        )
        assert torch.equal(loss, expected)
        gradients = [torch.autograd.grad(each.sum(), prediction)[0] for each in (loss, expected)]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
def test_x_t_is_rounded_to_its_dtype_at_the_end(dtype: torch.dtype) -> None:
    x0, index = torch.randn(4, 3, 8, 8), step_indices(4)
    expected = add_noise(x0, index, SCHEDULE, **key(4)).to(dtype)
    assert torch.equal(add_noise(x0, index, SCHEDULE, dtype=dtype, **key(4)), expected)
    octets = (x0 * 50 + 128).byte()
    expected = add_noise(octets, index, SCHEDULE, **key(4)).to(dtype)
    assert torch.equal(add_noise(octets, index, SCHEDULE, dtype=dtype, **key(4)), expected)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64], ids=str)
def test_the_gradient_of_x_t_with_drawn_indices(dtype: torch.dtype | None) -> None:
    x0 = torch.randn(4, 3, 5, 7).requires_grad_()
    x_t, index = add_noise(x0, None, SCHEDULE, dtype=dtype, sampling="stratified", **key(4))
    assert not index.requires_grad
    dx_t = torch.randn_like(x_t)
    (dx0,) = torch.autograd.grad(x_t, x0, dx_t)
    assert dx0.dtype == torch.float32
    torch.testing.assert_close(dx0, (dx_t.double() * per_sample(SCHEDULE.alpha[index], x_t)).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_saved_gradient_is_the_one_computed_again(
    monkeypatch: pytest.MonkeyPatch, target: str, dtype: torch.dtype
) -> None:
    x0, index = torch.randn(4, 3, 8, 8), step_indices(4)
    prediction = torch.randn(4, 3, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights, dloss = torch.rand(50), torch.randn(4)

    def run() -> tuple[Tensor, Tensor]:
        loss = denoising_loss(prediction, x0, index, SCHEDULE, target=target, weights=weights, **key(4))
        return loss.detach(), torch.autograd.grad(loss, prediction, dloss, create_graph=True)[0]

    monkeypatch.setattr("soda_kernels.diffusion.api.saves_gradient", lambda *_: False)
    loss, gradient = run()
    monkeypatch.setattr("soda_kernels.diffusion.api.saves_gradient", lambda *_: True)
    saved_loss, saved = run()
    assert torch.equal(saved_loss, loss)
    assert (saved.dtype, saved.stride()) == (gradient.dtype, gradient.stride())
    # Rounded once more.
    torch.testing.assert_close(saved, gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-9)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(saved.square().sum() + prediction.pow(3).sum(), prediction)


def test_the_gradient_is_saved_where_that_moves_fewer_bytes() -> None:
    def saves(prediction: torch.dtype, x0: torch.dtype, target: str, device: str = "meta") -> bool:
        images = [torch.empty(2, 3, dtype=dtype, device=device) for dtype in (prediction, x0)]
        return saves_gradient(*images, target)

    fp32, bf16, fp16, uint8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
    for target in ("v", "x0"):
        assert saves(bf16, fp32, target)
        for dtypes in ((fp32, fp32), (bf16, bf16), (fp32, bf16), (fp32, uint8), (bf16, uint8), (fp16, fp32)):
            assert not saves(*dtypes, target)
    assert not saves(bf16, fp32, "eps")

    # On a CPU the noise costs more than the bytes.
    for target in TARGETS:
        assert saves(fp32, fp32, target, device="cpu") and saves(bf16, uint8, target, device="cpu")
        assert not saves(fp16, fp32, target, device="cpu")


def test_an_exact_prediction_has_exactly_no_loss() -> None:
    x0, index = torch.randn(4, 3, 8, 8), step_indices(4)
    noise = noise_like(x0, torch.float32)
    assert not denoising_loss(noise, x0, index, SCHEDULE, **key(4)).any()
    assert not denoising_loss(x0, x0, index, SCHEDULE, target="x0", **key(4)).any()


def test_noise_does_not_depend_on_layout_batch_or_order() -> None:
    x0, index = torch.randn(4, 3, 5, 7), step_indices(4)
    x_t = add_noise(x0, index, SCHEDULE, **key(4))
    last = add_noise(x0.contiguous(memory_format=torch.channels_last), index, SCHEDULE, **key(4))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, x_t)
    order = torch.tensor([2, 0])
    part = key(4) | {"sample_ids": key(4)["sample_ids"][order]}
    assert torch.equal(add_noise(x0[order], index[order], SCHEDULE, **part), x_t[order])
    steps = torch.tensor([5, 6, 5, 6])
    mixed = add_noise(x0, index, SCHEDULE, **(key(4) | {"step": steps}))
    assert torch.equal(mixed[::2], x_t[::2])
    assert not torch.equal(mixed[1], x_t[1])


def test_the_gradient_has_the_layout_of_the_prediction() -> None:
    x0, index = torch.randn(2, 3, 5, 7), step_indices(2)
    prediction = torch.randn(2, 3, 5, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    loss = denoising_loss(prediction, x0, index, SCHEDULE, **key(2))
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    plain = prediction.detach().contiguous().requires_grad_()
    expected = torch.autograd.grad(denoising_loss(plain, x0, index, SCHEDULE, **key(2)).sum(), plain)[0]
    assert torch.equal(gradient, expected)


def test_non_contiguous_images() -> None:
    x0 = torch.randn(4, 6, 5, 14).double()[:, ::2, :, ::2]
    expanded = torch.randn(1, 3, 1, 7).double().expand(4, 3, 5, 7).requires_grad_()
    index = step_indices(8)[::2]
    noise = noise_like(x0)
    actual = add_noise(x0, index, SCHEDULE, **key(4))
    assert actual.is_contiguous()
    assert_exact(actual, noised(x0, index, noise))
    loss, exact = denoising_loss(expanded, x0, index, SCHEDULE, **key(4)), losses(expanded, x0, index, noise, "eps")
    assert_exact(loss, exact)
    dloss = torch.ones(1).double().expand(4)
    assert_exact(torch.autograd.grad(loss, expanded, dloss)[0], torch.autograd.grad(exact, expanded, dloss)[0])


@pytest.mark.parametrize("index", [[0, 50], [-1, 3]], ids=["beyond", "negative"])
def test_step_indices_out_of_range_raise_on_a_cpu(index: list[int]) -> None:
    x0 = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"step_index holds values from .* must be in \[0, 49\]"):
        add_noise(x0, torch.tensor(index), SCHEDULE, **key(2))
    for target, weights in (("v", None), ("eps", torch.ones(50)), ("eps", None), ("x0", None)):
        with pytest.raises(ValueError, match="step_index"):
            denoising_loss(x0, x0, torch.tensor(index), SCHEDULE, target=target, weights=weights, **key(2))


def test_images_that_require_a_gradient_raise() -> None:
    x0, index = torch.randn(2, 3, requires_grad=True), step_indices(2)
    with pytest.raises(ValueError, match=r"x0 requires a gradient.*detach"):
        denoising_loss(torch.randn(2, 3), x0, index, SCHEDULE, **key(2))
    weights = torch.ones(50, requires_grad=True)
    with pytest.raises(ValueError, match=r"weights requires a gradient.*detach"):
        denoising_loss(torch.randn(2, 3), x0.detach(), index, SCHEDULE, weights=weights, **key(2))
