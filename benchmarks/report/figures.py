"""SVG drawings that follow the page's colours, light or dark, as wide as a phone.

A drawing is 360 CSS pixels wide: a page shows it at its size on a phone and several beside each other on a laptop, so
that its letters are never scaled down. Colours are names of the page's CSS variables.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch

WIDTH_PX = 360
_PX_AN_INCH = 72  # an SVG of matplotlib has 72 units an inch

# matplotlib wants real colours: these stand for the page's variables and are replaced in the SVG.
_STANDING = {name: f"#0102{number:02x}" for number, name in enumerate(
    ("ink", "faint", "grid", "loss", "noise", "s1", "s2", "s3", "s4", "s5", "s6"), start=16
)}  # fmt: skip
INK, FAINT, GRID, LOSS, NOISE = (_STANDING[name] for name in ("ink", "faint", "grid", "loss", "noise"))
SERIES = tuple(_STANDING[f"s{number}"] for number in range(1, 7))
MARKERS = ("o", "s", "^", "D", "v", "P")

_STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "svg.fonttype": "path", "axes.edgecolor": FAINT,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.facecolor": "none", "figure.facecolor": "none", "axes.spines.top": False,
    "axes.spines.right": False, "grid.color": GRID, "legend.frameon": False, "legend.fontsize": 9,
    "axes.titlesize": 10, "axes.titlelocation": "left", "legend.labelcolor": INK,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawing with what stands above it; its title is told from the others' of a page by."""

    title: str
    svg: str


@contextmanager
def drawing(title: str, height_px: float) -> Iterator[tuple[Axes, list[Picture]]]:
    """Give axes to draw on, and a list that holds the finished picture after the block."""
    done: list[Picture] = []
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        size = (WIDTH_PX / _PX_AN_INCH, height_px / _PX_AN_INCH)
        figure = Figure(figsize=size, layout="constrained")
        yield figure.subplots(), done
        FigureCanvasSVG(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    done.append(Picture(title=title, svg=_for_page(written.getvalue(), title)))


def _for_page(svg: str, title: str) -> str:
    """Return an SVG as a part of a page: its colours the page's, its ids its own, without what XML files start with."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for variable, colour in _STANDING.items():
        svg = svg.replace(colour, f"var(--{variable})")
    prefix = re.sub(r"\W+", "-", title)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def legend_below(axes: Axes, colours: Mapping[str, str] | None = None) -> None:
    """Put the legend under the axes, where it covers nothing.

    Args:
        colours: of patches by what they mean; what is drawn with a label if not given.
    """
    handles, labels = axes.get_legend_handles_labels()
    if colours is not None:
        handles, labels = [Patch(color=colour) for colour in colours.values()], list(colours)
    columns = 3 if max(map(len, labels)) < 10 else 2
    axes.figure.legend(handles, labels, loc="outside lower left", ncols=columns)
