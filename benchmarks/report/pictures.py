"""The report's pictures: speed-up bars, roofline, sweeps over size, memory bars and loss curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from benchmarks.report.figures import INK, LOSS, MARKERS, NOISE, SERIES, Picture, drawing, legend_below
from benchmarks.result_files import Row
from benchmarks.speed_ups import SpeedUp

_LINE_PX = 17
"""Of one bar, or of one line of text above bars."""


def speed_up_bars(title: str, gains: Sequence[SpeedUp]) -> Picture:
    """Draw a group of bars for each case, a bar for each rival, from 1x; whiskers reach to the 20% and 80% quantiles.

    Noise is grey and losses have a colour of their own; both are said beside the bar.
    """
    by_case: dict[str, list[SpeedUp]] = {}
    for gain in gains:
        by_case.setdefault(gain.own["case"]["id"], []).append(gain)
    rivals = list(dict.fromkeys(gain.rival["provider"] for gain in gains))
    lines = sum(1.5 + len(group) for group in by_case.values())
    with drawing(title, lines * _LINE_PX + 75) as (axes, done):
        y = 0.0
        least = min(min(gain.low for gain in gains), 1.0)
        for case_id, group in by_case.items():
            axes.text(0.0, y, case_id, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
            axes.plot([1, 1], [y + 0.5, y + len(group) + 0.5], color=INK, linewidth=1, zorder=3)
            for gain in group:
                y += 1
                _draw_bar(axes, y, gain, SERIES[rivals.index(gain.rival["provider"]) % len(SERIES)])
            y += 1.5
        axes.set_ylim(y - 0.6, -0.8)
        most = max(max(gain.high for gain in gains), 1.1)
        axes.set_xscale("log")
        axes.set_xlim(least / 1.15, most * (most / least) ** 0.32)  # room for what stands beside the longest bar
        _plain_log_ticks(axes, "x")
        axes.yaxis.set_visible(False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("times as long as ours takes (log)")
        colours = {f"over {rival}": SERIES[index % len(SERIES)] for index, rival in enumerate(rivals)}
        colours |= {"slower than it": LOSS} if any(gain.is_loss for gain in gains) else {}
        colours |= {"noise (within A/A)": NOISE} if any(gain.is_noise for gain in gains) else {}
        legend_below(axes, colours)
    return done[0]


def _draw_bar(axes: Axes, y: float, gain: SpeedUp, colour: str) -> None:
    colour = NOISE if gain.is_noise else LOSS if gain.is_loss else colour
    axes.barh(y, gain.ratio - 1, left=1, height=0.78, color=colour)
    axes.plot([gain.low, gain.high], [y, y], color=INK, linewidth=1)
    for end in (gain.low, gain.high):
        axes.plot([end, end], [y - 0.2, y + 0.2], color=INK, linewidth=1)
    said = f"{gain.ratio:.2f}x" + (" noise" if gain.is_noise else " slower" if gain.is_loss else "")
    axes.annotate(said, (max(gain.high, 1.0), y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)


def roofline(title: str, rows: Sequence[Row]) -> Picture | None:
    """Draw achieved FLOP/s against intensity under the ceilings measured beside; None where nothing can be drawn.

    Args:
        rows: of one device; those without bytes, operations or a time are left out.
    """
    timed = [
        row for row in rows
        if row["status"] == "ok" and row["bytes_min"] and row["flops"] and row["stats"]["p50"] and row["ceilings"]
    ]  # fmt: skip
    if not timed:
        return None
    providers = list(dict.fromkeys(row["provider"] for row in timed))
    copy, product = (
        max(row["ceilings"][key] for row in timed for key in row["ceilings"] if key.startswith(kind))
        for kind in ("copy", "matmul")
    )
    intensity = [row["flops"] / row["bytes_min"] for row in timed]
    left, right = min(*intensity, 1e3 * product / copy) / 3, max(*intensity, 1e3 * product / copy) * 3
    with drawing(title, 330) as (axes, done):
        for index, provider in enumerate(providers):
            points = [
                (row["flops"] / row["bytes_min"], row["flops"] / row["stats"]["p50"] / 1e3)
                for row in timed if row["provider"] == provider
            ]  # fmt: skip
            axes.scatter(*zip(*points, strict=True), s=20, alpha=0.75, linewidths=0, label=provider,
                         color=SERIES[index % len(SERIES)], marker=MARKERS[index % len(MARKERS)])  # fmt: skip
        ridge = 1e3 * product / copy
        axes.plot([left, ridge, right], [copy * left, 1e3 * product, 1e3 * product], color=INK, linewidth=1.2)
        axes.set(xscale="log", yscale="log", xlim=(left, right))
        axes.set_ylim(top=1e3 * product * 4)
        axes.annotate(f"matmul {product:,.4g} TFLOP/s, copy {copy:,.0f} GB/s", (right, 1e3 * product), xytext=(0, 4),
                      textcoords="offset points", ha="right", fontsize=8.5)  # fmt: skip
        axes.set_xlabel("FLOPs a byte that must move")
        axes.set_ylabel("GFLOP/s achieved")
        axes.grid(linewidth=0.6)
        legend_below(axes)
    return done[0]


def size_sweep(title: str, gains: Sequence[SpeedUp]) -> Picture | None:
    """Draw speed-ups against the bytes that must move, a series a mode and rival; None of fewer than three sizes."""
    known = [gain for gain in gains if gain.own["bytes_min"]]
    if len({gain.own["bytes_min"] for gain in known}) < 3:
        return None
    series: dict[tuple[str, str], list[SpeedUp]] = {}
    for gain in sorted(known, key=lambda gain: gain.own["bytes_min"]):
        series.setdefault((gain.own["mode"], gain.rival["provider"]), []).append(gain)
    with drawing(title, 290) as (axes, done):
        for index, ((mode, rival), points) in enumerate(series.items()):
            sizes = [gain.own["bytes_min"] for gain in points]
            one_a_size = len(set(sizes)) == len(sizes)  # else a line would go up and down within a size
            axes.plot(
                sizes, [gain.ratio for gain in points], markersize=4, linewidth=1.2 if one_a_size else 0,
                color=SERIES[index % len(SERIES)], marker=MARKERS[index % len(MARKERS)], label=f"{mode}, over {rival}",
            )  # fmt: skip
        axes.axhline(1.0, color=INK, linewidth=1)
        axes.set(xscale="log", yscale="log")
        axes.xaxis.set_major_formatter(EngFormatter("B", sep="\N{NO-BREAK SPACE}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        _plain_log_ticks(axes, "y")
        axes.set_xlabel("bytes that must move")
        axes.set_ylabel("times as long as ours")
        axes.grid(linewidth=0.6)
        legend_below(axes)
    return done[0]


def memory_bars(title: str, rows: Sequence[Row], kind: str) -> Picture | None:
    """Draw MiB by case and provider; None where no row has them.

    Args:
        kind: of memory: "peak_mib" or "saved_for_backward_mib".
    """
    by_case: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["status"] == "ok" and row["memory"][kind] is not None:
            by_case.setdefault(row["case"]["id"], {})[row["provider"]] = row["memory"][kind]
    if not by_case:
        return None
    providers = list(dict.fromkeys(name for group in by_case.values() for name in group))
    lines = sum(1.5 + len(group) for group in by_case.values())
    with drawing(title, lines * _LINE_PX + 65) as (axes, done):
        y, most = 0.0, max(max(group.values()) for group in by_case.values())
        for case_id, group in by_case.items():
            axes.text(0.0, y, case_id, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
            for provider, mib in group.items():
                y += 1
                axes.barh(y, mib, height=0.78, color=SERIES[providers.index(provider) % len(SERIES)])
                said = f"{mib:,.1f}" if mib < 100 else f"{mib:,.0f}"
                axes.annotate(said, (mib, y), xytext=(4, 0), textcoords="offset points", va="center",
                              fontsize=8.5)  # fmt: skip
            y += 1.5
        axes.set_ylim(y - 0.6, -0.8)
        axes.set_xlim(0, most * 1.2 or 1)
        axes.yaxis.set_visible(False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("MiB")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        legend_below(axes, {name: SERIES[index % len(SERIES)] for index, name in enumerate(providers)})
    return done[0]


def loss_overlay(title: str, curves: Mapping[str, Sequence[float | None]]) -> Picture:
    """Draw losses against the step, one curve over another: the widest below, the last one dashed above.

    Args:
        curves: losses by provider; null where one was not finite.
    """
    with drawing(title, 280) as (axes, done):
        for index, (name, losses) in enumerate(curves.items()):
            values = [math.nan if loss is None else loss for loss in losses]
            axes.plot(range(1, len(values) + 1), values, label=name, color=SERIES[index % len(SERIES)],
                      linewidth=max(1.3, 3.5 - 1.6 * index), dashes=(4, 2) if index else (1, 0))  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.grid(linewidth=0.6)
        legend_below(axes)
    return done[0]


def _plain_log_ticks(axes: Axes, which: str) -> None:
    """Label a logarithmic axis of ratios 0.5x, 1x, 2x, 5x."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    wide = high / low > 30
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if wide else (1.0, 2.0, 5.0) if high / low > 4 else _FINE))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.set_minor_locator(NullLocator())


_FINE = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
