"""What a person reads after a run: times, speed-ups, their geometric means, and where this project loses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.providers import BASELINE, OURS
from benchmarks.speed_ups import differs, rivals_of
from benchmarks.tables import geometric_mean, table

Row = dict[str, Any]


def summarize_rows(rows: Sequence[Row]) -> str:
    """Write a table for each op, layout and timer, and below them what else has to be known."""
    parts, rivals = [], rivals_of(rows)
    for op, layout, timer in dict.fromkeys((row["op"], row["case"]["layout"], row["timer"]) for row in rows):
        chosen = [row for row in rows if (row["op"], row["case"]["layout"], row["timer"]) == (op, layout, timer)]
        parts.append(_layout_table(layout, timer, chosen, rivals))
    return "\n\n".join([*parts, *filter(None, [_losses(rows, rivals), _kernels(rows), _not_timed(rows)])])


def speed_up(rows: Sequence[Row], case_id: str, mode: str, rival: str) -> tuple[float, float] | None:
    """Return how many times the rival's time is this project's, and the spread within which that is noise.

    Args:
        rows: of one op, layout and timer.
    """
    found = {row["provider"]: row for row in rows if row["case"]["id"] == case_id and row["mode"] == mode}
    if not all(name in found and found[name]["status"] == "ok" for name in (OURS, rival)):
        return None
    ours, other = found[OURS]["stats"], found[rival]["stats"]
    return other["p50"] / ours["p50"], ours["aa_spread"] or 0.0


def _layout_table(layout: str, timer: str, rows: Sequence[Row], rivals: Sequence[str]) -> str:
    """Write the rows of one op, layout and timer, and the geometric means of their speed-ups by mode."""
    keys = list(dict.fromkeys((row["case"]["id"], row["mode"]) for row in rows))
    lines = []
    for case_id, mode in keys:
        found = {row["provider"]: row for row in rows if row["case"]["id"] == case_id and row["mode"] == mode}
        times = [_time(found.get(name)) for name in (OURS, *rivals)]
        gains = [_gain(speed_up(rows, case_id, mode, rival)) for rival in rivals]
        spread = next((row["stats"]["aa_spread"] for row in found.values() if row["status"] == "ok"), None)
        saved = [_mib(found.get(name)) for name in (OURS, BASELINE)]
        lines.append([case_id, mode, *times, *gains, "-" if spread is None else f"{spread:.1%}", *saved])
    for mode in dict.fromkeys(mode for _, mode in keys):
        means = []
        for rival in rivals:
            gains = [speed_up(rows, case_id, each, rival) for case_id, each in keys if each == mode]
            known = [gain[0] for gain in gains if gain is not None]
            means.append(f"{geometric_mean(known):.2f}x" if known else "-")
        lines.append([f"geometric mean, {mode}", "", "", *("" for _ in rivals), *means, "", "", ""])
    dtype, variants = rows[0]["case"]["dtype"], sorted({row["variant"] for row in rows if row["variant"]})
    ours = ", ".join(variants) or "not there"
    title = f"{rows[0]['op']}, {dtype}, {layout}, timer {timer}, median us of a call; ours is {ours}"
    header = ["case", "mode", OURS, *rivals, *(f"vs {rival}" for rival in rivals), "A/A", "saved MiB", "eager's"]
    return f"{title}\n{table(header, lines)}"


def _time(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row['stats']['p50']:,.1f}" if row["status"] == "ok" else row["status"]


def _gain(gain: tuple[float, float] | None) -> str:
    """Write a speed-up; one inside the spread of two equal things is marked as noise."""
    if gain is None:
        return "-"
    return f"{gain[0]:.2f}x" if differs(*gain) else f"noise {gain[0]:.2f}x"


def _mib(row: Row | None) -> str:
    saved = row and row["memory"]["saved_for_backward_mib"]
    return "-" if saved is None else f"{saved:,.1f}"


def _losses(rows: Sequence[Row], rivals: Sequence[str]) -> str:
    """List where a rival is faster by more than the spread."""
    lost = []
    for layout, timer, case_id, mode in dict.fromkeys(
        (row["case"]["layout"], row["timer"], row["case"]["id"], row["mode"]) for row in rows
    ):
        chosen = [row for row in rows if row["case"]["layout"] == layout and row["timer"] == timer]
        for rival in rivals:
            gain = speed_up(chosen, case_id, mode, rival)
            if gain is not None and gain[0] < 1 and differs(*gain):
                lost.append(f"  {case_id} {layout} {mode} ({timer}): {gain[0]:.2f}x of {rival}")
    return "\n".join(["slower than a rival by more than the A/A spread:", *lost]) if lost else ""


def _kernels(rows: Sequence[Row]) -> str:
    """Say which kernel ran for those that choose among several."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        if "kernel" in row["config"]:
            counts.setdefault((row["provider"], row["mode"]), Counter())[row["config"]["kernel"]] += 1
    lines = (
        f"  {provider} {mode}: {', '.join(f'{kernel} ({count})' for kernel, count in kernels.items())}"
        for (provider, mode), kernels in sorted(counts.items())
    )
    return "\n".join(["the kernel that took longest (in how many rows):", *lines]) if counts else ""


def _not_timed(rows: Sequence[Row]) -> str:
    """Say which providers have no times, why, and in how many rows."""
    counts = Counter((row["provider"], row["status"], row["reason"]) for row in rows if row["status"] != "ok")
    return "\n".join(
        f"{provider}: {status} in {count} rows: {reason}" for (provider, status, reason), count in counts.items()
    )
