"""A run: exact resumption, interruption, skipped steps, accumulation, milestones, settings that do not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from soda_engine.config import CadenceConfig, OptimConfig, TrainConfig
from soda_engine.data.datasets import TensorDataset
from soda_engine.data.loaders import Batch
from soda_engine.data.views import views_preset
from soda_engine.train import distributed
from soda_engine.train.checkpoint import list_checkpoints, load
from soda_engine.train.settings import alone_in
from soda_engine.train.trainer import Trainer, TrainingStopped
from soda_kernels import explain, philox_uniform, use_backend
from tests.engine.tiny import tiny_model, tiny_run
from tests.harness.host_sync import HostSyncError, NoHostSync


def records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def interrupt_at(trainer: Trainer, step: int) -> None:
    """Send this process a Ctrl-C while the trainer is in the given step."""
    take_step = trainer.step

    def step_and_interrupt(*args: Any) -> None:
        if trainer.progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        take_step(*args)

    trainer.step = step_and_interrupt  # type: ignore[method-assign]


def test_an_interrupted_run_continues_with_the_same_losses_to_the_bit(tmp_path: Path, capsys: Any) -> None:
    whole, cut = (tiny_run(tmp_path / name, cadence=CadenceConfig(log_images=32)) for name in ("whole", "cut"))
    Trainer(whole).train()
    first = Trainer(cut)
    interrupt_at(first, 2)
    handler = signal.getsignal(signal.SIGINT)
    assert first.train().images == 48
    assert signal.getsignal(signal.SIGINT) is handler
    assert "interrupted at 48 images" in capsys.readouterr().err
    assert Trainer(cut).train().images == 96
    losses = [[(r["images"], r["loss"], r["window_loss"]) for r in records(tmp_path / n)] for n in ("whole", "cut")]
    assert losses[0] == losses[1]
    assert [images for images, _, _ in losses[0]] == [32, 64, 96]
    for ema in (True, False):
        expected, got = (load(tmp_path / name, ema=ema).state_dict() for name in ("whole", "cut"))
        assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_killed_run_drops_the_records_after_its_checkpoint(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, cadence=CadenceConfig(log_images=16, checkpoint_images=32))
    trainer = Trainer(config)
    take_step = trainer.step

    def step_and_die(*args: Any) -> None:
        if trainer.progress.step == 3:
            raise MemoryError
        take_step(*args)

    trainer.step = step_and_die  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        trainer.train()
    assert [r["images"] for r in records(tmp_path)] == [16, 32, 48]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "ima')
    Trainer(config).train()
    assert [r["images"] for r in records(tmp_path)] == [16, 32, 48, 64, 80, 96]


def test_the_loss_falls_and_the_log_says_what_a_run_needs(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, total_images=16 * 40, model=tiny_model(dropout=0.0))
    Trainer(config).train()
    log = records(tmp_path)
    assert sum(r["loss"] for r in log[-5:]) < 0.8 * sum(r["loss"] for r in log[:5])
    expected = {
        "images", "step", "loss", "window_loss", "lr", "grad_norm_encoder", "grad_norm_denoiser", "images_per_second",
        "seconds", "skipped_steps", "skipped_images",
    }  # fmt: skip
    assert expected <= log[-1].keys()
    assert log[-1]["grad_norm_encoder"] > 0
    assert log[0]["lr"] == pytest.approx(config.optim.lr * 16 / 32)


def test_a_step_with_a_nan_loss_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny_run(tmp_path))
    batches = trainer._batches()
    trainer.step(next(batches))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    average = {name: tensor.clone() for name, tensor in trainer.ema.model.state_dict().items()}
    forward = trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", lambda *a, **k: forward(*a, **k) * float("nan"))
    trainer.step(next(batches))
    metrics = trainer.read()
    assert metrics["loss"] != metrics["loss"]
    assert (trainer.progress.images, trainer.progress.step, trainer.progress.skipped_steps) == (32, 2, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert all(torch.equal(average[name], tensor) for name, tensor in trainer.ema.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_step_would_not_wait_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "soda_engine.train.distributed.start", lambda _: distributed.Processes(0, 1, torch.device("meta"))
    )
    config = tiny_run(tmp_path, views=views_preset("classification"), accumulate=2)
    trainer = Trainer(dataclasses.replace(config, model=tiny_model(dropout=0.1), precision="fp32"))
    batches = trainer._batches()
    trainer.model.schedule  # noqa: B018  moved to the device once, which waits
    with NoHostSync() as watch:
        for _ in range(2):
            trainer.step(next(batches).pin_memory())
    assert watch.ops["denoising_loss_backward"] == 4 and watch.ops["_fused_adamw_"] == 2 * 4  # groups
    with NoHostSync(), pytest.raises(HostSyncError, match="copy of .* from meta waits"):
        trainer.read()


def test_how_often_losses_are_read_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, weights = [], []
    for read_every in (1, 4, 100):
        config = tiny_run(tmp_path / str(read_every), cadence=CadenceConfig(log_images=48, checkpoint_images=64))
        trainer = Trainer(config)
        trainer.read_every = read_every
        forward = trainer.model.forward

        def sometimes_nan(*args: Any, _forward: Any = forward, **kwargs: Any) -> Tensor:
            losses: Tensor = _forward(*args, **kwargs)
            return losses * float("nan") if kwargs["step"] in (0, 3) else losses

        monkeypatch.setattr(trainer.model, "forward", sometimes_nan)
        assert trainer.train().skipped_steps == 2
        timed = ("seconds", "images_per_second")
        lines.append([{k: v for k, v in r.items() if k not in timed} for r in records(tmp_path / str(read_every))])
        weights.append([trainer.model.state_dict(), trainer.ema.model.state_dict(), trainer.optimizer.state_dict()])
    assert lines[0] == lines[1] == lines[2] and [line["images"] for line in lines[0]] == [48, 96]
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=0)


def test_bad_steps_in_a_row_stop_the_run_and_good_ones_start_the_count_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny_run(tmp_path, max_bad_steps=2, total_images=16 * 20))
    forward = trainer.model.forward
    bad = {1, 3, 6, 7}

    def sometimes_infinite(*args: Any, **kwargs: Any) -> Tensor:
        losses = forward(*args, **kwargs)
        return losses + float("inf") if trainer.progress.step in bad else losses

    monkeypatch.setattr(trainer.model, "forward", sometimes_infinite)
    with pytest.raises(TrainingStopped, match=r"not finite for 2 steps.*saved as .*000000000128; try --precision fp32"):
        trainer.train()
    assert trainer.progress.step == 8
    assert trainer.progress.skipped_steps == 4


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    results = []
    for accumulate in (1, 3):
        trainer = Trainer(tiny_run(tmp_path / str(accumulate), accumulate=accumulate))
        trainer.model.encoder.eval()  # batch norms see the parts: only without them the sum is exact
        batches = trainer._batches()
        results.append([(trainer.step(next(batches)), trainer.read())[1] for _ in range(4)])
    for whole, parts in zip(*results, strict=True):
        assert parts == pytest.approx(whole, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_kernels_setting_chooses_the_ops_that_a_step_calls(tmp_path: Path, kernels: str) -> None:
    trainer, chosen = Trainer(tiny_run(tmp_path, kernels=kernels, total_images=16)), []
    forward = trainer.model.forward

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        (choice, *_) = explain(philox_uniform, (1,), seed=0, sample_ids=torch.tensor([0])).choices
        chosen.append(choice.reason)
        return forward(*args, **kwargs)

    trainer.model.forward = spy  # type: ignore[method-assign]
    trainer.train()
    assert [reason == "asked for by use_backend" for reason in chosen] == [kernels == "reference"]


@pytest.mark.parametrize("change", [{"channels_last": False}, {"kernels": "reference"}], ids=lambda c: next(iter(c)))
def test_layout_and_kernels_change_speed_alone(tmp_path: Path, change: dict[str, Any]) -> None:
    losses = []
    for name, fields in (("base", {}), ("changed", change)):
        Trainer(tiny_run(tmp_path / name, **fields)).train()
        losses.append([r["loss"] for r in records(tmp_path / name)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.exhaustive  # a thousand steps each; the losses of as many steps at equal weights are the next test's
@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 2.0**-24), ("bf16", 2.0**-9)])
def test_kernels_change_two_hundred_steps_as_rounding_does(tmp_path: Path, precision: str, rounding: float) -> None:
    """The measure is the reference itself, with its initial weights off by half a unit in the last place.

    How far two such runs drift apart is a draw: of five in fp32, 0.2% to 0.8% in the mean. So there are three.
    """
    nudges = ("nudged 1", "nudged 2", "nudged 3")
    curves = {}
    for name in ("reference", "auto", *nudges):
        kernels = "auto" if name == "auto" else "reference"
        trainer = Trainer(tiny_run(tmp_path / name, kernels=kernels, precision=precision, total_images=16 * 200))
        if name in nudges:
            generator = torch.Generator().manual_seed(int(name[-1]))
            with torch.no_grad():
                for weight in trainer.model.parameters():
                    sign = 2.0 * torch.randint(0, 2, weight.shape, generator=generator) - 1.0
                    weight.mul_(1.0 + rounding * sign)
        trainer.train()
        curves[name] = torch.tensor([record["loss"] for record in records(tmp_path / name)], dtype=torch.float64)
    reference = curves.pop("reference")
    assert len(reference) == 200
    auto, *nudged = (((curve - reference) / reference).abs() for curve in curves.values())
    assert auto[0] <= 100 * rounding  # before the first update
    assert auto.mean() <= 3 * torch.stack(nudged).mean()
    assert auto.max() <= 3 * torch.stack([each.max() for each in nudged]).mean()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_hundred_losses_with_the_same_weights_and_noise(tmp_path: Path, precision: str) -> None:
    """At each step of a run on the kernels the reference scores the same weights: drift has no part in what differs.

    `diffusion` has kernels for drawing, noising and the loss alone, whose normals differ by an ulp or so from the
    reference's; in bf16 that now and then turns into another rounding of a value of x_t.
    """
    trainer = Trainer(tiny_run(tmp_path, kernels="auto", precision=precision, total_images=16 * 200))
    forward = trainer.model.forward
    differences: dict[str, list[float]] = {"auto": [], "diffusion": []}

    def scored_by_all(*args: Any, **kwargs: Any) -> Tensor:
        losses: Tensor = forward(*args, **kwargs)
        with torch.no_grad(), use_backend("reference"):
            expected = forward(*args, **kwargs).double()
            with kernels_of_the_diffusion_family():
                diffusion = forward(*args, **kwargs)
        for name, got in (("auto", losses.detach()), ("diffusion", diffusion)):
            differences[name].append(float(((got - expected).abs() / expected).max()))
        return losses

    trainer.model.forward = scored_by_all  # type: ignore[method-assign]
    trainer.train()
    rounding = {"fp32": 2.0**-24, "bf16": 2.0**-9}[precision]
    assert len(differences["auto"]) == len(differences["diffusion"]) == 200
    # Seen: 9.4 roundings in fp32, where a loss follows the few ulp of its normals, and 1.2 in bf16.
    assert 0 < max(differences["diffusion"]) <= {"fp32": 16, "bf16": 4}[precision] * rounding
    assert max(differences["auto"]) <= 100 * rounding


@contextlib.contextmanager
def kernels_of_the_diffusion_family() -> Iterator[None]:
    """Give the ops of noise-schedule sampling their kernels while all others run on the reference."""
    with contextlib.ExitStack() as stack:
        for name in ("api", "api_random", "api_sampler"):
            stack.enter_context(patch(f"soda_kernels.diffusion.{name}.current_ops", lambda: torch.ops.soda_kernels))
        yield


def test_bf16_trains(tmp_path: Path) -> None:
    Trainer(tiny_run(tmp_path / "bf16", precision="bf16")).train()
    Trainer(tiny_run(tmp_path / "fp32", precision="fp32")).train()
    bf16, fp32 = ([r["loss"] for r in records(tmp_path / name)] for name in ("bf16", "fp32"))
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=0.05)
    assert all(p.dtype == torch.float32 for p in load(tmp_path / "bf16").parameters())


def test_milestones_draw_probe_and_keep_the_newest_checkpoints(tmp_path: Path) -> None:
    cadence = CadenceConfig(log_images=16, checkpoint_images=16, sample_images=48, probe_images=96, keep_checkpoints=2)
    Trainer(tiny_run(tmp_path, cadence=cadence, tensorboard=True)).train()
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"{80:012d}", f"{96:012d}"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [f"{48:012d}.png", f"{96:012d}.png"]
    (probe,) = records(tmp_path, "probe")
    assert 0.1 < probe["linear_probe"] <= 1 and 0 <= probe["knn"] <= 1
    assert any(path.name.startswith("events.") for path in (tmp_path / "tensorboard").iterdir())


def test_max_minutes_saves_and_stops(tmp_path: Path, capsys: Any) -> None:
    assert Trainer(tiny_run(tmp_path, max_minutes=0.0)).train().images == 16
    assert "the same command goes on" in capsys.readouterr().err
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"{16:012d}"]


def test_unreadable_images_are_counted_and_named(tmp_path: Path, capsys: Any) -> None:
    trainer = Trainer(tiny_run(tmp_path))
    whole = trainer.train_set.read

    def read(indices: Any) -> tuple[Tensor, list[int], list[str]]:
        images, kept, _ = whole(indices)
        return images[1:], kept[1:], [trainer.train_set.name(indices[0])]

    trainer.train_set.read = read  # type: ignore[method-assign]
    progress = trainer.train()
    assert progress.skipped_images == 6
    assert progress.images == 96
    assert "skipped an unreadable image: digits train image" in capsys.readouterr().err
    assert len(records(tmp_path, "skipped_image")) == 6


def test_a_batch_without_a_readable_image_takes_no_step(tmp_path: Path) -> None:
    trainer = Trainer(tiny_run(tmp_path))
    before = [p.clone() for p in trainer.model.parameters()]
    none = torch.empty(0, dtype=torch.int64)
    trainer.step(Batch(torch.empty(0, 1, 8, 8, dtype=torch.uint8), none, none, none, ["x"] * 16))
    trainer.read()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert (trainer.progress.images, trainer.progress.skipped_steps) == (16, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulate": 17}, "accumulate is 17"),
        ({"total_images": 0}, "total_images is 0"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"model": tiny_model(in_channels=3)}, "model.denoiser.in_channels is 3 and dataset.channels 1"),
        ({"data": "no/such/folder"}, "no/such/folder"),
        ({"threads": 0}, "threads is 0"),
        ({"max_minutes": -1.0}, "max_minutes is -1.0"),
        ({"optim": OptimConfig(lr=-1.0)}, "optim.lr is -1.0"),
        ({"optim": OptimConfig(ema_decay=2.0)}, "optim.ema_decay is 2.0"),
        ({"cadence": CadenceConfig(log_images=-5)}, "cadence.log_images is -5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit_are_one_clear_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        Trainer(tiny_run(tmp_path / "run", **change))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    config: TrainConfig = tiny_run(tmp_path, max_minutes=0.0)
    Trainer(config).train()
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1.0))
    with pytest.raises(ValueError, match=r"was started with optim.lr = 0.002, not 1.0; .*another --out"):
        Trainer(other)
    loading = dataclasses.replace(config.dataset, memory_mib=0, workers=1)  # which changes no image
    assert Trainer(dataclasses.replace(config, max_minutes=None, dataset=loading)).train().images == 96


def test_waiting_for_the_device_is_training_time(tmp_path: Path) -> None:
    trainer, fetch = Trainer(tiny_run(tmp_path)), Tensor.tolist
    trainer.step(next(trainer._batches()))
    before = trainer.progress.seconds
    with patch.object(Tensor, "tolist", lambda self: (time.sleep(0.05), fetch(self))[1]):
        trainer.read()
    assert trainer.progress.seconds - before >= 0.05


def test_the_length_of_a_cosine_run_is_part_of_it(tmp_path: Path) -> None:
    base = tiny_run(tmp_path, max_minutes=0.0)
    config = dataclasses.replace(base, optim=dataclasses.replace(base.optim, schedule="cosine"))
    Trainer(config).train()
    with pytest.raises(ValueError, match="was started with total_images = 96, not 192"):
        Trainer(dataclasses.replace(config, total_images=192))


def test_a_data_set_that_grew_is_not_resumed(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, max_minutes=0.0)
    Trainer(config).train()
    images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("soda_engine.train.trainer.open_dataset", lambda *_, **__: TensorDataset(images))
        with pytest.raises(ValueError, match="was trained on 1,257 images, and 'digits' holds 20"):
            Trainer(config)


def test_data_without_labels_do_not_end_a_run(tmp_path: Path, capsys: Any) -> None:
    cadence = CadenceConfig(log_images=16, probe_images=32, sample_images=0, checkpoint_images=0)
    images = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("soda_engine.train.trainer.open_dataset", lambda *_, **__: TensorDataset(images))
        assert Trainer(tiny_run(tmp_path, cadence=cadence)).train().images == 96
    assert "no picture or probe at 32 images" in capsys.readouterr().err


def test_the_log_stays_json_where_a_loss_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny_run(tmp_path))
    forward = trainer.model.forward
    monkeypatch.setattr(
        trainer.model, "forward",
        lambda *a, **k: forward(*a, **k) * (float("nan") if trainer.progress.step == 1 else 1.0),
    )  # fmt: skip
    trainer.train()
    assert [r["loss"] is None for r in records(tmp_path)] == [False, True, False, False, False, False]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_refused_resume_changes_nothing(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, max_minutes=0.0)
    Trainer(config).train()
    before = (tmp_path / "config.json").read_text()
    images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("soda_engine.train.trainer.open_dataset", lambda *_, **__: TensorDataset(images))
        with pytest.raises(ValueError, match="holds 20"):
            Trainer(dataclasses.replace(config, data="elsewhere"))
    assert (tmp_path / "config.json").read_text() == before


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(ValueError, match="another process trains in"):
        Trainer(tiny_run(tmp_path)).train()
    assert Trainer(tiny_run(tmp_path)).train().images == 96


def test_a_run_that_could_not_take_a_step_says_so(tmp_path: Path) -> None:
    trainer = Trainer(tiny_run(tmp_path))
    none = torch.empty(0, 1, 8, 8, dtype=torch.uint8)
    trainer.train_set.read = lambda indices: (none, [], ["x"] * len(indices))  # type: ignore[method-assign]
    with pytest.raises(TrainingStopped, match="none of 6 steps could be taken"):
        trainer.train()
    assert not list_checkpoints(tmp_path)


def test_a_finished_run_logs_its_last_images_and_says_that_it_is_complete(tmp_path: Path, capsys: Any) -> None:
    config = tiny_run(tmp_path, cadence=CadenceConfig(log_images=64, sample_images=0, probe_images=0))
    Trainer(config).train()
    assert [r["images"] for r in records(tmp_path)] == [64, 96]
    assert "96 images seen" in capsys.readouterr().err
    Trainer(config).train()
    assert [r["images"] for r in records(tmp_path)] == [64, 96]
    assert "is complete" in capsys.readouterr().err
