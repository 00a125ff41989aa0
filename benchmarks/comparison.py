"""Two sets of results compared: what became slower or faster by more than noise.

A machine with other work drifts between runs, which moves every provider's times, and the baseline itself can take
another path through memory, which moves every ratio to it. So a row counts as slower only if three things say so: its
median, its least time, and its median over the baseline's, which was timed in the same rounds. The change is what all
three agree on, the smallest of them; where they disagree in sign there is none.

The threshold of a row is the data's own (all in logarithms of times), the largest of

- the A/A spreads of the two rows: how far two timings of one thing lay apart;
- twice its width: half of that between the 20% and 80% quantiles of its ratio to the baseline, both sets' root mean
  square;
- three standard errors of the difference of the two medians, from those widths and the numbers of rounds;
- the median over all rows of the two before, lest a row look calm by luck.

All rows of a provider are judged together too, by the medians of what they say: what moves all of them shows there
long before it does in one row, and the threshold is one width, or the A/A spread. A change of the baseline in all rows
is the machine's as far as it is more than a width, and is taken out of times.

Rounds of one run are not independent, so that their number alone promises too much: on two cores of an AMD EPYC the
medians of one code's ratios scattered over processes by 0.4 to 0.9 widths, with 40 to 390 rounds in each.
`python -m benchmarks.trials` measures how often all this is right.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.providers import BASELINE
from benchmarks.result_files import ResultFile, Row, newest_rows, row_key
from benchmarks.speed_ups import place_of

_WIDTHS = 2.0
_STANDARD_ERRORS = 3.0
_MEDIAN_ERROR = 1.2533 / 0.8416
"""Standard error of a normal sample's median, times the root of its size, over half its 20/80 width."""
FEWEST_ROUNDS = 5
"""Quantiles of fewer say nothing."""
_FEWEST_TOGETHER = 5
"""Rows whose median tells what moves all of them from the noise of each."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What two sets say of one thing, as logarithms of ratios: positive is slower."""

    time: float
    """Of medians, without the machine's drift."""
    least: float
    """Of least times, likewise."""
    relative: float | None
    """Of medians over the baseline's; None without one."""
    threshold: float

    @property
    def agreed(self) -> float:
        """What all of them say at least: the smallest, or 0 where their signs differ."""
        said = [value for value in (self.time, self.least, self.relative) if value is not None]
        if min(said) > 0:
            return min(said)
        return max(said) if max(said) < 0 else 0.0

    @property
    def is_slower(self) -> bool:
        """Whether it is a regression."""
        return self.agreed > self.threshold

    @property
    def is_faster(self) -> bool:
        """Whether it is an improvement."""
        return self.agreed < -self.threshold


@dataclass(frozen=True, kw_only=True)
class Change(Verdict):
    """A row in both sets."""

    before: Row
    after: Row


@dataclass(frozen=True, kw_only=True)
class Together(Verdict):
    """All rows of a provider."""

    provider: str
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that comparing two sets found."""

    changes: list[Change]
    together: list[Together]
    """Of each provider with enough rows."""
    drift: float
    """By which the baseline's medians surely changed, a logarithm; it is taken out of `time`, as that of `least` is."""
    broken: list[Row]
    """Rows that were timed before, and are now invalid or failed."""
    unjudged: list[Row]
    """Rows of both with too few rounds to judge."""
    gone: list[Row]
    """Rows that were timed before, and are not there any more or not available."""
    added: list[Row]
    others_baseline: bool
    """Whether the baseline is no yardstick, since it is another PyTorch's."""

    @property
    def slower(self) -> list[Change]:
        """The regressions, the worst first."""
        return sorted((change for change in self.changes if change.is_slower), key=lambda change: -change.agreed)

    @property
    def faster(self) -> list[Change]:
        """The improvements, the largest first."""
        return sorted((change for change in self.changes if change.is_faster), key=lambda change: change.agreed)

    @property
    def usual_threshold(self) -> float | None:
        """The median row's: these sets do not show smaller changes."""
        return statistics.median(change.threshold for change in self.changes) if self.changes else None

    @property
    def is_quiet(self) -> bool:
        """Whether nothing became slower, faster or wrong."""
        moved = (each.is_slower or each.is_faster for each in (*self.changes, *self.together))
        return not (self.broken or any(moved))

    @property
    def is_regression(self) -> bool:
        """Whether something became slower or wrong."""
        return bool(self.slower or self.broken) or any(each.is_slower for each in self.together)


def compare(before: Sequence[ResultFile], after: Sequence[ResultFile]) -> Comparison:
    """Compare two sets of rows; of rows of one thing in one set the last counts.

    Raises:
        ValueError: they have nothing in common, or are of other devices.
    """
    first, second = (_by_key(files) for files in (before, after))
    devices = [sorted({key[0] for key in rows}) for rows in (first, second)]
    if not set(devices[0]) & set(devices[1]):
        raise ValueError(f"they are of other devices: {', '.join(devices[0])}, and {', '.join(devices[1])}")
    shared = [key for key in first if key in second]
    timed = [key for key in shared if first[key]["stats"]["p50"] and second[key]["stats"]["p50"]]
    broken = [second[key] for key in shared if first[key]["stats"]["p50"] and _is_wrong(second[key])]
    if not timed and not broken:
        raise ValueError("they have no timed row in common: a row is a suite, case, provider, mode and timer")
    versions = {row["env"]["torch"] for rows in (first, second) for row in rows.values()}
    others_baseline = len(versions) > 1
    judged = [key for key in timed if _is_judged(first[key], first)]
    enough = [key for key in judged if min(rows[key]["stats"]["n"] for rows in (first, second)) >= FEWEST_ROUNDS]
    measured = [_Measured.of(first, second, key, use_baseline=not others_baseline) for key in enough]
    noise, width = (
        statistics.median(getattr(each, name) for each in measured) if measured else 0.0 for name in ("noise", "width")
    )
    yardsticks = [] if others_baseline else [(first[key], second[key]) for key in timed]
    drift, drift_of_least = (_drift(yardsticks, statistic, width) for statistic in ("p50", "min"))
    changes = [each.change(noise, drift, drift_of_least) for each in measured]
    known = {*timed, *(_key(row) for row in broken)}
    return Comparison(
        changes=changes, together=_together(changes, measured), drift=drift, broken=broken,
        unjudged=[second[key] for key in judged if key not in enough],
        gone=[row for key, row in first.items() if row["stats"]["p50"] and key not in known],
        added=[row for key, row in second.items() if row["stats"]["p50"] and key not in known],
        others_baseline=others_baseline,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """A row of both sets, before what all rows say is known."""

    before: Row
    after: Row
    relative: float | None
    spread: float
    width: float
    noise: float

    @staticmethod
    def of(first: dict[Any, Row], second: dict[Any, Row], key: Any, *, use_baseline: bool) -> _Measured:
        pair = first[key], second[key]
        baselines = _baselines(first, second, key) if use_baseline and pair[0]["provider"] != BASELINE else None
        relative = _log_ratio(*pair) - _log_ratio(*baselines) if baselines else None
        widths = [_half_width(*each) for each in zip(pair, baselines or (None, None), strict=True)]
        errors = [_MEDIAN_ERROR * width / math.sqrt(row["stats"]["n"]) for width, row in zip(widths, pair, strict=True)]
        width = math.hypot(*widths) / math.sqrt(2)
        return _Measured(
            before=pair[0], after=pair[1], relative=relative, width=width,
            spread=max(math.log1p(row["stats"]["aa_spread"] or 0.0) for row in pair),
            noise=max(_WIDTHS * width, _STANDARD_ERRORS * math.hypot(*errors)),
        )  # fmt: skip

    def change(self, usual_noise: float, drift: float, drift_of_least: float) -> Change:
        return Change(
            before=self.before, after=self.after, time=_log_ratio(self.before, self.after) - drift,
            least=_log_ratio(self.before, self.after, "min") - drift_of_least, relative=self.relative,
            threshold=max(self.spread, self.noise, usual_noise),
        )  # fmt: skip


def _by_key(files: Sequence[ResultFile]) -> dict[tuple[str, ...], Row]:
    files = sorted(files, key=lambda file: file.utc)
    return {_key(row): row for file in files for row in newest_rows(file.rows)}


def _key(row: Row) -> tuple[str, ...]:
    return _device(row), *row_key(row)


def _device(row: Row) -> str:
    threads = row["env"].get("threads")
    return f"{row['env']['device']}{f' with {threads} threads' if threads else ''}"


def _is_wrong(row: Row) -> bool:
    return row["status"] in ("invalid", "failed")


def _baselines(first: dict[Any, Row], second: dict[Any, Row], key: Any) -> tuple[Row, Row] | None:
    """Return the baseline's rows beside a row that were timed in both sets: of several variants the fastest."""
    pairs = [
        (row, second[other]) for other, row in first.items()
        if row["provider"] == BASELINE and other in second and _place(row) == _place(first[key])
    ]  # fmt: skip
    timed = [pair for pair in pairs if all(row["stats"]["p50"] for row in pair)]
    return min(timed, key=lambda pair: pair[0]["stats"]["p50"], default=None)


def _place(row: Row) -> tuple[Any, ...]:
    return _device(row), *place_of(row)


def _is_judged(row: Row, rows: dict[tuple[str, ...], Row]) -> bool:
    """Tell whether a row is more than the yardstick of those beside it."""
    if row["provider"] != BASELINE:
        return True
    beside = (other for other in rows.values() if other["provider"] != BASELINE and other["stats"]["p50"])
    return all(_place(other) != _place(row) for other in beside)


def _log_ratio(before: Row, after: Row, statistic: str = "p50") -> float:
    return math.log(after["stats"][statistic] / before["stats"][statistic])


def _half_width(row: Row, baseline: Row | None) -> float:
    """Return half the width between the 20% and 80% quantiles of the logarithm of a ratio, or of a time without one."""
    paired = row.get("paired")
    if baseline is not None and paired:
        return math.log(paired["p80"] / paired["p20"]) / 2
    widths = [math.log(each["stats"]["p80"] / each["stats"]["p20"]) / 2 for each in (row, baseline) if each]
    return math.hypot(*widths)


def _drift(pairs: Sequence[tuple[Row, Row]], statistic: str, width: float) -> float:
    """Return by how much the baseline changed in all rows, beyond a width, as the logarithm of a factor."""
    changes = [_log_ratio(*pair, statistic) for pair in pairs if pair[0]["provider"] == BASELINE]
    if len(changes) < _FEWEST_TOGETHER:
        return 0.0
    middle = statistics.median(changes)
    return math.copysign(max(0.0, abs(middle) - width), middle)


def _together(changes: Sequence[Change], measured: Sequence[_Measured]) -> list[Together]:
    """Judge all rows of each provider by their medians."""
    found = []
    for provider in dict.fromkeys(change.before["provider"] for change in changes):
        of_it = [index for index, change in enumerate(changes) if change.before["provider"] == provider]
        relative = [value for index in of_it if (value := changes[index].relative) is not None]
        if len(of_it) < _FEWEST_TOGETHER or len(relative) not in (0, len(of_it)):
            continue
        found.append(Together(
            provider=provider, num_rows=len(of_it), time=statistics.median(changes[index].time for index in of_it),
            least=statistics.median(changes[index].least for index in of_it),
            relative=statistics.median(relative) if relative else None,
            threshold=statistics.median(max(measured[index].width, measured[index].spread) for index in of_it),
        ))  # fmt: skip
    return found
