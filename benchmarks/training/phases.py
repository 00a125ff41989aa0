"""A training step by phase: launches and bytes as on a GPU, and times on this CPU.

    python -m benchmarks.training.phases --preset cifar10 --json PATH

The share of the views decides whether they need kernels of their own. On a GPU it is a prediction: launches and bytes
are counted over meta tensors, and each op takes the time that an H200 needs at its ceilings, at least 2 us a launch.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.commands.arguments import Parser, result_file
from benchmarks.records import describe_environment
from benchmarks.tables import table
from benchmarks.training.launches import LEAST_US, Launches
from soda_engine.config import TrainConfig
from soda_engine.data.views import make_view
from soda_engine.models.soda import Soda
from soda_engine.presets import PRESETS
from soda_engine.records import write_json
from soda_engine.train.ema import Ema
from soda_engine.train.optim import Statistics, build_optimizer, clip_and_step
from tests.harness.host_sync import NoHostSync

Phases = dict[str, Callable[[], Any]]


def build_phases(config: TrainConfig, device: str) -> Phases:
    """Return the phases of a training step on random images, to be called in order."""
    on_gpu = device == "meta"  # which stands for one
    model = _model(config, device)
    # On a GPU activations are bf16, while the optimizer works on fp32 weights.
    weights, dtype = (_model(config, device), torch.bfloat16) if on_gpu else (model, torch.float32)
    model.to(dtype)
    model.schedule  # noqa: B018  moved to the device once, which is no part of a step
    ema, optimizer, buffers = Ema(weights, 0.9999), build_optimizer(weights, config.optim), Statistics(weights)
    count, size, channels = config.batch_size, config.dataset.image_size, config.dataset.channels
    coarse = torch.rand(count, channels, max(1, size // 8), max(1, size // 8))
    images = F.interpolate(coarse, size=(size, size), mode="bilinear").mul_(255).to(torch.uint8).to(device)
    ids = torch.arange(count)
    key: dict[str, Any] = {"seed": 0, "sample_ids": ids, "epochs": torch.zeros_like(ids)}
    device_ids = ids.to(device)
    state: dict[str, Any] = {}

    def views() -> None:
        for role, pipeline, side in (
            ("source", config.views.source, config.model.encoder.image_size),
            ("target", config.views.target, config.model.denoiser.image_size),
        ):
            view = make_view(images, pipeline, side, role=role, **key)  # type: ignore[arg-type]
            state[role] = view.to(dtype, memory_format=torch.channels_last)

    def forward() -> None:
        state["loss"] = model(state["source"], state["target"], seed=0, sample_ids=device_ids, step=0).mean()

    def backward() -> None:
        state.pop("loss").backward()
        if on_gpu:
            model.zero_grad(set_to_none=True)
            for weight in weights.parameters():
                weight.grad = torch.empty_like(weight)

    def optimize() -> None:
        before = buffers.copy()
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights.parameters() if p.grad is not None])
        skip = 1 - norm.isfinite().float()
        clip_and_step(optimizer, norm, config.optim.grad_clip, skip)
        buffers.undo(before, skip)
        ema.update(weights, skip)
        optimizer.zero_grad(set_to_none=True)

    return {"views": views, "forward": forward, "backward": backward, "optimizer, EMA": optimize}


def _model(config: TrainConfig, device: str) -> Soda:
    model: nn.Module = Soda(config.model).to(device)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def gpu_rows(config: TrainConfig) -> list[dict[str, Any]]:
    """Count each phase as on a GPU, and predict its time."""
    rows = []
    phases = build_phases(config, "meta")
    with NoHostSync():  # the first step also makes the optimizer's state
        for phase in phases.values():
            phase()
    for name, phase in phases.items():
        with Launches() as counted:
            phase()
        rows.append({"phase": name, **counted.row()})
    return _with_shares(rows, "predicted_us")


def cpu_rows(config: TrainConfig, seconds: float) -> list[dict[str, Any]]:
    """Time each phase on this CPU for about so many seconds; the median of the steps after the first."""
    phases = build_phases(config, "cpu")
    times: dict[str, list[float]] = {name: [] for name in phases}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times["views"]) < 3:
        for name, phase in phases.items():
            start = time.perf_counter()
            phase()
            times[name].append((time.perf_counter() - start) * 1e3)
    return _with_shares([{"phase": name, "ms": statistics.median(taken[1:])} for name, taken in times.items()], "ms")


def _with_shares(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    total = sum(row[key] for row in rows)
    return [row | {"share": row[key] / total} for row in rows]


def main() -> None:
    """Print the table, and keep the rows."""
    parser = Parser(description=__doc__.split("\n")[0], prog="python -m benchmarks.training.phases")
    parser.add_argument("--preset", default="cifar10", choices=sorted(PRESETS))
    parser.add_argument("--cpu-batch", type=int, help="images a step on the CPU; the preset's if not given")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the CPU's times; 0 leaves them out")
    parser.add_argument("--json", type=result_file, help="write the rows to this file")
    options = parser.parse_args()
    config = PRESETS[options.preset]
    gpu = gpu_rows(config)
    print(f"{options.preset}, batch {config.batch_size}, as on an H200 (prediction; at least {LEAST_US} us a launch)")
    print(table(
        ("phase", "launches", "GB", "TFLOP", "ms", "share"),
        ((r["phase"], str(r["launches"]), f"{r['bytes'] / 1e9:.3f}", f"{r['flops'] / 1e12:.3f}",
          f"{r['predicted_us'] / 1e3:.2f}", f"{r['share']:.1%}") for r in gpu),
    ))  # fmt: skip
    cpu: list[dict[str, Any]] = []
    batch = options.cpu_batch or config.batch_size
    if options.seconds:
        cpu = cpu_rows(dataclasses.replace(config, batch_size=batch), options.seconds)
        print(f"\n{options.preset}, batch {batch}, on this CPU with {torch.get_num_threads()} threads")
        print(table(("phase", "ms", "share"), ((r["phase"], f"{r['ms']:.2f}", f"{r['share']:.1%}") for r in cpu)))
    if options.json:
        env = describe_environment(torch.device("cpu"))
        write_json(options.json, {
            "preset": options.preset, "gpu_batch": config.batch_size, "gpu": gpu, "cpu_batch": batch, "cpu": cpu,
            "env": env,
        })  # fmt: skip


if __name__ == "__main__":
    main()
