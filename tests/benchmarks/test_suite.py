"""Rows of a suite, here of group norm: complete, honest about what did not run, no times for what computes wrongly."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families import GROUP_NORM
from benchmarks.group_norm.cases import NormCase, norm_cases
from benchmarks.group_norm.problems import norm_problem
from benchmarks.group_norm.providers import NORM_PROVIDERS, eager_norm
from benchmarks.providers import Provider
from benchmarks.records import new_row
from benchmarks.steps import make_step
from benchmarks.suite import PACES, saved_mib, suite_rows
from soda_kernels import modulated_group_norm

(CASE,) = norm_cases(["tiny"], ["nhwc"], "fp32", on_cpu=True)
CPU = torch.device("cpu")

# The keys of benchmarks.md's schema.
ROW = {
    "schema", "suite", "op", "case", "provider", "variant", "mode", "timer", "unit", "stats", "paired", "bytes_min",
    "flops", "pct_ceiling", "bound", "memory", "launches", "check", "config", "status", "reason", "env", "ceilings",
}  # fmt: skip
PARTS = {
    "case": {"N", "C", "H", "W", "G", "layout", "dtype", "param_dtype", "modulations"},
    "stats": {"p50", "p20", "p80", "min", "n", "aa_spread"},
    "memory": {"peak_mib", "saved_for_backward_mib"},
    "check": {"rel_l2", "ratio_to_torch", "pass", "bitwise_rerun"},
    "env": {"device", "driver", "cuda", "torch", "triton", "package", "git", "dirty", "utc", "clocks"},
    "ceilings": {"copy_gbps", "matmul_fp32_tflops"},
}


def wrong(*arguments: Any) -> torch.Tensor:
    return eager_norm(*arguments) * 1.001


def raising(*_: Any) -> torch.Tensor:
    raise RuntimeError("out of luck\nand more")


PROVIDERS = (
    *(provider for provider in NORM_PROVIDERS if not provider.compiled),
    Provider(name="wrong", build=lambda: wrong),
    Provider(name="raising", build=lambda: raising),
)


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], dict[str, Any]]:
    """Every row of one case, by provider and mode."""
    measured = suite_rows(GROUP_NORM, [CASE], ["fwd", "bwd", "fwd+bwd"], CPU, PACES["quick"], PROVIDERS)
    return {(row["provider"], row["mode"]): row for rows in measured for row in rows}


def test_every_row_has_the_whole_schema(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert len(rows) == len(PROVIDERS) * 3
    for row in rows.values():
        assert row.keys() == ROW
        for part, keys in PARTS.items():
            assert keys <= row[part].keys()


def test_traces_name_providers_and_kernels(tmp_path: Path) -> None:
    measured = suite_rows(GROUP_NORM, [CASE], ["fwd+bwd"], CPU, PACES["quick"], PROVIDERS, traces=tmp_path / "traces")
    assert {row["status"] for rows in measured for row in rows} >= {"ok", "invalid"}
    (trace,) = (tmp_path / "traces").iterdir()
    assert trace.name.endswith("-nhwc-fwd+bwd.json") and CASE.id.replace("/", "-") in trace.name
    found = Counter(event["name"] for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X")
    calls = ("ours", "eager", "soda_kernels.modulated_group_norm", "soda_kernels.modulated_group_norm_backward")
    assert [found[name] for name in calls] == [3, 3, 3, 3]
    assert not {"wrong", "raising"} & set(found)


def test_a_row_takes_no_unknown_key() -> None:
    with pytest.raises(KeyError, match="colour"):
        new_row(colour="red")


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
def test_what_is_right_is_timed(rows: dict[tuple[str, str], dict[str, Any]], mode: str) -> None:
    for provider in ("ours", "eager"):
        row = rows[provider, mode]
        assert row["status"] == "ok" and row["reason"] is None
        assert row["timer"] == "wall" and row["stats"]["n"] >= PACES["quick"].min_rounds
        assert 0 < row["stats"]["min"] <= row["stats"]["p20"] <= row["stats"]["p50"] <= row["stats"]["p80"]
        assert row["stats"]["aa_spread"] >= 0
        assert row["pct_ceiling"] > 0
        assert row["check"]["pass"] and row["check"]["bitwise_rerun"]
        assert (row["memory"]["saved_for_backward_mib"] is None) == (mode == "fwd")
    paired = rows["ours", mode]["paired"]
    assert paired["to"] == "eager" and paired["n"] == rows["ours", mode]["stats"]["n"]
    assert 0 < paired["p20"] <= paired["p50"] <= paired["p80"] and rows["eager", mode]["paired"] is None
    assert rows["ours", mode]["variant"] in ("native", "reference")
    assert rows["eager", mode]["check"]["ratio_to_torch"] == 1.0


def test_what_is_wrong_is_invalid_and_has_no_times(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    for mode in ("fwd", "bwd", "fwd+bwd"):
        row = rows["wrong", mode]
        assert row["status"] == "invalid" and "times that of PyTorch's own" in row["reason"]
        assert row["check"]["pass"] is False and row["check"]["rel_l2"] == pytest.approx(1e-3, rel=0.01)
        assert set(row["stats"].values()) == {None} and row["pct_ceiling"] is None


def test_what_raises_or_is_missing_keeps_its_row(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert rows["raising", "fwd"]["status"] == "failed"
    assert rows["raising", "fwd"]["reason"] == "RuntimeError: out of luck"
    for provider in ("apex", "liger"):
        assert rows[provider, "fwd"]["status"] == "unavailable"
        assert "not installed" in rows[provider, "fwd"]["reason"]
        assert set(rows[provider, "fwd"]["stats"].values()) == {None}


@pytest.mark.parametrize("forward", [eager_norm, modulated_group_norm], ids=["eager", "ours"])
def test_modes_compute_the_same(forward: Any) -> None:
    problem = norm_problem(CASE, CPU, grad=True)
    y, *gradients = make_step(forward, problem, "fwd+bwd")()
    assert torch.equal(make_step(forward, problem, "fwd")()[0], y)
    backward = make_step(forward, problem, "bwd")
    for again in (backward(), backward()):
        assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))


def test_saved_memory_counts_each_tensor_once() -> None:
    case = NormCase(shape_set="t", shape=CASE.shape._replace(modulations=0), layout="nchw", dtype="fp32")
    problem = norm_problem(case, CPU, grad=True)

    def squared(x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x * x + x.exp()  # keeps x, twice, and exp(x)

    assert saved_mib(squared, problem) == 2 * problem.x.nbytes / 2**20
    ours, eager = saved_mib(modulated_group_norm, problem), saved_mib(eager_norm, problem)
    assert problem.x.nbytes / 2**20 < ours < eager


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_the_eager_chain_returns_its_inputs_layout(layout: str) -> None:
    (case,) = norm_cases(["tiny"], [layout], "bf16")
    problem = norm_problem(case, CPU)
    assert problem.call(eager_norm).stride() == problem.x.stride()
