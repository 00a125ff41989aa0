"""Reconstruction through a model's z, and PSNR and SSIM with known answers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from soda_engine.data.views import plain_view
from soda_engine.evaluation.reconstruction import reconstruct, score


class Echo(nn.Module):
    """A model whose z is the image itself and whose samples are z plus noise keyed by the sample id."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(denoiser=SimpleNamespace(image_size=size))
        self.scale = nn.Parameter(torch.ones(1))
        self.calls: list[tuple[int, int]] = []

    def encode(self, images: Tensor) -> Tensor:
        return plain_view(images, self.config.denoiser.image_size).flatten(1)

    def sample(self, z: Tensor, *, seed: int, sample_ids: Tensor, num_steps: int = 100) -> Tensor:
        self.calls.append((len(z), num_steps))
        size = self.config.denoiser.image_size
        return z.view(len(z), -1, size, size) * self.scale + (0.01 * sample_ids + seed).view(-1, 1, 1, 1)


def pixels(count: int = 5, channels: int = 3, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 200, (count, channels, side, side), generator=generator).to(torch.uint8)


def test_reconstruction_hands_each_image_its_id_whatever_the_batch() -> None:
    images = pixels()
    whole, parts = reconstruct(Echo(8), images), reconstruct(Echo(8), images, batch_size=2)  # type: ignore[arg-type]
    torch.testing.assert_close(whole.target, images.float() / 127.5 - 1)
    torch.testing.assert_close(whole.reconstruction - whole.target, 0.01 * torch.arange(5.0).view(-1, 1, 1, 1).expand(
        5, 3, 8, 8
    ), atol=1e-6, rtol=0)  # fmt: skip
    assert torch.equal(whole.reconstruction, parts.reconstruction)
    assert not whole.reconstruction.requires_grad


def test_reconstruction_passes_options_and_ids_on() -> None:
    model = Echo(4)
    found = reconstruct(model, pixels(), batch_size=3, sample_ids=[9, 9, 9, 9, 9], num_steps=7)  # type: ignore[arg-type]
    assert model.calls == [(3, 7), (2, 7)] and found.target.shape == (5, 3, 4, 4)
    torch.testing.assert_close(found.reconstruction - found.target, torch.full((5, 3, 4, 4), 0.09))


def test_reconstruction_is_kept_in_range() -> None:
    found = reconstruct(Echo(8), pixels(), seed=50)  # type: ignore[arg-type]
    assert (found.reconstruction == 1).all()


def test_reconstruction_accepts_floats() -> None:
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    assert torch.equal(reconstruct(Echo(8), images).target, images)  # type: ignore[arg-type]


def test_reconstruction_refuses_what_is_no_batch() -> None:
    with pytest.raises(ValueError, match="images has shape"):
        reconstruct(Echo(8), pixels()[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there are 5 images"):
        reconstruct(Echo(8), pixels(), sample_ids=[1, 2])  # type: ignore[arg-type]


def test_psnr_is_that_of_the_definition() -> None:
    target = torch.full((3, 1, 8, 8), -0.5)
    errors = torch.tensor([0.2, 0.02, 0.0]).view(-1, 1, 1, 1)  # in [-1, 1] units, so half of it on [0, 1]
    found = score(target, target + errors, batch_size=2)
    np.testing.assert_allclose(found.psnr[:2], [20.0, 40.0], atol=1e-3)
    assert found.psnr[2] == math.inf


@pytest.mark.parametrize(("side", "window"), [(8, 7), (16, 11), (32, 11), (3, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_orders_images_by_likeness(side: int, window: int, channels: int) -> None:
    target = torch.rand(4, channels, side, side) * 2 - 1
    noise = torch.randn(target.shape)
    near, far = score(target, target + 0.05 * noise), score(target, target + 0.8 * noise)
    assert near.ssim_window == far.ssim_window == window
    np.testing.assert_allclose(score(target, target).ssim, 1, atol=1e-6)
    assert all(1 > a > b for a, b in zip(near.ssim, far.ssim, strict=True))
    assert near.mean_ssim == pytest.approx(float(np.mean(near.ssim)))
    assert near.mean_psnr == pytest.approx(float(np.mean(near.psnr))) and near.mean_psnr > far.mean_psnr


def test_ssim_of_larger_images_is_the_usual_one() -> None:
    target = torch.rand(4, 3, 32, 32) * 2 - 1
    other = (target + 0.3 * torch.randn(target.shape)).clamp(-1, 1)
    usual = structural_similarity_index_measure((other + 1) / 2, (target + 1) / 2, data_range=1.0)
    assert score(target, other, batch_size=3).mean_ssim == pytest.approx(float(usual), abs=1e-5)


@pytest.mark.parametrize(
    ("target", "reconstruction", "message"),
    [
        ((2, 3, 8, 8), (2, 1, 8, 8), "reconstruction has"),
        ((0, 3, 8, 8),) * 2 + ("N > 0",),
        ((1, 1, 2, 2),) * 2 + ("3",),
    ],
    ids=["shapes", "empty", "too_small"],
)
def test_scores_refuse(target: tuple[int, ...], reconstruction: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(torch.zeros(target), torch.zeros(reconstruction))
