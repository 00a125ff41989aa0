"""On a GPU the ops give what they give on a CPU: integers exactly, floats to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from soda_kernels import (
    NoiseSchedule,
    add_noise,
    attention_qkvpacked,
    denoising_loss,
    draw_step_index,
    modulated_group_norm,
    philox_normal,
    philox_uniform,
    sampler_step,
)

pytestmark = pytest.mark.gpu


def both(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return tensor.clone().requires_grad_(), tensor.cuda().requires_grad_()


def test_uniforms_are_equal_and_normals_within_a_few_ulp() -> None:
    key = {"seed": 2**63 + 5, "step": 7}
    ids = torch.tensor([0, 3, 2**40])
    shape = (3, 5, 7, 11)
    here = philox_uniform(shape, sample_ids=ids, **key)
    assert torch.equal(here, philox_uniform(shape, sample_ids=ids.cuda(), **key).cpu())
    here = philox_normal(shape, sample_ids=ids, **key)
    torch.testing.assert_close(philox_normal(shape, sample_ids=ids.cuda(), **key).cpu(), here, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_group_norm_and_its_gradients(layout: torch.memory_format) -> None:
    x = both(torch.randn(3, 8, 6, 5).contiguous(memory_format=layout))
    scale, shift = both(torch.randn(3, 8)), both(torch.randn(3, 8))
    ys = [
        modulated_group_norm(x[i], 2, modulations=((scale[i], shift[i]),), dropout_p=0.25, seed=3) for i in range(2)
    ]
    assert ys[1].is_contiguous(memory_format=layout)
    torch.testing.assert_close(ys[1].cpu(), ys[0], rtol=1e-5, atol=1e-5)
    for y in ys:
        y.square().sum().backward()
    for here, there in (x, scale, shift):
        torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-4, atol=1e-4)


def test_group_norm_can_be_captured_in_a_graph_and_replayed() -> None:
    x = torch.randn(4, 32, 16, 16, device="cuda")
    seed = torch.tensor(1, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles before the capture
        modulated_group_norm(x, 8, dropout_p=0.5, seed=seed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = modulated_group_norm(x, 8, dropout_p=0.5, seed=seed)
    x.normal_()
    seed.fill_(2)
    graph.replay()
    assert torch.equal(y, modulated_group_norm(x, 8, dropout_p=0.5, seed=seed))


def test_group_norm_compiles_in_one_graph() -> None:
    def step(x: Tensor) -> Tensor:
        return modulated_group_norm(x, 4).square().sum()

    here, there = (torch.randn(3, 8, 6, 5).cuda().requires_grad_() for _ in range(2))
    with torch.no_grad():
        there.copy_(here)
    step(here).backward()
    torch.compile(step, fullgraph=True)(there).backward()
    torch.testing.assert_close(there.grad, here.grad)


def test_group_norm_of_more_than_two_to_the_31_elements() -> None:
    x = torch.randn(3, 32, 4096, device="cuda", dtype=torch.bfloat16)
    large = x[:1].expand(2**31 // (32 * 4096) + 2, -1, -1).clone()
    large[-2:] = x[1:]
    y = modulated_group_norm(large, 8)
    assert torch.equal(y[-2:], modulated_group_norm(x, 8)[1:]) and torch.equal(y[0], y[-3])


def test_attention_and_its_gradient() -> None:
    here, there = both(torch.randn(2, 17, 3, 2, 40))
    o = attention_qkvpacked(here), attention_qkvpacked(there)
    torch.testing.assert_close(o[1].cpu(), o[0], rtol=1e-3, atol=1e-4)
    for output in o:
        output.square().sum().backward()
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_noising_and_loss(target: str) -> None:
    schedule, x0 = NoiseSchedule.inverted_cosine(100), torch.randn(4, 3, 8, 8)
    prediction, index, ids = both(torch.randn(4, 3, 8, 8)), torch.tensor([0, 10, 50, 99]), torch.arange(4)
    losses, noised = [], []
    for device, guess in (("cpu", prediction[0]), ("cuda:0", prediction[1])):
        arguments = (index.to(device), schedule.to(device))
        key = {"seed": 1, "sample_ids": ids.to(device), "step": 2}
        noised.append(add_noise(x0.to(device), *arguments, **key))
        losses.append(denoising_loss(guess, x0.to(device), *arguments, target=target, **key))
        losses[-1].sum().backward()
    torch.testing.assert_close(noised[1].cpu(), noised[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prediction[1].grad.cpu(), prediction[0].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_drawn_step_indices_and_bytes(sampling: str) -> None:
    schedule, octets, ids = NoiseSchedule.cosine(100), torch.randint(0, 256, (4, 3, 8, 8)).byte(), torch.arange(4)
    results = []
    for device in ("cpu", "cuda:0"):
        key = {"seed": 1, "sample_ids": ids.to(device), "step": 2, "sampling": sampling}
        x_t, index = add_noise(octets.to(device), None, schedule.to(device), **key)
        assert torch.equal(index, draw_step_index(schedule.to(device), **key))
        results.append((x_t.cpu(), index.cpu()))
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)


def test_a_saved_gradient_is_the_one_computed_again() -> None:
    """A GPU saves it for an x0 of wider elements than the prediction's."""
    schedule, x0, index = NoiseSchedule.cosine(100), torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 50, 99])
    prediction = both(torch.randn(4, 3, 8, 8).bfloat16())
    for device, guess in (("cpu", prediction[0]), ("cuda:0", prediction[1])):
        key = {"seed": 1, "sample_ids": torch.arange(4, device=device), "step": 2}
        loss = denoising_loss(guess, x0.to(device), index.to(device), schedule.to(device), target="v", **key)
        loss.mean().backward()
    torch.testing.assert_close(prediction[1].grad.cpu(), prediction[0].grad, rtol=2 * 2**-8, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (2, 4, 128, 128)], ids=["one launch", "two launches"])
def test_guidance_rescale(shape: tuple[int, ...]) -> None:
    schedule, x, cond, uncond = NoiseSchedule.cosine(100), *(torch.randn(shape) for _ in range(3))
    keywords = {"cfg_scale": 5.0, "guidance_rescale": 0.7}
    here = sampler_step(x, cond, uncond, schedule, 60, 40, **keywords)
    there = sampler_step(x.cuda(), cond.cuda(), uncond.cuda(), schedule.to("cuda:0"), 60, 40, **keywords)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpmpp_2m"])
def test_sampler_step_without_waiting_for_the_device(method: str) -> None:
    schedule, x, guess = NoiseSchedule.cosine(100), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    ids = torch.arange(2)
    here = sampler_step(x, guess, guess + 1, schedule, 60, 40, method=method, cfg_scale=2.0, seed=1, sample_ids=ids)
    tensors = [t.cuda() for t in (x, guess, guess + 1, ids)]
    on_gpu = schedule.to("cuda:0")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = sampler_step(
            *tensors[:3], on_gpu, 60, 40, method=method, cfg_scale=2.0, seed=1, sample_ids=tensors[3]
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-4)
