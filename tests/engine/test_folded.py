"""The folded encoder computes what the encoder does in evaluation mode."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from soda_engine.config import EncoderConfig
from soda_engine.models.encoder import ResNetEncoder
from soda_engine.models.folded import folded
from soda_engine.train.ema import Ema
from tests.numerics import assert_accurate_in_norm, assert_exact


def encoder_with_statistics(arch: str, stem: str) -> ResNetEncoder:
    """An encoder whose norms have other statistics than they start with."""
    torch.manual_seed(0)
    encoder = ResNetEncoder(EncoderConfig(arch=arch, stem=stem, width=8), 12).eval()  # type: ignore[arg-type]
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
            torch.nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return encoder


@pytest.mark.parametrize("stem", ["small", "imagenet"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_results_are_those_of_the_encoder(arch: str, stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_with_statistics(arch, stem)
    x = torch.randn(3, 3, 20, 20).to(memory_format=torch.channels_last)
    wide = copy.deepcopy(encoder).double()
    before, encode = x.clone(), folded(encoder)
    with torch.no_grad():
        plain, exact = encoder(x), wide(x.double())
        for _ in range(2):  # the second time from packed weights
            assert_accurate_in_norm(encode(x), plain, exact)
        assert_accurate_in_norm(encode(x.contiguous()), plain, exact)
        assert_accurate_in_norm(encode(x[:1]), plain[:1], exact[:1])
        assert_exact(folded(wide)(x.double()), exact)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert_accurate_in_norm(encode(x), plain, exact)
    assert torch.equal(x, before)


def test_under_autocast_convolutions_are_in_bf16() -> None:
    encoder = encoder_with_statistics("resnet18", "small")
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = copy.deepcopy(encoder).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            plain, z = encoder(x), folded(encoder)(x)
    assert z.dtype == plain.dtype == torch.bfloat16
    assert_accurate_in_norm(z, plain, exact)


CHANGES: dict[str, Callable[[ResNetEncoder], object]] = {
    "in-place": lambda encoder: encoder.conv1.weight.mul_(2),
    "through-data": lambda encoder: encoder.layer2[0].conv2.weight.data.mul_(2),
    "another-tensor": lambda encoder: setattr(encoder, "bn1", copy.deepcopy(encoder.layer1[0].bn1)),
    "statistics": lambda encoder: encoder.bn1.running_mean.add_(1),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_values_are_folded_anew(change: str) -> None:
    encoder = encoder_with_statistics("resnet18", "small")
    encode = folded(encoder)
    assert folded(encoder) is encode
    with torch.no_grad():
        CHANGES[change](encoder)
    assert_folded_anew(encoder, encode)


def test_a_moved_average_is_folded_anew() -> None:
    average = Ema(encoder_with_statistics("resnet18", "small"), 0.5)
    encode, source = folded(average.model), encoder_with_statistics("resnet18", "small")
    with torch.no_grad():
        source.conv1.weight.mul_(2)
    average.update(source)
    assert_folded_anew(average.model, encode)


@torch.no_grad()
def assert_folded_anew(encoder: ResNetEncoder, before: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Require another function, whose results are those of a copy that was never folded."""
    x = torch.randn(2, 3, 16, 16)
    assert folded(encoder) is not before
    assert torch.equal(folded(encoder)(x), folded(copy.deepcopy(encoder))(x))
    assert not torch.equal(folded(encoder)(x), before(x))


def test_what_was_folded_goes_with_its_encoder() -> None:
    encoder = encoder_with_statistics("resnet18", "small")
    gone = weakref.ref(folded(encoder))
    del encoder
    gc.collect()
    assert gone() is None
