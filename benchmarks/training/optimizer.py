"""Ways to clip, step and average: what each launches and moves on a GPU, and how long it takes on this CPU.

    python -m benchmarks.training.optimizer --preset cifar10 --json PATH

Bytes are in units of all parameters (fp32), launches and bytes counted over meta tensors; the time on a GPU is a
prediction.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.commands.arguments import Parser, result_file
from benchmarks.records import describe_environment
from benchmarks.roofline import H200
from benchmarks.tables import table
from benchmarks.training.launches import LEAST_US, Launches, multi_tensor_launches
from soda_engine.config import OptimConfig
from soda_engine.models.soda import Soda
from soda_engine.presets import PRESETS
from soda_engine.records import write_json
from soda_engine.train.ema import Ema
from soda_engine.train.optim import build_optimizer, clip_and_step
from tests.harness.host_sync import NoHostSync

Step = Callable[[], None]


def _pytorchs(
    model: Soda, config: OptimConfig, average: Callable[[list[Tensor], list[Tensor]], Any], **kind: bool
) -> Step:
    """PyTorch's own clip, then its AdamW of some kind, then an average."""
    groups = [
        {key: group[key] for key in ("params", "weight_decay", "lr")}
        for group in build_optimizer(model, config).param_groups
    ]
    optimizer = torch.optim.AdamW(groups, betas=config.betas, **kind)
    parameters, averages = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
    foreach = None if kind.get("foreach", True) else False  # None: wherever there are multi-tensor kernels

    def step() -> None:
        nn.utils.clip_grad_norm_(parameters, config.grad_clip, foreach=foreach)
        optimizer.step()
        with torch.no_grad():
            average(averages, parameters)

    return step


def _lerp_each(averages: list[Tensor], parameters: list[Tensor]) -> None:
    for average, parameter in zip(averages, parameters, strict=True):
        average.lerp_(parameter, 1e-4)


def _lerp_all(averages: list[Tensor], parameters: list[Tensor]) -> None:
    torch._foreach_lerp_(averages, parameters, 1e-4)


def _engine(model: Soda, config: OptimConfig) -> Step:
    """What the trainer does: the clip is the fused kernel's scale and the average a fused step; both can be skipped."""
    optimizer, ema, parameters = build_optimizer(model, config), Ema(model, 0.9999), list(model.parameters())

    def step() -> None:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        skip = 1 - norm.isfinite().float()
        clip_and_step(optimizer, norm, config.grad_clip, skip)
        ema.update(model, skip)

    return step


WAYS: dict[str, Callable[[Soda, OptimConfig], Step]] = {
    "for-loop": lambda model, config: _pytorchs(model, config, _lerp_each, foreach=False, fused=False),
    "foreach": lambda model, config: _pytorchs(model, config, _lerp_all, foreach=True, fused=False),
    "fused AdamW, clip and EMA foreach": lambda model, config: _pytorchs(model, config, _lerp_all, fused=True),
    "engine: fused AdamW with clip, fused EMA": _engine,
}


def rows(preset: str = "cifar10", seconds: float = 3.0) -> list[dict[str, Any]]:
    """Return a row for each way, and one for kernels of our own that nobody wrote.

    Args:
        seconds: how long each way is timed on this CPU; 0 leaves that out.
    """
    config, found = PRESETS[preset], []
    for name, way in WAYS.items():
        model = _with_gradients(Soda(config.model).to("meta"))
        unit = sum(p.numel() * p.element_size() for p in model.parameters())
        step = way(model, config.optim)
        with NoHostSync():  # the first step makes the state
            step()
        with Launches() as counted:
            step()
        us = _time_us(way(_with_gradients(Soda(config.model)), config.optim), seconds) if seconds else None
        found.append({"way": name, **counted.row(), "units": counted.num_bytes / unit, "cpu_us": us})
    # Read the gradient for its norm, then p, g, m, v and the average; write all of these but g.
    parameters = list(Soda(config.model).parameters())
    launches = multi_tensor_launches([parameters]) + multi_tensor_launches([parameters] * 5)
    predicted = max(H200.least_us(10 * unit, 0), launches * LEAST_US)
    found.append({
        "way": "kernels of our own (not written)", "launches": launches, "bytes": 10 * unit, "flops": 0,
        "predicted_us": predicted, "units": 10.0, "cpu_us": None,
    })  # fmt: skip
    return [{"preset": preset, "parameter_bytes": unit, **row} for row in found]


def _with_gradients(model: Soda) -> Soda:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def _time_us(step: Step, seconds: float) -> float:
    """Return the median of a step's times after the first."""
    step()
    end, times = time.monotonic() + seconds, []
    while time.monotonic() < end or len(times) < 3:
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def main() -> None:
    """Print the table, and keep the rows."""
    parser = Parser(description=__doc__.split("\n")[0], prog="python -m benchmarks.training.optimizer")
    parser.add_argument("--preset", default="cifar10", choices=sorted(PRESETS))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each time on the CPU; 0 leaves them out")
    parser.add_argument("--json", type=result_file, help="write the rows to this file")
    options = parser.parse_args()
    found = rows(options.preset, options.seconds)
    print(f"{options.preset}: {found[0]['parameter_bytes'] / 1e6:.1f} MB of parameters")
    print(table(
        ("way", "launches", "units", "H200 us, predicted", "CPU ms"),
        ((r["way"], str(r["launches"]), f"{r['units']:.2f}", f"{r['predicted_us']:.0f}",
          f"{(r['cpu_us'] or math.nan) / 1e3:.1f}") for r in found),
    ))  # fmt: skip
    if options.json:
        write_json(options.json, {"rows": found, "env": describe_environment(torch.device("cpu"))})


if __name__ == "__main__":
    main()
