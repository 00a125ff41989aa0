"""What a GPU machine is asked for, in order, as data: the parts of each stage and the commands that do them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.end_to_end.cases import SUITE as END_TO_END
from benchmarks.families import LOOPS, TRITON_FAMILIES

STAGES = ("tests", "tune", "suites", "e2e", "train")
KERNEL_SUITES = (*(family.suite for family in TRITON_FAMILIES.values()), LOOPS)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One command, which goes on where it was when it is run again."""

    name: str
    stage: str
    arguments: tuple[str, ...]
    """Of the Python interpreter."""
    done: tuple[int, ...] = (0, 1)
    """Exit codes with which it has done its work; any but 0 says that not all was well."""
    missing: str | None = None
    """Why it cannot run here, if so."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a round's results go: one file of rows for the suites, one of the tuner's, one of tests, and runs."""

    folder: Path
    stem: str

    def file(self, kind: str | None = None) -> Path:
        """Return a file of JSON lines: `<date>-<git>.jsonl` holds the rows of all suites."""
        return self.folder / (f"{self.stem}-{kind}.jsonl" if kind else f"{self.stem}.jsonl")

    @property
    def tables(self) -> Path:
        """Where a rehearsal keeps tuned tables, which are not for the package."""
        return self.folder / "tables"


def list_parts(
    places: Places, *, stages: Sequence[str], data: Path | None, train_minutes: float, rehearse: bool
) -> list[Part]:
    """List what is to be done, in order.

    Args:
        data: the folder with CIFAR-10.
        train_minutes: the wall-clock budget of each training.
        rehearse: everything tiny, on a CPU.
    """
    parts = [
        _tests(places),
        _tuning(places),
        _suites(places, "suites", KERNEL_SUITES),
        _suites(places, "e2e", (END_TO_END,)),
        _training(places, data, train_minutes, rehearse),
    ]
    chosen = [part for part in parts if part.stage in stages]
    return [_rehearsed(part, places) for part in chosen] if rehearse else chosen


def _tests(places: Places) -> Part:
    return Part(
        name="tests", stage="tests", done=(0, 1, 5),  # 5: none is left
        arguments=(
            "-m", "pytest", "-p", "benchmarks.gpu.recorded_tests", "--outcomes", str(places.file("tests")), "-q",
            "--continue-on-collection-errors", "-m", "gpu",
        ),
    )  # fmt: skip


def _tuning(places: Places) -> Part:
    return Part(
        name="tune", stage="tune", done=(0,),
        arguments=(
            "-m", "benchmarks", "tune", "--family", ",".join(TRITON_FAMILIES), "--json", str(places.file("tune")),
            "--resume",
        ),
    )  # fmt: skip


def _suites(places: Places, stage: str, suites: Sequence[str]) -> Part:
    return Part(
        name=stage, stage=stage,
        arguments=(
            "-m", "benchmarks", "run", "--suite", ",".join(suites), "--device", "cuda", "--json", str(places.file()),
            "--resume",
        ),
    )  # fmt: skip


def _training(places: Places, data: Path | None, minutes: float, rehearse: bool) -> Part:
    missing = None
    if data is None and not rehearse:
        missing = "no CIFAR-10: --data names its folder, and `make carry DATA=DIR` takes it along"
    return Part(
        name="train", stage="train", done=(0,), missing=missing,
        arguments=(
            "-m", "benchmarks.train_cifar10", "--data", str(data), "--budget-minutes", f"{minutes:g}",
            "--device", "cuda", "--out", str(places.folder / f"{places.stem}-train"),
        ),
    )  # fmt: skip


_REHEARSED_TESTS = ("tests/benchmarks/test_accuracy.py", "tests/benchmarks/test_summary.py")
_TINY = ("--cases", "tiny")
_REHEARSALS = {
    "tests": ("-m", "not gpu", *_REHEARSED_TESTS),
    "tune": (*_TINY, "--rehearse"),
    "suites": (*_TINY, "--quick", "--device", "cpu", "--modes", "fwd", "--providers", "ours,eager"),
    "e2e": (*_TINY, "--quick", "--device", "cpu", "--providers", "ours,eager", "--ops", "encode"),
    "train": (
        "--path", "ours", "--data", "digits", "--preset", "digits", "--device", "cpu", "--max-images", "256",
        "--probe-images", "100", "--probe-epochs", "2",
    ),
}
"""What is added to a part's arguments: of an option that is given twice, the last counts."""


def _rehearsed(part: Part, places: Places) -> Part:
    added = _REHEARSALS[part.stage]
    if part.stage == "tune":
        added = (*added, "--tables", str(places.tables))
    return dataclasses.replace(part, arguments=(*part.arguments, *added))
