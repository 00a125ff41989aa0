"""README's tables are those of the newest result files, and name who loses."""

from __future__ import annotations

from pathlib import Path

import pytest

import benchmarks.commands.readme
from benchmarks.__main__ import main
from benchmarks.performance import END, NO_GPU, START, performance_section, with_section
from tests.benchmarks.result_rows import made_row, write_rows


def test_the_readme_is_not_stale(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["readme", "--check"]) == 0, capsys.readouterr().err


def test_a_stale_readme_is_told_and_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    monkeypatch.setattr(benchmarks.commands.readme, "README", readme)
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    assert main(["readme", "--check"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1 and "old" in readme.read_text()
    assert main(["readme"]) == 0 and main(["readme", "--check"]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{START}\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
    readme.write_text("no markers")
    assert main(["readme"]) == 2


@pytest.mark.parametrize("text", ["", START, f"{END} {START}", f"{START} {START} {END}"])
def test_markers_must_be_there_once_in_order(text: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        with_section(text, "new")


def test_gpu_and_cpu_losses_and_the_worst_are_named(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    write_rows(results / "cpu" / "a.jsonl", [made_row("ours", 10.0), made_row("eager", 40.0)])
    section = performance_section(results, tmp_path / "README.md")
    assert NO_GPU in section and "the least: norm a nchw fwd over eager: 4.00x" in section
    assert "Test CPU, 2 threads; PyTorch 2.13.0; commit abc123" in section
    assert "[a.jsonl](benchmarks/results/cpu/a.jsonl)" in section.replace("\n", " ")
    gpu = {"device": "Test GPU", "driver": "570", "utc": "2026-02-01T00:00:00"}
    rows = [
        made_row("ours", 10.0, env=gpu), made_row("eager", 5.0, env=gpu),
        made_row("compile", None, env=gpu, status="failed", reason="no luck"),
    ]  # fmt: skip
    write_rows(results / "gpu" / "b.jsonl", rows)
    section = performance_section(results, tmp_path / "README.md")
    assert NO_GPU not in section and section.index("Test GPU") < section.index("Test CPU")
    assert "- norm a nchw fwd: 0.50x of eager" in section and "no luck" in section


def test_files_without_times_of_calls_are_passed_by(tmp_path: Path) -> None:
    write_rows(tmp_path / "cpu" / "a.jsonl", [made_row("ours", 10.0), made_row("eager", 40.0)])
    before = performance_section(tmp_path, tmp_path / "README.md")
    write_rows(tmp_path / "cpu" / "b.jsonl", [made_row("ours", None, suite="train") | {"images_per_s": 150.0}])
    assert performance_section(tmp_path, tmp_path / "README.md") == before


def test_many_rows_become_means(tmp_path: Path) -> None:
    rows = [
        row
        for case in "abcdefghijklm"
        for row in (made_row("ours", 10.0, case=case), made_row("eager", 20.0, case=case))
    ]
    write_rows(tmp_path / "cpu" / "a.jsonl", rows)
    assert "| norm | 13 | 2.00x | 2.00 – 2.00 | 0 | 0 |" in performance_section(tmp_path, tmp_path / "README.md")
