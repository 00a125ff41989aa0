"""SVG drawings that follow the page's colours, light or dark, as wide as a phone.

A drawing is 360 CSS pixels wide: a page shows it at its size on a phone and several beside each other on a laptop, so
that its letters are never scaled down. Colours are names of the page's CSS variables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

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


@contextmanager
def drawing(name: str, height_px: float) -> Iterator[tuple[Axes, list[str]]]:
    """Give axes to draw on, and a list that holds the finished SVG after the block.

    Args:
        name: told from other drawings of a page by; it goes into the ids within the SVG.
    """
    done: list[str] = []
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        size = (WIDTH_PX / _PX_AN_INCH, height_px / _PX_AN_INCH)
        figure = Figure(figsize=size, layout="constrained")
        yield figure.subplots(), done
        FigureCanvasSVG(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    done.append(_for_page(written.getvalue(), name))


def _for_page(svg: str, name: str) -> str:
    """Return an SVG as a part of a page: its colours the page's, its ids its own, without what XML files start with."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for variable, colour in _STANDING.items():
        svg = svg.replace(colour, f"var(--{variable})")
    prefix = re.sub(r"\W+", "-", name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    label = name.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def legend_below(axes: Axes, columns: int = 2, **options: Any) -> None:
    """Put the legend under the axes, where it covers nothing."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=columns, **options)
