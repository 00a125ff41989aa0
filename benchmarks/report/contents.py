"""What a report says of rows: tables, sentences and lists, for Markdown and HTML alike."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.providers import BASELINE, OURS
from benchmarks.result_files import ResultFile, Row, newest_rows
from benchmarks.speed_ups import SpeedUp, fastest_rows, own_provider, place_of, rivals_of
from benchmarks.tables import geometric_mean

_LONG_US = 20_000.0
"""Times are in milliseconds where most are longer."""


@dataclass(frozen=True)
class Cell:
    """A text, and what it is: "loss", "noise", "missing" or nothing special."""

    text: str
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns of which the first is text and the others numbers."""

    header: list[str]
    rows: list[list[Cell]]

    def markdown(self) -> str:
        """Write it as Markdown."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)]]
        lines += [[cell.text.replace("|", "\\|") for cell in row] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(file: ResultFile) -> str:
    """Say where, when and with which versions a file's rows were measured."""
    env = file.environment
    on = f"{env['device']}, {env['threads']} threads" if env.get("threads") else env["device"]
    versions = [f"PyTorch {env['torch']}", *(
        f"{name} {env[key]}" for name, key in (("Triton", "triton"), ("CUDA", "cuda"), ("driver", "driver"))
        if env.get(key) and (key != "triton" or env.get("driver"))
    )]  # fmt: skip
    commit = f"commit {env['git']}{'+' if env.get('dirty') else ''}" if env["git"] else "no commit known"
    return f"{on}; {', '.join(versions)}; {commit}; {env['utc'][:10]}"


def noise_sentence(rows: Sequence[Row]) -> str:
    """Say how far two timings of the baseline lay apart; empty where none were made."""
    spreads = {place_of(row): row["stats"]["aa_spread"] for row in rows if row["stats"]["aa_spread"] is not None}
    if not spreads:
        return ""
    return (
        f"Two timings of one call lay {statistics.median(spreads.values()):.1%} apart in the median of "
        f"{len(spreads)} cases and modes, {max(spreads.values()):.1%} at most (A/A): what differs less is noise."
    )


def means_table(gains: Sequence[SpeedUp]) -> Table:
    """Tell of each op, layout and mode the geometric mean of the speed-ups over each rival, the least and the most."""
    rivals = list(dict.fromkeys(gain.rival["provider"] for gain in gains))
    groups: dict[tuple[str, ...], list[SpeedUp]] = {}
    for gain in gains:
        groups.setdefault((*_kind_of(gain.own), gain.own["mode"]), []).append(gain)
    lines = []
    for name, group in zip(_what_varies(list(groups)), groups.values(), strict=True):
        line = [Cell(name or group[0].own["op"]), Cell(str(len({gain.own["case"]["id"] for gain in group})))]
        for rival in rivals:
            ratios = [gain.ratio for gain in group if gain.rival["provider"] == rival]
            line += _mean_cells(ratios)
        losses, noise = sum(gain.is_loss for gain in group), sum(gain.is_noise for gain in group)
        lines.append([*line, Cell(str(losses), "loss" if losses else ""), Cell(str(noise), "noise" if noise else "")])
    columns = [text for rival in rivals for text in (f"over {rival}", "least – most")]
    return Table(header=["what", "cases", *columns, "slower", "noise"], rows=lines)


def _kind_of(row: Row) -> tuple[str, ...]:
    case = row["case"]
    return row["op"], case.get("dtype") or "", case.get("layout") or "", row["timer"]


def _what_varies(names: Sequence[tuple[str, ...]]) -> list[str]:
    """Write names without the parts that are the same in all of them."""
    several = [len(set(parts)) > 1 for parts in zip(*names, strict=True)]
    return [
        ", ".join(part for part, varies in zip(name, several, strict=True) if varies and part) for name in names
    ]  # fmt: skip


def _mean_cells(ratios: Sequence[float]) -> list[Cell]:
    if not ratios:
        return [Cell("–", "missing"), Cell("–", "missing")]
    mean = geometric_mean(ratios)
    return [
        Cell(f"{mean:.2f}x", "loss" if mean < 1 else ""),
        Cell(f"{min(ratios):.2f} – {max(ratios):.2f}", "loss" if min(ratios) < 1 else ""),
    ]


def case_table(rows: Sequence[Row], gains: Sequence[SpeedUp]) -> Table:
    """Tell of each case and mode the times, speed-ups, noise and memory.

    Args:
        rows: of one op, layout, dtype and timer, or of several, which are then named.
        gains: of those rows.
    """
    rows, own, rivals = fastest_rows(rows), own_provider(rows), rivals_of(rows)
    times = [row["stats"]["p50"] for row in rows if row["stats"]["p50"]]
    unit, scale = ("ms", 1e3) if times and statistics.median(times) > _LONG_US else ("us", 1.0)
    places: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        places.setdefault((*_kind_of(row), row["case"]["id"], row["mode"]), {})[row["provider"]] = row
    lines = []
    kinds = _what_varies([place[:-2] for place in places])
    for kind, (*_, case_id, mode), found in zip(kinds, places, places.values(), strict=True):
        line = [
            Cell(", ".join(filter(None, (kind, case_id)))),
            Cell(mode),
            *(_time_cell(found.get(name), scale) for name in (own, *rivals)),
        ]
        for rival in rivals:
            here = (gain for gain in gains if gain.rival is found.get(rival))
            line.append(_gain_cell(next(here, None)))
        spread = next((r["stats"]["aa_spread"] for r in found.values() if r["stats"]["aa_spread"] is not None), None)
        line.append(Cell("–", "missing") if spread is None else Cell(f"{spread:.1%}"))
        lines.append([*line, *(_memory_cell(found.get(name)) for name in (own, BASELINE))])
    header = ["case", "mode", *(f"{name}, {unit}" for name in (own, *rivals)), *(f"over {name}" for name in rivals)]
    return Table(header=[*header, "A/A", "saved, MiB", f"{BASELINE}'s"], rows=lines)


def _time_cell(row: Row | None, scale: float) -> Cell:
    if row is None or row["status"] != "ok":
        return Cell(row["status"] if row else "–", "missing")
    if row["stats"]["p50"] is None:
        return Cell("–", "missing")
    variant = f" {row['variant']}" if row["variant"] and row["provider"] != OURS else ""
    return Cell(f"{row['stats']['p50'] / scale:,.1f}{variant}")


def _gain_cell(gain: SpeedUp | None) -> Cell:
    if gain is None:
        return Cell("–", "missing")
    return Cell(f"{gain.text} slower", "loss") if gain.is_loss else Cell(gain.text, "noise" if gain.is_noise else "")


def _memory_cell(row: Row | None) -> Cell:
    mib = row and row["memory"]["saved_for_backward_mib"]
    return Cell("–", "missing") if mib is None else Cell(f"{mib:,.1f}")


def rates_table(rows: Sequence[Row]) -> Table:
    """Tell of each pipeline its images a second, and of each evaluation of a run also what its z were worth."""
    columns = {
        "minutes": ("train_seconds", lambda value: f"{value / 60:.2f}"),
        "images/s": ("images_per_s", lambda value: f"{value:,.0f}"),
        "over a step's": ("ratio", lambda value: f"{value:.1f}x"),
        "linear probe": ("linear_probe", lambda value: f"{value:.2%}"),
        "k-NN": ("knn", lambda value: f"{value:.2%}"),
    }
    shown = {title: how for title, how in columns.items() if any(row.get(how[0]) is not None for row in rows)}
    lines = [
        [Cell(" ".join(filter(None, (row["op"], row["case"]["id"], row["provider"], row["variant"])))), *(
            Cell("–", "missing") if row.get(key) is None else Cell(text(row[key])) for key, text in shown.values()
        )]
        for row in rows
    ]  # fmt: skip
    return Table(header=["what", *shown], rows=lines)


def name_of(row: Row) -> str:
    """Name what a row is of in words, but for its provider; the wall clock is not named."""
    case, timer = row["case"], row["timer"]
    variant = None if row["provider"] == OURS else row["variant"]
    parts = row["op"], case["id"], case.get("layout"), variant, row["mode"], None if timer == "wall" else timer
    return " ".join(filter(None, parts))


def losses_of(gains: Iterable[SpeedUp]) -> list[str]:
    """List where another is faster by more than noise, the worst first."""
    lost = sorted((gain for gain in gains if gain.is_loss), key=lambda gain: gain.ratio)
    return [f"{name_of(gain.own)}: {gain.ratio:.2f}x of {gain.rival['provider']}" for gain in lost]


def worst_of(gains: Sequence[SpeedUp], count: int = 3) -> list[str]:
    """Name the rows with the least speed-up, noise or not."""
    least = sorted(gains, key=lambda gain: gain.ratio)[:count]
    return [f"{name_of(gain.own)} over {gain.rival['provider']}: {gain.text}" for gain in least]


def not_timed(rows: Sequence[Row]) -> list[str]:
    """List which provider has no times, why, in how many rows, and of which modes and cases if not of all."""
    rows = newest_rows(rows)
    counts = Counter((row["provider"], row["status"], row["reason"]) for row in rows if row["status"] != "ok")
    lines = []
    for (provider, status, reason), count in counts.items():
        of_provider = [row for row in rows if row["provider"] == provider]
        line = f"{provider}, {status} in {count} of {len(of_provider)} rows: {reason or 'no reason given'}"
        if count < len(of_provider):
            these = [row for row in of_provider if (row["status"], row["reason"]) == (status, reason)]
            line += f" ({_where(these, of_provider)})"
        lines.append(line)
    return lines


def _where(some: Sequence[Row], rows: Sequence[Row]) -> str:
    """Name some of a provider's rows: by their layouts if they are all that those have, else one by one."""
    layouts = list(dict.fromkeys(row["case"].get("layout") for row in some))
    if all(layouts) and len(some) == sum(row["case"].get("layout") in layouts for row in rows):
        return f"all in {', '.join(layouts)}"
    return "; ".join(map(name_of, some))
