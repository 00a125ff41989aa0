"""Checkpoints: whole or absent whenever a process dies, exact, without pickles, and loud about damage."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from soda_engine.config import CadenceConfig, SodaConfig, from_dict
from soda_engine.train.checkpoint import list_checkpoints, load, load_checkpoint
from soda_engine.train.trainer import Trainer
from tests.engine.tiny import tiny_run


def trained(out: Path, **fields: Any) -> Trainer:
    cadence = CadenceConfig(log_images=0, checkpoint_images=16, sample_images=0, probe_images=0, keep_checkpoints=3)
    trainer = Trainer(tiny_run(out, **{"cadence": cadence, "total_images": 48, **fields}))
    trainer.train()
    return trainer


def test_everything_comes_back_exactly(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    fresh = Trainer(tiny_run(tmp_path, cadence=trainer.config.cadence, total_images=48))
    assert fresh.progress == trainer.progress
    for old, new in ((trainer.model, fresh.model), (trainer.ema.model, fresh.ema.model)):
        assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True))
    for old, new in zip(trainer.model.parameters(), fresh.model.parameters(), strict=True):
        expected, got = trainer.optimizer.state[old], fresh.optimizer.state[new]
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected)
        assert got["exp_avg"].stride() == new.stride()


def test_files_are_safetensors_and_json_with_the_config_inside(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    newest = list_checkpoints(tmp_path)[-1]
    assert {path.suffix for path in newest.iterdir()} == {".safetensors", ".json"}
    header = (newest / "ema.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    metadata = json.loads(header[8 : 8 + size])["__metadata__"]
    assert from_dict(SodaConfig, json.loads(metadata["soda_config"])) == trainer.config.model
    assert newest.stat().st_mode & 0o777 == 0o755  # others may read it
    assert {path.stat().st_mode & 0o777 for path in newest.iterdir()} == {0o644}


def test_load_takes_a_run_a_checkpoint_or_a_saved_model(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run")
    load(tmp_path / "run").save_pretrained(tmp_path / "saved")
    expected = trainer.ema.model.state_dict()
    for path in (tmp_path / "run", list_checkpoints(tmp_path / "run")[-1], tmp_path / "saved"):
        model = load(path)
        assert not model.training
        assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())
    raw = load(tmp_path / "run", ema=False).state_dict()
    assert all(torch.equal(tensor, raw[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, capsys: Any) -> None:
    trained(tmp_path)
    older, newest = list_checkpoints(tmp_path)[-2:]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="loading the checkpoint before it"):
        load(tmp_path, ema=False)
    resumed = Trainer(trained_config(tmp_path))
    assert resumed.progress.images == int(older.name) == 32
    assert newest.exists()  # nothing is touched before training
    resumed.train()
    assert "set aside, going on from the one before" in capsys.readouterr().err
    load(newest)  # the damaged one was set aside, and its place taken


def trained_config(out: Path) -> Any:
    return tiny_run(out, total_images=48, cadence=CadenceConfig(log_images=0, checkpoint_images=16, keep_checkpoints=3))


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    trainer = trained(tmp_path)
    path = list_checkpoints(tmp_path)[-1] / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"checkpoint .*{path.parent.name} cannot be loaded") as raised:
        load_checkpoint(path.parent, trainer.model, trainer.ema.model, trainer.optimizer)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[]", '{"images": "x"}', "not json"])
def test_a_nonsense_state_is_named(tmp_path: Path, text: str) -> None:
    trainer = trained(tmp_path)
    newest = list_checkpoints(tmp_path)[-1]
    (newest / "state.json").write_text(text)
    with pytest.raises(ValueError, match=f"checkpoint .*{newest.name} cannot be loaded"):
        load_checkpoint(newest, trainer.model, trainer.ema.model, trainer.optimizer)


def test_nothing_is_set_aside_where_no_checkpoint_can_be_resumed(tmp_path: Path) -> None:
    trained(tmp_path)
    for folder in list_checkpoints(tmp_path):
        (folder / "optimizer.safetensors").unlink()
    before = list_checkpoints(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint of .* can be resumed.*another --out"):
        Trainer(trained_config(tmp_path))
    assert list_checkpoints(tmp_path) == before
    load(tmp_path)


def test_a_full_disk_is_one_line_and_leaves_nothing_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trained(tmp_path)
    before = list_checkpoints(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("soda_engine.train.checkpoint.save_file", full)
    trainer.progress.images += 16
    with pytest.raises(OSError, match="no checkpoint could be written to .*earlier ones are whole") as raised:
        trainer.save()
    assert "\n" not in str(raised.value)
    assert list_checkpoints(tmp_path) == before
    assert not list((tmp_path / "checkpoints").glob(".unfinished-*"))


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model at"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"neither checkpoints nor model.safetensors"):
        load(tmp_path)


def test_the_same_images_are_saved_once_and_leftovers_go(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    newest = list_checkpoints(tmp_path)[-1]
    before = newest.stat().st_ino
    assert trainer.save() == newest
    assert newest.stat().st_ino == before
    leftover = tmp_path / "checkpoints" / ".unfinished-abc"
    leftover.mkdir()
    Trainer(trained_config(tmp_path)).train()
    assert not leftover.exists()


def train_without_end(config: Any) -> None:
    """Train and write a checkpoint after every step."""
    torch.set_num_threads(1)
    Trainer(dataclasses.replace(config, total_images=10**9)).train()


@pytest.mark.slow
def test_kill_9_at_ten_random_moments_never_loses_the_last_checkpoint(tmp_path: Path) -> None:
    trained(tmp_path, cadence=CadenceConfig(checkpoint_images=16, keep_checkpoints=1))
    config = tiny_run(tmp_path, total_images=48, cadence=CadenceConfig(checkpoint_images=16, keep_checkpoints=1))
    context, moments = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["soda_engine.train.trainer"])
    reached = 48
    for _ in range(10):
        process = context.Process(target=train_without_end, args=(config,))
        process.start()
        deadline = time.monotonic() + 60
        while int(list_checkpoints(tmp_path)[-1].name) <= reached and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.2))
        process.kill()
        process.join()
        newest = int(list_checkpoints(tmp_path)[-1].name)
        assert newest > reached
        resumed = Trainer(config)  # loads everything, or raises
        assert resumed.progress.images == newest
        load(tmp_path)
        reached = newest
