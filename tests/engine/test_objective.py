"""The training objective: what it draws, what it weighs, and that it depends on (seed, sample id, step) alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from soda_engine import Soda
from soda_engine.config import LatentConfig
from soda_engine.diffusion.objective import SCHEDULES, denoising_losses, dropout_keys, loss_weights
from soda_kernels import add_noise, draw_step_index, philox_normal
from tests.engine.tiny_soda import tiny_config, tiny_soda

KEY: dict[str, Any] = {"seed": 5, "step": 11}
# The same sums in another order, in fp32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def views(batch: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Source views, target views, and ids that neither start at 0 nor follow one another."""
    source, target_view = torch.rand(2, batch, 3, 8, 8) * 2 - 1
    return source, target_view, torch.arange(batch) * 1009 + 2**33


def half_trained(dropout: float = 0.0, **diffusion: Any) -> Soda:
    """A model in training mode, so that dropout acts, whose batch norms do not look at the batch."""
    model = tiny_soda(tiny_config(dropout=dropout, **diffusion)).train()
    model.encoder.eval()
    return model


# what a loss depends on


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_a_loss_does_not_depend_on_the_batch(target: str) -> None:
    model = half_trained(dropout=0.3, target=target)
    source, target_view, ids = views()
    losses = denoising_losses(model, source, target_view, sample_ids=ids, **KEY)
    assert losses.shape == (6,) and losses.dtype == torch.float32 and losses.isfinite().all()
    order = torch.tensor([3, 5, 0, 2, 4, 1])
    permuted = denoising_losses(model, source[order], target_view[order], sample_ids=ids[order], **KEY)
    torch.testing.assert_close(permuted, losses[order], **CLOSE)
    parts = [
        denoising_losses(model, source[cut], target_view[cut], sample_ids=ids[cut], **KEY)
        for cut in (slice(0, 1), slice(1, 3), slice(3, 6))
    ]
    torch.testing.assert_close(torch.cat(parts), losses, **CLOSE)


@pytest.mark.parametrize("change", [{"seed": 6}, {"step": 12}, {"sample_ids": torch.arange(6)}], ids=lambda c: [*c][0])
def test_a_loss_depends_on_seed_id_and_step(change: dict[str, Any]) -> None:
    model = half_trained()
    source, target_view, ids = views()
    arguments = {"sample_ids": ids, **KEY}
    losses = denoising_losses(model, source, target_view, **arguments)
    assert not torch.isclose(denoising_losses(model, source, target_view, **arguments | change), losses).any()


def test_global_random_state_is_neither_read_nor_moved() -> None:
    model = half_trained(dropout=0.3)
    source, target_view, ids = views()
    before = torch.get_rng_state()
    losses = denoising_losses(model, source, target_view, sample_ids=ids, **KEY)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(denoising_losses(model, source, target_view, sample_ids=ids, **KEY), losses)


def test_keys_may_be_tensors_and_forward_is_the_objective() -> None:
    model = half_trained(dropout=0.3)
    source, target_view, ids = views()
    losses = denoising_losses(model, source, target_view, sample_ids=ids, **KEY)
    key = {name: torch.tensor(value) for name, value in KEY.items()}
    assert torch.equal(model(source, target_view, sample_ids=ids, **key), losses)


# the loss


def truth(target: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return {"eps": noise, "v": alpha * noise - sigma * x0, "x0": x0}[target]


@pytest.mark.parametrize("loss_weight", ["uniform", "min_snr"])
@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_the_loss_is_the_formula(monkeypatch: pytest.MonkeyPatch, target: str, loss_weight: str) -> None:
    model = half_trained(target=target, loss_weight=loss_weight)
    source, x0, ids = views()
    step_index = draw_step_index(model.schedule, sample_ids=ids, **KEY)
    alpha, sigma = (table[step_index].view(-1, 1, 1, 1) for table in (model.schedule.alpha, model.schedule.sigma))
    noise = philox_normal(x0.shape, sample_ids=ids, **KEY)
    expected_x_t = alpha * x0 + sigma * noise
    torch.testing.assert_close(add_noise(x0, step_index, model.schedule, sample_ids=ids, **KEY), expected_x_t)
    answer = torch.randn_like(x0)

    def denoise(x_t: Tensor, index: Tensor, z: Tensor, **_: Any) -> Tensor:
        torch.testing.assert_close(x_t, expected_x_t)
        assert torch.equal(index, step_index)
        torch.testing.assert_close(z, model.encoder(source))
        return answer

    monkeypatch.setattr(model, "denoise", denoise)
    losses = denoising_losses(model, source, x0, sample_ids=ids, **KEY)
    expected = (answer - truth(target, x0, noise, alpha, sigma)).square().mean(dim=(1, 2, 3))
    if loss_weight == "min_snr":
        snr = (alpha / sigma).double().square().flatten()
        per_error = {"x0": 1.0, "eps": 1 / snr, "v": 1 / (snr + 1)}[target]
        expected = (expected * snr.clamp(max=5) * per_error).float()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    answer = truth(target, x0, noise, alpha, sigma)
    assert denoising_losses(model, source, x0, sample_ids=ids, **KEY).max() < 1e-9  # a perfect prediction


def test_an_untrained_model_predicts_no_noise() -> None:
    model = tiny_soda(random=False)
    source, target_view, ids = views(64)
    losses = denoising_losses(model, source, target_view, sample_ids=ids, **KEY)
    # The mean of 64 · 192 squares of standard normal numbers, whose standard error is √(2 / 12288) = 0.013.
    assert abs(float(losses.detach().mean()) - 1) < 4 * math.sqrt(2 / losses.numel() / 192)


def test_gradients_reach_every_part_once_awake() -> None:
    model = tiny_soda()
    source, target_view, ids = views(8)
    denoising_losses(model, source, target_view, sample_ids=ids, **KEY).mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    asleep = tiny_soda(random=False)
    denoising_losses(asleep, source, target_view, sample_ids=ids, **KEY).mean().backward()
    assert not asleep.encoder.fc.weight.grad.any() and asleep.denoiser.conv_out.weight.grad.any()


def test_a_masked_sample_does_not_train_the_encoder() -> None:
    latent = LatentConfig(dim=13, drop_all=1.0)
    model = tiny_soda(dataclasses.replace(tiny_config(), latent=latent))
    source, target_view, ids = views()
    denoising_losses(model, source, target_view, sample_ids=ids, **KEY).mean().backward()
    assert not model.encoder.fc.weight.grad.any()


def test_sections_are_masked_at_the_configured_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    latent = LatentConfig(dim=13, drop_all=0.3, drop_section=0.2)
    model = tiny_soda(dataclasses.replace(tiny_config(), latent=latent))
    batch, masks = 4000, []

    def denoise(x_t: Tensor, index: Tensor, z: Tensor, *, section_mask: Tensor, **_: Any) -> Tensor:
        masks.append(section_mask)
        return x_t

    monkeypatch.setattr(model, "denoise", denoise)
    monkeypatch.setattr(model.encoder, "forward", lambda source: torch.zeros(len(source), 13))
    denoising_losses(model, torch.zeros(batch, 1), torch.zeros(batch, 3, 1, 1), sample_ids=torch.arange(batch), **KEY)
    (mask,) = masks
    assert mask.shape == (batch, 3) and set(mask.unique().tolist()) == {0.0, 1.0}
    kept = 0.7 * 0.8
    rates = {"section": (mask[:, 0].mean(), kept), "all kept": (mask.prod(1).mean(), 0.7 * 0.8**3)}
    rates["none kept"] = ((mask.sum(1) == 0).float().mean(), 0.3 + 0.7 * 0.2**3)
    rates["two sections"] = ((mask[:, 1] * mask[:, 2]).mean(), 0.7 * 0.8**2)
    for name, (rate, expected) in rates.items():
        assert abs(float(rate) - expected) < 4 * math.sqrt(expected * (1 - expected) / batch), name


# draws and tables


def test_dropout_keys_are_distinct() -> None:
    ids = torch.arange(200)
    keys = [dropout_keys(seed=seed, sample_ids=ids, step=step) for seed in range(10) for step in range(50)]
    assert all(key.dtype == torch.int64 and key.shape == (200,) for key in keys)
    assert len(torch.cat(keys).unique()) == 10 * 50 * 200
    tensors = dropout_keys(seed=torch.tensor(9), sample_ids=ids, step=torch.tensor(49))
    assert torch.equal(tensors, keys[-1])


def test_dropout_acts_by_key() -> None:
    model = half_trained(dropout=0.5)
    x_t, z, index = torch.randn(3, 3, 8, 8), torch.randn(3, 13), torch.tensor([1, 500, 999])
    keys = dropout_keys(sample_ids=torch.arange(3), **KEY)
    prediction = model.denoise(x_t, index, z, dropout_seed=keys)
    assert torch.equal(model.denoise(x_t, index, z, dropout_seed=keys), prediction)
    assert not torch.allclose(model.denoise(x_t, index, z, dropout_seed=keys + 1), prediction, atol=1e-3)
    with pytest.raises(ValueError, match="seed is None"):
        model.denoise(x_t, index, z)


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1, -1], ids=["2^63", "2^64-1", "-1"])
def test_seeds_of_64_bits(seed: int) -> None:
    model = half_trained(dropout=0.3)
    source, target_view, ids = views(2)
    losses = denoising_losses(model, source, target_view, seed=seed, sample_ids=ids, step=0)
    others = denoising_losses(model, source, target_view, seed=seed + 1, sample_ids=ids, step=0)
    assert losses.isfinite().all() and not torch.isclose(losses, others).any()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_min_snr_is_the_formula(schedule: str, target: str) -> None:
    tables = SCHEDULES[schedule](100)
    assert loss_weights(tables, "uniform", target) is None
    weights = loss_weights(tables, "min_snr", target)
    assert weights is not None and weights.shape == (100,) and weights.dtype == torch.float32
    alpha_bar = tables.alpha_bar.double()
    snr = alpha_bar / (1 - alpha_bar)
    expected = {
        "x0": snr.clamp(max=5), "eps": (5 / snr).clamp(max=1), "v": torch.minimum(alpha_bar, 5 * (1 - alpha_bar))
    }[target]  # fmt: skip
    # The fp32 table of alpha_bar has lost some of 1 − alpha_bar where that is small.
    torch.testing.assert_close(weights.double(), expected, rtol=1e-2, atol=1e-6)


def test_t_is_the_share_of_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_soda(tiny_config(num_steps=50))
    times = []

    def forward(x_t: Tensor, t: Tensor, z: Tensor, **_: Any) -> Tensor:
        times.append(t)
        return x_t

    monkeypatch.setattr(model.denoiser, "forward", forward)
    model.denoise(torch.zeros(3, 3, 8, 8), torch.tensor([0, 24, 49]), torch.zeros(3, 13))
    torch.testing.assert_close(times[0], torch.tensor([1 / 50, 0.5, 1.0]))
