"""`--profile`: what a trace names, that it changes nothing, and what is said where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from soda_engine.config import CadenceConfig
from soda_engine.train.checkpoint import load
from soda_engine.train.profiling import traced
from soda_engine.train.trainer import Trainer
from tests.engine.tiny import tiny_run
from tests.engine.tiny_soda import tiny_soda

PHASES = {"data", "views", "encode", "denoise", "loss", "backward", "optimizer", "ema", "checkpoint"}
KERNELS = {"add_noise", "modulated_group_norm", "modulated_group_norm_backward", "denoising_loss", "attention"}


def events(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trace.json").read_text())["traceEvents"]


def test_a_profiled_run_names_its_phases_and_is_the_same_run(tmp_path: Path, capsys: Any) -> None:
    cadence = CadenceConfig(log_images=16, checkpoint_images=64, sample_images=0, probe_images=0)
    for profile in (False, True):
        Trainer(tiny_run(tmp_path / str(profile), total_images=12 * 16, profile=profile, cadence=cadence)).train()
    folder = tmp_path / "True" / "profile"
    assert f"traced 5 steps: {folder / 'trace.json'}" in capsys.readouterr().err
    found = [event["name"] for event in events(folder) if event.get("ph") == "X"]
    assert {name for name in PHASES if found.count(name) != 5} == {"checkpoint"}  # once in 4 steps
    assert {f"soda_kernels.{name}" for name in KERNELS} <= set(found)
    assert "soda_kernels.modulated_group_norm_backward" in (folder / "operators.txt").read_text()
    assert not (tmp_path / "False" / "profile").exists()
    plain, profiled = (load(tmp_path / str(profile)).state_dict() for profile in (False, True))
    assert all(torch.equal(plain[name], profiled[name]) for name in plain)


def test_a_run_too_short_to_trace_says_so(tmp_path: Path, capsys: Any) -> None:
    Trainer(tiny_run(tmp_path, total_images=32, profile=True)).train()
    assert "no trace: the run ended after 2 steps, and tracing begins after 5" in capsys.readouterr().err
    assert not (tmp_path / "profile" / "trace.json").exists()


@pytest.mark.parametrize("num_steps", [2, 3], ids=["none-of-it", "one-step"])
def test_an_interrupted_window_keeps_what_it_has(num_steps: int, tmp_path: Path) -> None:
    said: list[str] = []
    with traced(tmp_path, said.append, warm_up=2) as end_step:
        for _ in range(num_steps):
            torch.ones(3).sum()
            end_step()
    assert len(said) == 1 and said[0].startswith("traced 1 step" if num_steps == 3 else "no trace")


def test_sampling_and_encoding_are_named(tmp_path: Path) -> None:
    model = tiny_soda()
    with traced(tmp_path, lambda line: None, warm_up=1) as end_step:
        for _ in range(2):
            z = model.encode(torch.zeros(2, 3, 8, 8))
            model.sample(z, num_steps=4)
            end_step()
    found = [event["name"] for event in events(tmp_path) if event.get("ph") == "X"]
    names = ("encode", "denoise", "sampling step", "soda_kernels.sampler_step")
    assert [found.count(name) for name in names] == [1, 4, 4, 4]
