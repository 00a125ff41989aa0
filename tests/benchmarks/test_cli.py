"""The command line: one line for wrong input, rows in files, tables on the terminal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.commands.arguments import result_file
from tests.harness.interpreter import is_interpreting

needs_interpreter = pytest.mark.skipif(not is_interpreting(), reason="Triton compiles here: set TRITON_INTERPRET=1")

TRAFFIC_KEYS = {
    "op", "mode", "variant", "case", "layout", "dtype", "bytes_moved", "bytes_dram", "bytes_floor", "ratio", "launches",
    "arch",
}  # fmt: skip
ARCH_KEYS = {"registers", "shared_bytes", "spills", "local_bytes", "max_vector_bytes", "programs", "hgmma"}


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process."""

    def run(*arguments: object) -> Result:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # by the parser
            code = int(leaving.code or 0)
        return Result(code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "command"),
        (["fly"], "fly"),
        (["traffic", "--cases", "imagenet"], "'imagenet' is no shape set"),
        (["traffic", "--arch", "sm_10"], "'sm_10' is no architecture"),
        (["traffic", "--modes", "fwd+bwd"], "'fwd+bwd' is no mode"),
        (["run", "--layouts", "hwcn"], "'hwcn' is no layout"),
        (["run", "--dtype", "int8"], "int8"),
        (["run", "--suite", "sorting"], "sorting"),
        (["run", "--suite", "attention", "--layouts", "nhwc"], "nhwc is no layout of attention"),
        (["run", "--suite", "attention", "--cases", "vae-decode"], "vae-decode is no shape set of attention"),
        (["traffic", "--family", "sorting"], "'sorting' is no family"),
        (["traffic", "--cases", "vae-decode", "--layouts", "packed"], "no case of vae-decode in packed"),
        (["tune", "--family", "sorting"], "sorting"),
        (["tune", "--family", "group_norm", "--cases", "lengths"], "lengths is no shape set of group_norm"),
        (["run", "--suite", "sampling", "--layouts", "nchw"], "--layouts is nchw"),
        (["run", "--suite", "sampling", "--profile", "traces"], "--profile is traces; the suite sampling"),
        (["run", "--suite", "sampling", "--cases", "adm-256"], "adm-256 is no shape set of sampling"),
        (["run", "--colour"], "--colour"),
        (["compare", "a.jsonl"], "AFTER"),
        (["report", "gone.jsonl"], "gone.jsonl does not exist"),
    ],
    ids=" ".join,
)
def test_wrong_input_is_one_line_and_2(call: Callable[..., Result], arguments: list[str], said: str) -> None:
    result = call(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert len(result.err.splitlines()) == 1 and said in result.err


@pytest.mark.parametrize("command", ["run", "traffic"])
def test_a_result_file_that_cannot_be_written_is_said_first(
    call: Callable[..., Result], tmp_path: Path, command: str
) -> None:
    result = call(command, "--json", tmp_path)
    assert result.code == 2
    assert len(result.err.splitlines()) == 1 and "a folder" in result.err
    (tmp_path / "file").touch()
    # The last is a folder in which nobody makes files, whose permissions do not say so.
    for path in (tmp_path / "file" / "rows.json", Path("/proc/rows.json")):
        result = call(command, "--json", path)
        assert result.code == 2
        assert len(result.err.splitlines()) == 1 and f"argument --json: {path} cannot be written: " in result.err


def test_looking_whether_a_file_can_be_written_leaves_it_as_it_was(tmp_path: Path) -> None:
    new, old = tmp_path / "folder" / "rows.json", tmp_path / "old.json"
    old.write_text("rows")
    assert (result_file(str(new)), result_file(str(old))) == (new, old)
    assert not new.exists() and old.read_text() == "rows"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [["run", "--device", "cuda"], ["tune"]], ids=" ".join)
def test_no_gpu_is_one_line_and_2(call: Callable[..., Result], arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.code == 2
    assert len(result.err.splitlines()) == 1 and "no CUDA device" in result.err


@pytest.mark.parametrize("command", ["traffic", "run", "tune"])
def test_help_names_what_is_accepted(call: Callable[..., Result], command: str) -> None:
    assert command in call("--help").out
    result = call(command, "--help")
    assert result.code == 0
    assert all(word in result.out for word in ("soda-64", "packed", "nhwc", "separate", "attention"))


def test_a_quick_run_appends_a_row_a_line(call: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "results" / "rows.jsonl"
    arguments = ["run", "--cases", "tiny", "--layouts", "nhwc", "--modes", "fwd", "--quick", "--json", path]
    first = call(*arguments)
    assert first.code == 0, first.err
    assert "geometric mean, fwd" in first.out and "apex: unavailable" in first.out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["provider"]: row["status"] for row in rows} == {
        "ours": "ok", "eager": "ok", "compile": "ok", "apex": "unavailable", "liger": "unavailable",
    }  # fmt: skip
    assert call(*arguments).code == 0
    assert [json.loads(line)["provider"] for line in path.read_text().splitlines()] == 2 * [
        row["provider"] for row in rows
    ]


def test_the_attention_suite_appends_rows_too(call: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    result = call("run", "--suite", "attention", "--cases", "tiny", "--modes", "fwd", "--quick", "--json", path)
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(row["suite"], row["op"]) for row in rows} == {("attention", "attention")}
    assert [row["provider"] for row in rows if row["case"]["layout"] == "separate"] == [
        "ours", "eager", "compile", "sdpa-math", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "xformers",
        "flash-attention",
    ]  # fmt: skip
    ran = {row["provider"]: row["config"].get("kernel") for row in rows if row["status"] == "ok"}
    assert ran["compile"] == ran["eager"] == "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert "vs sdpa-math" in result.out and "xformers: unavailable in 2 rows" in result.out


@needs_interpreter
def test_traffic_of_a_tiny_case(call: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "results" / "rows.json"
    result = call("traffic", "--family", "group_norm,attention", "--cases", "tiny", "--json", path)
    assert result.code == 0, result.err
    rows = json.loads(path.read_text())
    found = {(row["op"], row["case"], row["layout"], row["mode"]): row["bytes_floor"] for row in rows}
    assert found == {
        ("modulated_group_norm", "tiny/2x16@8x8-g4-m2", "nchw", "fwd"): 8640,
        ("modulated_group_norm", "tiny/2x16@8x8-g4-m2", "nchw", "bwd"): 13120,
        ("modulated_group_norm", "tiny/2x16@8x8-g4-m2", "nhwc", "fwd"): 8640,
        ("modulated_group_norm", "tiny/2x16@8x8-g4-m2", "nhwc", "bwd"): 13120,
        ("attention", "tiny/2x16-h2-d16", "packed", "fwd"): 8448,
        ("attention", "tiny/2x16-h2-d16", "packed", "bwd"): 16640,
        ("attention", "tiny/2x16x7-h2-d16", "separate", "fwd"): 6144,
        ("attention", "tiny/2x16x7-h2-d16", "separate", "bwd"): 12032,
    }
    assert len({frozenset(row) for row in rows}) == 1, "rows of both ops have the same keys"
    for row in rows:
        assert row.keys() >= TRAFFIC_KEYS
        # Of heads of one block the backward forms delta from P, and does not read o.
        unread = 2 * 16 * 2 * 16 * 2 if (row["op"], row["mode"]) == ("attention", "bwd") else 0
        assert row["bytes_dram"] >= row["bytes_floor"] - unread
        assert row["ratio"] == row["bytes_dram"] / row["bytes_floor"]
        assert row["launches"] == len(row["kernels"]) >= 1
        assert row["bytes_moved"] == sum(kernel["bytes_moved"] for kernel in row["kernels"])
        assert row["arch"].keys() == {"sm_90"}
        compiled = row["arch"]["sm_90"]
        assert compiled.keys() >= ARCH_KEYS
        assert compiled["registers"] == max(kernel["arch"]["sm_90"]["registers"] for kernel in row["kernels"])
        assert compiled["programs"] >= 1 and compiled["max_vector_bytes"] in (4, 8, 16)
        assert compiled["hgmma"] == all(kernel["arch"]["sm_90"]["hgmma"] for kernel in row["kernels"])
        assert row["case"] in result.out and f"{row['ratio']:.3f}" in result.out
    assert "a prediction, not a measurement" in result.out
    assert "modulated_group_norm, bf16\n" in result.out and "attention, bf16\n" in result.out


@needs_interpreter
def test_traffic_of_one_family(call: Callable[..., Result], tmp_path: Path) -> None:
    arguments = ["--family", "attention", "--cases", "tiny", "--modes", "fwd", "--no-compile"]
    result = call("traffic", *arguments, "--json", tmp_path / "rows.json")
    assert result.code == 0, result.err
    assert {row["op"] for row in json.loads((tmp_path / "rows.json").read_text())} == {"attention"}
    assert "group_norm" not in result.out


@needs_interpreter
def test_traffic_of_every_op_of_diffusion(call: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    result = call("traffic", "--family", "diffusion", "--cases", "tiny", "--no-compile", "--json", path)
    assert result.code == 0, result.err
    rows = json.loads(path.read_text())
    counts = Counter((row["op"], row["mode"]) for row in rows)
    assert counts == {
        ("philox_normal", "fwd"): 1, ("add_noise", "fwd"): 12, ("denoising_loss", "fwd"): 14,
        ("denoising_loss", "bwd"): 14, ("sampler_step", "fwd"): 16,
    }  # fmt: skip
    for row in rows:
        assert row.keys() >= TRAFFIC_KEYS
        assert row["bytes_dram"] >= row["bytes_floor"] and row["ratio"] == row["bytes_dram"] / row["bytes_floor"]
        assert row["launches"] == 1  # a tile holds one of these samples
        assert f"{row['op']}, bf16\n" in result.out


def test_the_diffusion_suite_appends_rows_too(call: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    arguments = ["--suite", "diffusion", "--cases", "tiny", "--layouts", "nhwc", "--modes", "fwd", "--quick"]
    result = call("run", *arguments, "--json", path)
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert Counter((row["op"], row["provider"], row["status"]) for row in rows) == {
        (op, provider, "ok"): count
        for op, count in (("noising_and_loss", 2), ("sampler_step", 3))
        for provider in ("ours", "eager", "compile")
    }
    assert "noising_and_loss, fp32, nhwc" in result.out and "sampler_step, fp32, nhwc" in result.out


def test_loops_are_timed_eagerly_where_there_are_no_graphs(call: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    result = call("run", "--suite", "sampling", "--cases", "tiny", "--quick", "--json", path)
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(row["op"], row["provider"], row["status"], row["reason"]) for row in rows} == {
        ("sampling_loop", "eager", "ok", None), ("sampling_loop", "graphed", "unavailable", "CUDA graphs need a GPU"),
    }  # fmt: skip
    assert all((row["stats"]["p50"] is None) == (row["provider"] == "graphed") for row in rows)
    assert "CUDA graphs need a GPU" in result.out


@needs_interpreter
def test_traffic_that_is_cut_short_leaves_the_old_file(
    call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import benchmarks.traffic

    path = tmp_path / "rows.json"
    path.write_text("[]\n")

    def rows(*_: Any) -> Iterator[dict[str, Any]]:
        yield {}
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarks.traffic, "traffic_rows", rows)
    result = call("traffic", "--family", "group_norm,attention", "--cases", "tiny", "--json", path)
    assert result.code == 130
    assert path.read_text() == "[]\n"
    assert list(tmp_path.iterdir()) == [path]
