"""The optimizer's groups, the learning rate's course, and the moving average."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from soda_engine.config import OptimConfig
from soda_engine.models.soda import Soda
from soda_engine.train.ema import Ema
from soda_engine.train.optim import build_optimizer, learning_rate_factor, set_learning_rate, split_by_decay
from tests.engine.tiny import tiny_model


def test_every_parameter_is_in_one_group_with_its_rate() -> None:
    model, config = Soda(tiny_model(cross_attention=True)), OptimConfig(lr=1e-3, encoder_lr_multiplier=2.0)
    optimizer = build_optimizer(model, config)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        assert group["lr"] == pytest.approx(2e-3 if name.startswith("encoder.") else 1e-3), name
        assert group["betas"] == (0.9, 0.95)
        if parameter.ndim <= 1 or "bn" in name or "norm" in name:
            assert group["weight_decay"] == 0.0, name
    assert group_of[id(model.encoder.conv1.weight)]["weight_decay"] == 0.05
    assert group_of[id(model.encoder.fc.weight)]["weight_decay"] == 0.05
    assert group_of[id(model.encoder.fc.bias)]["weight_decay"] == 0.0


def test_embeddings_and_norms_do_not_decay() -> None:
    module = nn.ModuleList([nn.Embedding(3, 4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)])
    decayed, plain = split_by_decay(module)
    assert [id(p) for p in decayed] == [id(module[3].weight)]
    assert len(plain) == 1 + 2 + 2 + 1


@pytest.mark.parametrize(
    ("schedule", "images", "expected"),
    [
        ("constant", 50, 0.5),
        ("constant", 100, 1.0),
        ("constant", 1000, 1.0),
        ("cosine", 50, 0.5),
        ("cosine", 100, 1.0),
        ("cosine", 550, 0.5),
        ("cosine", 1000, 0.0),
        ("cosine", 2000, 0.0),
    ],
)
def test_learning_rate_factor(schedule: str, images: int, expected: float) -> None:
    config = OptimConfig(warmup_images=100, schedule=schedule)  # type: ignore[arg-type]
    assert learning_rate_factor(images, 1000, config) == pytest.approx(expected, abs=1e-12)


def test_no_warmup() -> None:
    assert learning_rate_factor(0, 1000, OptimConfig(warmup_images=0)) == 1.0


def test_set_learning_rate_keeps_the_ratio_of_the_groups() -> None:
    optimizer = build_optimizer(Soda(tiny_model()), OptimConfig(lr=1e-3))
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25e-3, 0.5e-3}


def test_ema_follows_the_formula() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    ema, expected = Ema(model, decay=0.5), 0.0
    for step in range(20):
        nn.init.constant_(model.weight, float(step))
        ema.update(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(ema.model.weight) == pytest.approx(expected, rel=1e-6)


def test_ema_copies_buffers_and_trains_nothing() -> None:
    model = nn.BatchNorm2d(3)
    ema = Ema(model, decay=0.999)
    model(torch.randn(4, 3, 2, 2) + 5)
    ema.update(model)
    assert torch.equal(ema.model.running_mean, model.running_mean)
    assert int(ema.model.num_batches_tracked) == 1
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
