"""Walks, mixtures and principal directions of z."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from soda_engine.latents import gaussian_latents, interpolate, mix_sections, principal_directions, traverse

SLICES = (slice(0, 2), slice(2, 4), slice(4, 7))
NAMES = ("16", "8", "middle")


@pytest.mark.parametrize("method", ["linear", "spherical"])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)], ids=str)
def test_interpolation_meets_both_ends(method: str, shape: tuple[int, ...]) -> None:
    z_a, z_b = torch.randn(shape), 3 * torch.randn(shape)
    walk = interpolate(z_a, z_b, 5, method=method)  # type: ignore[arg-type]
    assert walk.shape == (*shape[:-1], 5, 6)
    torch.testing.assert_close(walk[..., 0, :], z_a)
    torch.testing.assert_close(walk[..., -1, :], z_b)


def test_linear_steps_are_equal() -> None:
    z_a, z_b = torch.randn(4, 6), torch.randn(4, 6)
    torch.testing.assert_close(interpolate(z_a, z_b, 3)[:, 1], (z_a + z_b) / 2)


def test_spherical_turns_at_constant_speed_and_keeps_length() -> None:
    z_a, z_b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    walk = interpolate(z_a, z_b, 4, method="spherical")
    torch.testing.assert_close(walk.norm(dim=-1), torch.tensor([2.0, 8 / 3, 10 / 3, 4.0]))
    angles = torch.atan2(walk[:, 1], walk[:, 0])
    torch.testing.assert_close(angles, torch.arange(4) * math.pi / 6)


def test_spherical_between_parallel_latents_is_linear() -> None:
    z = torch.randn(3, 6)
    torch.testing.assert_close(interpolate(z, 2 * z, 5, method="spherical"), interpolate(z, 2 * z, 5))


def test_spherical_refuses_what_has_no_arc() -> None:
    z = torch.randn(6)
    with pytest.raises(ValueError, match="points against"):
        interpolate(z, -2 * z, 3, method="spherical")
    with pytest.raises(ValueError, match="zero"):
        interpolate(z, torch.zeros(6), 3, method="spherical")


def test_interpolation_refuses_bad_arguments() -> None:
    z = torch.randn(6)
    with pytest.raises(ValueError, match="z_b has shape"):
        interpolate(z, torch.randn(5), 3)
    with pytest.raises(ValueError, match="num_steps is 1"):
        interpolate(z, z, 1)
    with pytest.raises(ValueError, match="method is 'cubic'"):
        interpolate(z, z, 3, method="cubic")  # type: ignore[arg-type]


@pytest.mark.parametrize("sections", [[0, 2], ["16", "middle"], [0, "middle"]], ids=["indices", "names", "both"])
def test_mixing_takes_the_named_sections_alone(sections: list[int | str]) -> None:
    z_a, z_b = torch.zeros(3, 7), torch.ones(3, 7)
    mixed = mix_sections(z_a, z_b, sections, section_slices=SLICES, section_names=NAMES)
    torch.testing.assert_close(mixed, torch.tensor([1.0, 1, 0, 0, 1, 1, 1]).expand(3, 7))
    assert not z_a.any()


@pytest.mark.parametrize("section", [3, -1, "4"])
def test_mixing_refuses_a_section_that_is_not_there(section: int | str) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        mix_sections(torch.zeros(7), torch.ones(7), [section], section_slices=SLICES, section_names=NAMES)


def stretched(count: int = 500) -> torch.Tensor:
    """Latents with known standard deviations 5, 2, 0.5, 0.1 along rotated axes, far from the origin."""
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    return torch.randn(count, 4, generator=generator) * torch.tensor([5.0, 2.0, 0.5, 0.1]) @ rotation + 100


def test_directions_agree_with_scikit_learn() -> None:
    z = stretched()
    found, pca = principal_directions(z, 3), PCA(3, svd_solver="full").fit(z.double().numpy())
    cosines = (found.components.double().numpy() * pca.components_).sum(1)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-4)
    np.testing.assert_allclose(found.stddevs, np.sqrt(pca.explained_variance_), rtol=1e-4)
    np.testing.assert_allclose(found.variance_shares, pca.explained_variance_ratio_, rtol=1e-4)
    np.testing.assert_allclose(found.mean, pca.mean_, rtol=1e-6)


def test_signs_do_not_depend_on_the_order_of_rows() -> None:
    z = stretched()
    first, second = principal_directions(z, 4), principal_directions(z.flip(0), 4)
    torch.testing.assert_close(first.components, second.components, rtol=1e-4, atol=1e-4)
    largest = first.components.gather(1, first.components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_fewer_latents_than_dims() -> None:
    z = torch.randn(5, 20)
    found = principal_directions(z, 4)
    torch.testing.assert_close(found.components @ found.components.T, torch.eye(4), atol=1e-5, rtol=0)
    assert float(found.variance_shares.sum()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="1 to 4"):
        principal_directions(z, 5)


def test_directions_refuse_nan() -> None:
    with pytest.raises(ValueError, match="NaN"):
        principal_directions(torch.full((5, 3), math.nan), 1)


def test_traversal_moves_by_standard_deviations() -> None:
    z = stretched()
    found = principal_directions(z, 2)
    walk = traverse(z[:3], found, 1, amounts=(-2, 0, 1))
    assert walk.shape == (3, 3, 4)
    torch.testing.assert_close(walk[:, 1], z[:3])
    moved = (walk - z[:3, None]) @ found.components.T  # [3, 3, 2]
    expected = torch.stack([torch.zeros(3), torch.tensor([-2.0, 0, 1]) * found.stddevs[1]], dim=1)
    torch.testing.assert_close(moved, expected.expand(3, 3, 2), atol=1e-3, rtol=1e-3)


def test_traversal_refuses_what_is_not_there() -> None:
    found = principal_directions(stretched(), 2)
    with pytest.raises(ValueError, match="directions 0 to 1"):
        traverse(torch.zeros(4), found, 2)
    with pytest.raises(ValueError, match="5 dims"):
        traverse(torch.zeros(5), found, 0)


def test_gaussian_latents_have_the_mean_and_covariance_of_the_given() -> None:
    z = stretched()
    drawn = gaussian_latents(z, 20_000, seed=3)
    spread = torch.cov(z.T)
    torch.testing.assert_close(drawn.mean(0), z.mean(0), atol=0.2, rtol=0)
    assert float((torch.cov(drawn.T) - spread).norm() / spread.norm()) < 0.05
    assert torch.equal(drawn[:5], gaussian_latents(z, 5, seed=3))
    assert not torch.equal(drawn[:5], gaussian_latents(z, 5, seed=4))
