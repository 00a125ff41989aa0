"""The command `traffic`: the bytes that a case's kernels move over the least they could, and what they compile to.

Kernels run in Triton's interpreter under the byte meter of tests/harness, and are compiled ahead of time for GPUs that
need not be there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.families import TritonFamily
from benchmarks.metering import hurried_interpreter
from benchmarks.records import describe_config, describe_environment
from benchmarks.roofline import H200, occupancy
from benchmarks.tables import show_progress, table
from soda_kernels.aot import specify
from tests.harness.compilation import KernelReport, compile_specs

PREDICTION = "H200 at max(bytes_dram / 4.3 TB/s, flops / 790 TFLOP/s): a prediction, not a measurement"


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A case and mode with its launches at the full batch."""

    family: TritonFamily
    case: Any
    mode: str
    plan: Any

    @property
    def specs(self) -> list[dict[str, Any]]:
        """What each launch would compile."""
        return [specify(launch) for launch in self.plan.launches]


def traffic_rows(
    cases: Sequence[tuple[TritonFamily, Any]], modes: Sequence[str], archs: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row for every case and mode.

    Args:
        cases: each with its family.
        archs: to compile for; none skips that.
    """
    planned = [
        _Planned(family=family, case=case, mode=mode, plan=family.plan(family.problem(case, "meta"), mode))
        for family, case in cases
        for mode in modes
        if mode in case.modes
    ]
    reports = {arch: _compile([spec for each in planned for spec in each.specs], arch) for arch in archs}
    for index, each in enumerate(planned):
        case = each.case
        show_progress(f"metering {index + 1}/{len(planned)} {case.id} {case.layout} {each.mode}")
        with hurried_interpreter():
            row = _row(each, reports)
        yield row


def _compile(specs: Sequence[dict[str, Any]], arch: str, at_once: int = 8) -> dict[str, KernelReport]:
    """Compile each distinct kernel once: reports by `_key`."""
    distinct = list({_key(spec): spec for spec in specs}.values())
    reports: dict[str, KernelReport] = {}
    for start in range(0, len(distinct), at_once):
        show_progress(f"compiling for {arch}: {start}/{len(distinct)} kernels")
        part = distinct[start : start + at_once]
        reports |= zip(map(_key, part), compile_specs(part, arch), strict=True)
    return reports


def _key(spec: dict[str, Any]) -> str:
    return json.dumps(spec, sort_keys=True)


def _row(planned: _Planned, reports: dict[str, dict[str, KernelReport]]) -> dict[str, Any]:
    family, case, mode, plan = planned.family, planned.case, planned.mode, planned.plan
    by_launch, sizes = family.metered_bytes(case, mode, plan.config)
    moved, dram = (sum(each[key] for each in by_launch) for key in ("bytes_moved", "bytes_dram"))
    floor = family.floor_bytes(case, mode)
    kernels = [
        {
            "kernel": launch.kernel.fn.__name__, "programs": launch.num_programs, "num_warps": launch.num_warps,
            "on_images": _on_images(launch, case), **each, "arch": {
                arch: _describe(by_key[_key(spec)], launch.num_warps, arch) for arch, by_key in reports.items()
            },
        }
        for launch, spec, each in zip(plan.launches, planned.specs, by_launch, strict=True)
    ]  # fmt: skip
    variant, config = describe_config(plan.config)
    return {
        "op": case.op, "mode": mode, "variant": variant, "case": case.id, "layout": case.layout,
        "dtype": case.dtype, "bytes_moved": moved, "bytes_dram": dram, "bytes_floor": floor, "ratio": dram / floor,
        "launches": len(kernels), "arch": {arch: _worst(kernels, arch) for arch in reports},
        "kernels": kernels, "config": config,
        "metered_sizes": [size._asdict() for size in sizes],
        "env": describe_environment(torch.device("cpu")),
        "predicted_us": H200.least_us(dram, family.flops(case, mode)), "prediction": PREDICTION,
    }  # fmt: skip


def _on_images(launch: Any, case: Any) -> bool:
    """Whether a launch touches tensors of the image's size, on which the width of accesses matters."""
    tensors = (each for each in launch.arguments.values() if isinstance(each, torch.Tensor))
    return any(tensor.numel() >= case.image_elements for tensor in tensors)


def _describe(report: KernelReport, num_warps: int, arch: str) -> dict[str, Any]:
    return {
        "registers": report.registers, "shared_bytes": report.shared_bytes, "spills": report.spills,
        "local_bytes": report.local_bytes, "max_vector_bytes": report.max_vector_bytes,
        "hgmma": report.has_hgmma and not report.has_hmma,
        "occupancy": occupancy(
            arch, registers=report.registers, shared_bytes=report.shared_bytes, num_warps=num_warps
        ),
    }  # fmt: skip


def _worst(kernels: Sequence[dict[str, Any]], arch: str) -> dict[str, Any]:
    """Return the worst value over the kernels; but for the first four, over those that touch images."""
    every = [kernel["arch"][arch] for kernel in kernels]
    big = [kernel["arch"][arch] for kernel in kernels if kernel["on_images"]]
    occupancies = [each["occupancy"] for each in big if each["occupancy"] is not None]
    return {
        **{key: max(each[key] for each in every) for key in ("registers", "shared_bytes", "spills", "local_bytes")},
        "max_vector_bytes": min(each["max_vector_bytes"] for each in big),
        "hgmma": all(each["hgmma"] for each in big),
        "programs": min(kernel["programs"] for kernel in kernels if kernel["on_images"]),
        "occupancy": min(occupancies, default=None),
    }  # fmt: skip


def traffic_table(rows: Sequence[dict[str, Any]]) -> str:
    """Write a table for each op, and below them what the columns mean."""
    tables = []
    for op in dict.fromkeys(row["op"] for row in rows):
        chosen = [row for row in rows if row["op"] == op]
        tables.append(f"{op}, {chosen[0]['dtype']}\n{_op_table(chosen)}")
    notes = [
        "ratio: bytes_dram (distinct 32-byte sectors of each program) over the floor, each input read once and each "
        "output written once; what several programs read counts for each of them, though L2 may serve all but one",
        f"*: {PREDICTION}",
    ]
    return "\n\n".join([*tables, "\n".join(notes)])


def _op_table(rows: Sequence[dict[str, Any]]) -> str:
    """Write one op's rows; what was compiled stands on the right, a group of columns for each architecture."""
    archs = list(dict.fromkeys(arch for row in rows for arch in row["arch"]))
    fields = {
        "registers": "registers", "shared_bytes": "shared", "spills": "spills", "local_bytes": "local",
        "max_vector_bytes": "vector", "hgmma": "hgmma", "occupancy": "occupancy",
    }  # fmt: skip
    header = [
        "case", "layout", "mode", "variant", "launches", "programs", "MiB moved", "MiB dram", "MiB floor", "ratio",
        "H200 us*",
    ]  # fmt: skip
    header += [name if index else f"{arch}: {name}" for arch in archs for index, name in enumerate(fields.values())]
    lines = []
    for row in rows:
        programs = min(kernel["programs"] for kernel in row["kernels"] if kernel["on_images"])
        line = [
            row["case"], row["layout"], row["mode"], row["variant"], str(row["launches"]), f"{programs:,}",
            *(f"{row[key] / 2**20:,.2f}" for key in ("bytes_moved", "bytes_dram", "bytes_floor")),
            f"{row['ratio']:.3f}", f"{row['predicted_us']:,.1f}",
        ]  # fmt: skip
        line += [_cell(row["arch"][arch][field]) for arch in archs for field in fields]
        lines.append(line)
    return table(header, lines)


def _cell(value: bool | float | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.0%}" if isinstance(value, float) else f"{value:,}"
