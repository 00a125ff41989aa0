"""`soda-engine info --roofline`: a step's costs by block and by kind, its floor on a GPU, and what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from soda_engine.config import TrainConfig
from soda_engine.records import read_json_lines
from soda_engine.roofline.devices import ACHIEVABLE, GPUS, Ceilings, read_ceilings
from soda_engine.roofline.step import StepCosts, Work, count_step, least_us
from soda_engine.tables import table
from soda_engine.train.logging import METRICS_NAME

OptionalText = Annotated[str | None, tyro.conf.DisallowNone]

# What belongs to no module, by kind.
_NO_BLOCK = {"views": "views", "casts": "weights to bf16, and back", "optimizer": "optimizer, EMA"}


@dataclass(frozen=True, kw_only=True)
class RooflineOptions:
    """What a training step is held against."""

    roofline: bool = False
    """Print instead, of a training step: FLOPs, bytes and saved memory of each block, the step's floor on a GPU, and
    what was measured over it. Needs no GPU."""
    checkpoint_activations: Literal["none", "norms", "blocks"] | None = None
    """Of --roofline: as in training; the preset's or the run's if not given."""
    gpu: Literal["h200", "h100", "a100", "l40s", "mi300x"] = "h200"
    """Of --roofline: the GPU whose data sheet gives the ceilings."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of --roofline: of products; weights are fp32."""
    ceilings: OptionalText = None
    """Of --roofline: a results file of python -m benchmarks whose newest measured ceilings count too."""
    measured: OptionalText = None
    """Of --roofline: a run's folder, or a results file of the suite e2e; MODEL itself if that is a run with a log."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How fast steps were."""

    images_per_s: float
    source: str
    batch_size: int | None = None


def describe_roofline(name: str, config: TrainConfig, batch_size: int | None, options: RooflineOptions) -> str:
    """Return the text of `soda-engine info --roofline`.

    Args:
        name: of the preset or the run.
        batch_size: None: that of what was measured, else the config's.

    Raises:
        ValueError, FileNotFoundError: a file does not hold what it must, or the config does not fit together.
    """
    measured = None if options.measured is None else read_measured(Path(options.measured), name)
    if options.checkpoint_activations is not None:
        config = replace(config, checkpoint_activations=options.checkpoint_activations)
    batch_size = batch_size or (measured and measured.batch_size) or config.batch_size
    known = _known_ceilings(options)
    costs = count_step(config, batch_size=batch_size, dtype=options.dtype)
    main = next(iter(known))
    lines = [
        f"{name}: a training step of {batch_size} images in {options.dtype}, counted: each op reads its inputs and "
        f"writes its outputs once; floors on {main}",
        "",
        _table_of("block", costs, lambda work: _block(costs, work), known[main], saved=True),
        "",
        _table_of("kind", costs, lambda work: work.kind, known[main], saved=False),
        "",
        f"memory beside weights and optimizer: {costs.held_bytes / 2**20:,.1f} MiB between forward and backward, "
        f"{costs.peak_bytes / 2**20:,.1f} MiB at the most",
        "",
        "floors of the step: each op at the larger of bytes / bandwidth and FLOPs / peak, summed",
        table(
            ("ceilings", "TB/s", "TFLOP/s", "floor ms", "images/s", "MFU"),
            (_floor(label, costs, ceilings) for label, ceilings in known.items()),
        ),
    ]
    if measured is not None:
        lines += ["", _compare(measured, costs, known)]
    return "\n".join(lines)


def read_measured(path: Path, name: str) -> Measured:
    """Return how fast a run was, or the newest training step of this engine in a results file.

    A run's is the median over the lines of its log, without the first, whose steps compile and choose kernels.

    Args:
        path: a run's folder, or a file of the suite e2e.
        name: the preset, where a file has several.

    Raises:
        FileNotFoundError: there is no log or file.
        ValueError: it holds no such measurement; the message says what it holds.
    """
    if path.is_dir():
        log = path / METRICS_NAME
        rates = [row["images_per_second"] for row in read_json_lines(log) if row.get("images_per_second")]
        if not rates:
            raise ValueError(f"{log} has no line with images per second yet; train longer, or log more often")
        return Measured(images_per_s=statistics.median(rates[1:] or rates), source=str(log))
    steps = [
        row for row in read_json_lines(path)
        if row.get("op") == "train_step" and row.get("provider") == "ours" and row.get("status") == "ok"
    ]  # fmt: skip
    sets = list(dict.fromkeys(row["case"]["set"] for row in steps))
    chosen = [row for row in steps if row["case"]["set"] == name]
    if not chosen:
        there = f"it has those of {', '.join(sets)}" if sets else "write it with python -m benchmarks run --suite e2e"
        raise ValueError(f"{path} has no training step of {name} by ours; {there}")
    row = chosen[-1]
    batch, seconds = row["case"]["N"], row["stats"]["p50"] / 1e6
    device = (row.get("env") or {}).get("device", "an unknown device")
    dtype = row["case"].get("dtype", "an unknown dtype")
    return Measured(images_per_s=batch / seconds, source=f"{path}, {dtype} on {device}", batch_size=batch)


def _known_ceilings(options: RooflineOptions) -> dict[str, Ceilings]:
    """Return ceilings by label: measured ones first, if there are any."""
    gpu, known = GPUS[options.gpu], {}
    if options.ceilings is not None:
        ceilings, device = read_ceilings(Path(options.ceilings), options.dtype)
        known[f"measured on {device}"] = ceilings
    sheet = "TF32, " if options.dtype == "fp32" else ""
    known[f"{gpu.name} ({sheet}{gpu.source})"] = gpu.ceilings(options.dtype)
    if (options.gpu, options.dtype) in ACHIEVABLE:
        known[f"{gpu.name}, assumed achievable"] = ACHIEVABLE[options.gpu, options.dtype]
    return known


def _block(costs: StepCosts, work: Work) -> str:
    if not work.layer:
        return _NO_BLOCK.get(work.kind, "noise, masks, loss")
    return costs.block_of(work.layer)


def _table_of(
    name: str, costs: StepCosts, key: Callable[[Work], str], ceilings: Ceilings, *, saved: bool
) -> str:  # fmt: skip
    """Gather work by a key, a row each, with a row of sums; what is saved belongs to blocks alone."""
    groups: dict[str, list[Work]] = {}
    for work in costs.work:
        groups.setdefault(key(work), []).append(work)
    kept: dict[str, int] = {}
    for tensor in costs.saved:
        block = costs.block_of(tensor.layer) if tensor.layer else "noise, masks, loss"
        kept[block] = kept.get(block, 0) + tensor.own_bytes
    rows = [
        _row(group, work, kept.get(group, 0), ceilings, saved) for group, work in groups.items()
    ] + [_row("total", costs.work, sum(kept.values()), ceilings, saved)]
    header = (name, "fwd GFLOP", "fwd MB", "bwd GFLOP", "bwd MB", *(("saved MiB",) if saved else ()), "floor us", "by")
    return table(header, rows)


def _row(name: str, work: Iterable[Work], kept: int, ceilings: Ceilings, saved: bool) -> list[str]:
    work = list(work)
    backward = [each for each in work if each.phase == "backward"]
    forward = [each for each in work if each.phase != "backward"]
    cells = [name]
    for part in (forward, backward):
        cells += [f"{_sum(part, 'flops') / 1e9:,.2f}", f"{_sum(part, 'num_bytes') / 1e6:,.1f}"]
    if saved:
        cells.append(f"{kept / 2**20:,.1f}")
    by = ceilings.bound(_sum(work, "num_bytes"), _sum(work, "flops"))
    return [*cells, f"{least_us(work, ceilings):,.1f}", by]


def _sum(work: Iterable[Work], field: str) -> int:
    return sum(getattr(each, field) for each in work)


def _floor(label: str, costs: StepCosts, ceilings: Ceilings) -> list[str]:
    seconds = costs.floor_us(ceilings) / 1e6
    return [
        label, f"{ceilings.copy_bytes_per_s / 1e12:.3g}", f"{ceilings.matmul_flops_per_s / 1e12:,.3g}",
        f"{seconds * 1e3:.3f}", f"{costs.batch_size / seconds:,.0f}", f"{_mfu(costs, seconds, ceilings):.1%}",
    ]  # fmt: skip


def _mfu(costs: StepCosts, seconds: float, ceilings: Ceilings) -> float:
    return costs.flops / seconds / ceilings.matmul_flops_per_s


def _compare(measured: Measured, costs: StepCosts, known: dict[str, Ceilings]) -> str:
    seconds = costs.batch_size / measured.images_per_s
    rows: list[Any] = [
        [label, f"{seconds / (costs.floor_us(ceilings) / 1e6):,.2f}", f"{_mfu(costs, seconds, ceilings):.1%}"]
        for label, ceilings in known.items()
    ]
    return (
        f"measured: {measured.images_per_s:,.1f} images/s, {seconds * 1e3:,.2f} ms a step ({measured.source})\n"
        + table(("ceilings", "measured over floor", "MFU"), rows)
    )
