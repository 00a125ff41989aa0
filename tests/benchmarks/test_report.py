"""The report drops no row, marks losses and noise, and is one page that needs nothing beside it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.report.sections import section_of
from benchmarks.report.writing import to_html, to_markdown
from benchmarks.result_files import chosen_files, newest_files, read_results
from benchmarks.speed_ups import speed_ups
from tests.benchmarks.result_rows import made_file, made_row, write_rows

MEMORY = {"peak_mib": 12.0, "saved_for_backward_mib": 3.5}
ROWS = [
    made_row("ours", 10.0, memory=MEMORY), made_row("eager", 40.0, memory=MEMORY), made_row("compile", 10.2),
    made_row("ours", 10.0, case="b"), made_row("eager", 5.0, case="b"),
    made_row("compile", None, case="b", status="invalid", reason="its error is <3 times too large"),
    made_row("ours", 30.0, case="c"), made_row("eager", 90.0, case="c"),
    made_row("compile", None, case="c", status="failed", reason="RuntimeError: out of luck"),
    *(made_row("apex", None, case=case, status="unavailable", reason="apex is not installed") for case in "abc"),
    *(made_row(name, None, suite="e2e", op="loss_curve") | {"losses": [1.0, 0.5, None, 0.25]}
      for name in ("ours", "reference")),
]  # fmt: skip


@pytest.fixture(scope="module")
def page() -> str:
    return to_html([section_of(made_file(ROWS))])


class Elements(HTMLParser):
    """The elements of a page: tags, ids, and what leads out of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset") and value]


def test_the_page_stands_alone(page: str) -> None:
    found = Elements(page)
    assert found.tags.count("svg") == 6  # speed-ups, sizes, two kinds of memory, roofline, losses
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    assert len(found.ids) == len(set(found.ids))
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert "#0102" not in page  # every colour is the page's


def test_pictures_are_no_wider_than_a_phone(page: str) -> None:
    assert {float(width) for width in re.findall(r'<svg [^>]*\bwidth="([\d.]+)pt"', page)} == {360.0}


@pytest.mark.parametrize("write", [to_html, to_markdown])
def test_no_row_is_dropped_and_losses_and_noise_are_marked(write: object) -> None:
    text = write([section_of(made_file(ROWS))])  # type: ignore[operator]
    escaped = "&lt;3" if write is to_html else "<3"
    for said in (
        "4.00x", "noise 1.02x", "0.50x slower", "norm b nchw fwd: 0.50x of eager",
        f"compile, invalid in 1 of 3 rows: its error is {escaped} times too large (norm b nchw fwd)",
        "compile, failed in 1 of 3 rows: RuntimeError: out of luck (norm c nchw fwd)",
        "apex, unavailable in 3 of 3 rows: apex is not installed", "Test CPU, 2 threads; PyTorch 2.13.0; commit abc123",
    ):  # fmt: skip
        assert said in text


def test_evaluations_of_a_run_are_a_table_of_their_own() -> None:
    """Of a run all rows are shown, the path's last one and those before it."""
    rows = [
        made_row("ours", None, suite="train", op="cifar10")
        | {"images_per_s": 150.0, "train_seconds": 60.0 * minutes, "linear_probe": 0.4, "knn": 0.375}
        for minutes in (1, 2)
    ]
    (part,) = section_of(made_file(rows)).parts
    assert part.table.header == ["what", "minutes", "images/s", "linear probe", "k-NN"]
    assert [[cell.text for cell in line] for line in part.table.rows] == [
        ["cifar10 a ours", minutes, "150", "40.00%", "37.50%"] for minutes in ("1.00", "2.00")
    ]


def test_whiskers_are_the_rounds_own_where_they_were_paired() -> None:
    paired = {"to": "eager", "p50": 0.25, "p20": 0.2, "p80": 0.5, "n": 9}
    gains = speed_ups([made_row("ours", 10.0, paired=paired), made_row("eager", 40.0), made_row("compile", 20.0)])
    assert [(gain.low, gain.ratio, gain.high) for gain in gains[:1]] == [(2.0, 4.0, 5.0)]
    assert gains[1].low < gains[1].ratio == 2.0 < gains[1].high < 2.0 * (1.1 / 0.95)


def test_a_rival_counts_in_its_faster_layout() -> None:
    rows = [
        made_row("ours", 10.0, variant="fp32"), made_row("eager", 40.0, variant="nchw"),
        made_row("eager", 30.0, variant="channels_last"),
        made_row("compile", None, variant="nchw", status="failed", reason="no luck"),
        made_row("compile", 20.0, variant="channels_last"),
    ]  # fmt: skip
    assert [(gain.rival["provider"], gain.ratio) for gain in speed_ups(rows)] == [("eager", 3.0), ("compile", 2.0)]
    text = to_markdown([section_of(made_file(rows))])
    assert "| a | fwd | 10.0 | 30.0 channels_last | 20.0 channels_last | 3.00x | 2.00x |" in text
    assert "compile, failed in 1 of 2 rows: no luck (norm a nchw nchw fwd)" in text


def test_the_newest_file_of_each_suite_and_device_is_taken(tmp_path: Path) -> None:
    later = {"env": {"utc": "2026-02-01T00:00:00"}}
    kept = [
        write_rows(tmp_path / "cpu" / "a-later.jsonl", [made_row("ours", 1.0, **later)]),
        write_rows(tmp_path / "cpu" / "loops.jsonl", [made_row("ours", 1.0, suite="sampling")]),
        write_rows(tmp_path / "other" / "a.jsonl", [made_row("ours", 1.0)]),
    ]
    write_rows(tmp_path / "cpu" / "z-earlier.jsonl", [made_row("ours", 1.0)])
    (tmp_path / "cpu" / "metrics.jsonl").write_text('{"kind": "train", "loss": 1.0}\n')
    assert [file.path for file in newest_files(tmp_path)] == kept
    assert len(chosen_files([tmp_path])) == 4


def test_a_line_cut_short_is_left_out_only_at_the_end(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:2])
    whole = path.read_text()
    path.write_text(whole + '{"schema": 1, "su')
    assert len(read_results(path).rows) == 2
    path.write_text('{"schema": 1, "su\n' + whole)
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_results(path)


def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert main(["report", str(path), "--out", str(tmp_path / "report")]) == 0
    written = [tmp_path / "report" / name for name in ("report.html", "report.md")]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in written]
    assert [path.is_file() for path in written] == [True, True]
    assert main(["report", str(tmp_path / "gone.jsonl")]) == 2
    assert capsys.readouterr().err == f"python -m benchmarks: {tmp_path / 'gone.jsonl'} does not exist\n"
    assert main(["report", str(path), "--out", str(path)]) == 2
