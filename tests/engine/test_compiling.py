"""Training with a compiled model: the same run, in one graph for all steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from soda_engine.models.soda import Soda
from soda_engine.models.unet import Denoiser
from soda_engine.records import read_json_lines
from soda_engine.train.compiling import compile_model
from soda_engine.train.trainer import Trainer
from tests.engine.tiny import tiny_run
from tests.engine.tiny_soda import tiny_soda


def traced(model: nn.Module, **options: Any) -> None:
    """In place of a module's `compile`: without a C++ compiler's minutes."""
    assert options == {"fullgraph": True, "mode": None}
    nn.Module.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run_in_one_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Soda, "compile", traced)
    torch._dynamo.reset()
    counters.clear()
    losses = {}
    for how in ("none", "default"):
        trainer = Trainer(tiny_run(tmp_path / how, compile=how, total_images=96, seed=2**64 - 3))
        trainer.train()
        records = read_json_lines(tmp_path / how / "metrics.jsonl")
        losses[how] = [record["loss"] for record in records if "loss" in record]
        names = set(trainer.model.state_dict())
    assert names == set(Soda(trainer.config.model).state_dict())
    assert len(losses["none"]) == 6
    assert losses["default"] == pytest.approx(losses["none"], rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_a_compiled_denoiser_samples_the_same_images_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Denoiser, "compile", traced)
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = tiny_soda().eval()
    z = torch.randn(4, model.config.latent.dim)
    options = {"num_steps": 4, "cfg_scale": 2.0, "seed": 3}
    expected = model.sample(z, **options)
    compile_model(model.denoiser, "default", model.device)
    torch.testing.assert_close(model.sample(z, **options), expected, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_graphs_need_a_gpu_and_one_backward_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compile is 'graphs', which need a GPU; on cpu it must be"):
        Trainer(tiny_run(tmp_path, compile="graphs"))
    with pytest.raises(ValueError, match="accumulate is 2; with compile graphs it must be 1"):
        Trainer(tiny_run(tmp_path, compile="graphs", accumulate=2))
