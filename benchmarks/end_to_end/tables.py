"""What a person reads after the suite `e2e`: images a second, and speed-ups over the better layout of each rival."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.end_to_end.cases import LOSS_CURVE
from benchmarks.end_to_end.providers import COMPILE
from benchmarks.providers import BASELINE, OURS
from benchmarks.tables import table

Row = dict[str, Any]


def better(rows: Sequence[Row], provider: str) -> Row | None:
    """Return the fastest of a provider's rows that were timed, such as its better layout."""
    timed = [row for row in rows if row["provider"] == provider and row["status"] == "ok"]
    return min(timed, key=lambda row: row["stats"]["p50"], default=None)


def end_to_end_table(rows: Sequence[Row]) -> str:
    """Write a table for each op, the loss curves' distance, and what was not timed."""
    parts = []
    for op in dict.fromkeys(row["op"] for row in rows if row["op"] != LOSS_CURVE):
        of_op = [row for row in rows if row["op"] == op]
        lines = []
        for case_id in dict.fromkeys(row["case"]["id"] for row in of_op):
            found = [row for row in of_op if row["case"]["id"] == case_id]
            lines.append([case_id, *_cells(found)])
        header = ["case", OURS, BASELINE, "layout", COMPILE, "layout", f"vs {BASELINE}", f"vs {COMPILE}", "A/A"]
        parts.append(f"{op}, timer wall, images/s at the median, each in its better layout\n{table(header, lines)}")
    for row in rows:
        if row["op"] == LOSS_CURVE and row["provider"] == OURS:
            check, losses = row["check"], row["losses"]
            parts.append(
                f"loss of {row['case']['id']} over {len(losses)} steps of the same noise: from {losses[0]:.4f} to "
                f"{losses[-1]:.4f}, {check['rel_l2']:.2g} from the reference path's in relative L2, "
                f"{check['ratio_to_torch']:.2g} times what that is from itself in its other layout"
            )
    missing = dict.fromkeys(
        f"{row['op']} {row['provider']} {row['variant']}: {row['status']}: {row['reason']}"
        for row in rows if row["status"] != "ok"
    )  # fmt: skip
    return "\n\n".join([*parts, *(["\n".join(missing)] if missing else [])])


def _cells(rows: Sequence[Row]) -> list[str]:
    """Write one case's line of an op."""
    best = {name: better(rows, name) for name in (OURS, BASELINE, COMPILE)}
    own, rate = best[OURS], {name: "-" if row is None else f"{row['images_per_s']:,.1f}" for name, row in best.items()}
    layout = {name: "-" if row is None else row["variant"] for name, row in best.items()}
    gains = []
    for name in (BASELINE, COMPILE):
        row = best[name]
        if own is None or row is None:
            gains.append("-")
            continue
        gain, spread = row["stats"]["p50"] / own["stats"]["p50"], row["stats"]["aa_spread"] or 0.0
        gains.append(f"{gain:.2f}x" if max(gain, 1 / gain) - 1 > spread else f"noise {gain:.2f}x")
    spread = next((row["stats"]["aa_spread"] for row in best.values() if row is not None), None)
    return [
        rate[OURS], rate[BASELINE], layout[BASELINE], rate[COMPILE], layout[COMPILE], *gains,
        "-" if spread is None else f"{spread:.1%}",
    ]  # fmt: skip
