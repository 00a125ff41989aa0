"""Rows of training steps, sampling and encoding: who is checked how, what is timed, and loss curves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.end_to_end.cases import CPU_CASES, OPS
from benchmarks.end_to_end.problems import EndToEndProblem
from benchmarks.end_to_end.providers import COMPILE, PLAIN, Built, Contender, contenders, own_train_step
from benchmarks.end_to_end.suite import end_to_end_rows
from benchmarks.end_to_end.tables import better, end_to_end_table
from benchmarks.suite import PACES

CPU = torch.device("cpu")


def off_by_a_thousandth(problem: EndToEndProblem, op: str) -> Built:
    """The reference path with results that are a little wrong."""
    built = PLAIN[op](problem, "nchw")
    return dataclasses.replace(built, observe=lambda: tuple(result * 1.001 for result in built.observe()))


def without_clip(problem: EndToEndProblem) -> Built:
    """This engine's step with the gradient as it comes."""
    optim = dataclasses.replace(problem.case.config.optim, grad_clip=1e9)
    config = dataclasses.replace(problem.case.config, optim=optim)
    return own_train_step(dataclasses.replace(problem, case=dataclasses.replace(problem.case, config=config)))


def chosen(op: str, dtype: str) -> list[Contender]:
    """All that need no compiler, and some that are wrong."""
    wrong = {"off": lambda problem: off_by_a_thousandth(problem, op)}
    if op == "train_step":
        wrong["unclipped"] = without_clip
    return [
        *(way for way in contenders(op, dtype) if way.provider != COMPILE and way.by_default),
        *(Contender(provider=name, variant="", dtype=dtype, build=build) for name, build in wrong.items()),
    ]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    measured = end_to_end_rows([CPU_CASES["tiny"]], OPS, CPU, "fp32", PACES["quick"], chosen=chosen)
    return [row for part in measured for row in part]


@pytest.mark.parametrize("op", OPS)
def test_rows_of_an_op(rows: list[dict[str, Any]], op: str) -> None:
    found = {(row["provider"], row["variant"]): row for row in rows if row["op"] == op}
    for key in (("ours", "fp32"), ("eager", "nchw"), ("eager", "channels_last")):
        row = found[key]
        assert row["status"] == "ok", row["reason"]
        assert (row["suite"], row["timer"], row["case"]["set"]) == ("e2e", "wall", "tiny")
        assert row["check"]["pass"] and row["check"]["bitwise_rerun"]
        assert row["stats"]["p50"] > 0 and row["stats"]["aa_spread"] is not None
        assert (row["paired"] is None) == (key[0] == "eager")
        assert row["images_per_s"] == pytest.approx(row["case"]["N"] / row["stats"]["p50"] * 1e6)
        assert row["flops"] > 0 and row["mfu"] > 0 and row["memory"]["peak_mib"] > 0
    assert found["eager", "nchw"]["check"]["ratio_to_torch"] <= 1.0
    best = better(list(found.values()), "eager")
    assert best is not None
    assert best["stats"]["p50"] == min(found["eager", layout]["stats"]["p50"] for layout in ("nchw", "channels_last"))


@pytest.mark.parametrize(("op", "wrong"), [*((op, "off") for op in OPS), ("train_step", "unclipped")])
def test_what_computes_something_else_has_no_time(rows: list[dict[str, Any]], op: str, wrong: str) -> None:
    (row,) = (row for row in rows if (row["op"], row["provider"]) == (op, wrong))
    assert row["status"] == "invalid" and "times that of PyTorch's own" in row["reason"]
    assert row["stats"]["p50"] is None and row["images_per_s"] is None


def test_a_cpu_without_bf16_says_so(rows: list[dict[str, Any]]) -> None:
    (row,) = (row for row in rows if row["variant"] == "bf16")
    assert row["status"] == "ok" or (row["status"] == "unavailable" and "bf16" in row["reason"].lower())


def test_loss_curves_lie_on_one_another(rows: list[dict[str, Any]]) -> None:
    ours, reference = (row for row in rows if row["op"] == "loss_curve")
    assert (ours["provider"], reference["provider"]) == ("ours", "reference")
    assert len(ours["losses"]) == len(reference["losses"]) == CPU_CASES["tiny"].curve_steps
    # The first loss is before any step, where only rounding may differ; later AdamW magnifies what is.
    assert ours["losses"][0] == pytest.approx(reference["losses"][0], rel=1e-6)
    assert ours["losses"] == pytest.approx(reference["losses"], rel=0.01)


def test_table(rows: list[dict[str, Any]]) -> None:
    text = end_to_end_table(rows)
    assert all(f"{op}, timer wall" in text for op in OPS)
    assert "train_step unclipped : invalid" in text and "loss of tiny/8 over 5 steps" in text


def test_a_compiled_engine_is_measured_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append(type(module).__name__))
    path = tmp_path / "rows.jsonl"
    asked = ["--cases", "tiny", "--ops", "train_step,sample,encode", "--providers", "ours,ours-compiled", "--quick"]
    assert main(["run", "--suite", "e2e", *asked, "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {row["op"]: row for row in rows if row["provider"] == "ours-compiled"}
    assert set(found) == {"train_step", "sample"}
    assert all(row["status"] == "ok" and row["config"] == {"compile": "default"} for row in found.values())
    assert compiled == ["Soda", "Denoiser"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layouts", "nchw"], "--layouts is nchw"),
        (["--dtype", "fp16"], "--dtype is fp16"),
        (["--cases", "adm-256"], "adm-256 is no case of e2e"),
        (["--ops", "sing"], "'sing' is no op"),
    ],
    ids=" ".join,
)
def test_wrong_input_is_one_line_and_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    try:
        code = main(["run", "--suite", "e2e", *arguments])
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    error = capsys.readouterr().err
    assert code == 2 and len(error.splitlines()) == 1 and said in error
