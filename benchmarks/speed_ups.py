"""Speed-ups of this project over others, from rows of results, and whether each is more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.providers import OURS
from benchmarks.result_files import newest_rows

Row = dict[str, Any]
_GRAPHED = "graphed"
"""What is ours in the suite of sampling loops, where both providers are this project's."""


@dataclass(frozen=True, kw_only=True)
class SpeedUp:
    """How many times this project's time another's is, in one case and mode."""

    own: Row
    rival: Row
    ratio: float
    low: float
    """The ratio at the 20% quantile."""
    high: float
    """At the 80% quantile."""

    @property
    def spread(self) -> float:
        """By how much two timings of one thing differed: below it a difference is noise."""
        return self.own["stats"]["aa_spread"] or 0.0

    @property
    def is_noise(self) -> bool:
        """Whether the two are as fast as one another as far as this run can tell."""
        return not differs(self.ratio, self.spread)

    @property
    def is_loss(self) -> bool:
        """Whether the other is faster, and by more than noise."""
        return self.ratio < 1 and not self.is_noise

    @property
    def text(self) -> str:
        """The ratio as tables have it; noise is marked."""
        return f"noise {self.ratio:.2f}x" if self.is_noise else f"{self.ratio:.2f}x"


def differs(ratio: float, spread: float) -> bool:
    """Tell whether a ratio of two times, or its inverse, is above one by more than the spread of two equal things."""
    return max(ratio, 1 / ratio) - 1 > spread


def own_provider(rows: Sequence[Row]) -> str:
    """Return the provider that is this project's."""
    providers = {row["provider"] for row in rows}
    return _GRAPHED if _GRAPHED in providers and OURS not in providers else OURS


def rivals_of(rows: Sequence[Row]) -> list[str]:
    """List the others that could run anything, in the order of the rows."""
    own = own_provider(rows)
    return list(dict.fromkeys(
        row["provider"] for row in rows if row["provider"] != own and row["status"] != "unavailable"
    ))  # fmt: skip


def place_of(row: Row) -> tuple[Any, ...]:
    """Return what providers are compared within: suite, op, case, layout, dtype, mode and timer."""
    case = row["case"]
    return row["suite"], row["op"], case["id"], case.get("layout"), case.get("dtype"), row["mode"], row["timer"]


def fastest_rows(rows: Sequence[Row]) -> list[Row]:
    """Keep of each provider's variants in a place, such as its layouts, the fastest; of rows of one thing the last."""
    kept: dict[tuple[Any, ...], Row] = {}
    for row in newest_rows(rows):
        key = (*place_of(row), row["provider"])
        if key not in kept or (row["stats"]["p50"] or math.inf) < (kept[key]["stats"]["p50"] or math.inf):
            kept[key] = row
    return list(kept.values())


def speed_ups(rows: Sequence[Row]) -> list[SpeedUp]:
    """List the speed-ups over every rival, in its fastest variant, wherever both were timed."""
    timed = [row for row in fastest_rows(rows) if row["status"] == "ok" and row["stats"]["p50"]]
    own_name = own_provider(timed)
    own = {place_of(row): row for row in timed if row["provider"] == own_name}
    return [
        _speed_up(own[place_of(row)], row)
        for row in timed
        if row["provider"] != own_name and place_of(row) in own
    ]  # fmt: skip


def _speed_up(own: Row, rival: Row) -> SpeedUp:
    ratio = rival["stats"]["p50"] / own["stats"]["p50"]
    paired = own.get("paired")
    if paired and paired["to"] == rival["provider"]:  # measured in the same rounds
        low, high = 1 / paired["p80"], 1 / paired["p20"]
        return SpeedUp(own=own, rival=rival, ratio=ratio, low=min(low, ratio), high=max(high, ratio))
    down, up = (_beside(own["stats"], rival["stats"], *ends) for ends in (("p80", "p20"), ("p20", "p80")))
    return SpeedUp(own=own, rival=rival, ratio=ratio, low=ratio / down, high=ratio * up)


def _beside(own: Row, rival: Row, own_end: str, rival_end: str) -> float:
    """Return the factor from a ratio of medians to its quantile, the two times being independent."""
    own_part, rival_part = math.log(own[own_end] / own["p50"]), math.log(rival[rival_end] / rival["p50"])
    return math.exp(math.hypot(own_part, rival_part))
