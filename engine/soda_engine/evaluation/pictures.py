"""PNG pictures: grids of images, rows with labels, traversals, and curves of a run's metrics.

Image pixels are drawn as they are, enlarged by repetition (nearest), on white; text is set in DejaVu Sans, the font
that comes with matplotlib. Every function takes images in [-1, 1] of 1 or 3 channels and writes one file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MIN_CELL_SIZE = 64
"""Side in pixels that smaller images are enlarged to, or a little beyond: by a whole factor."""
GAP = 4
MARGIN = 16
FONT_SIZE = 16
TITLE_SIZE = 20
PANELS: Mapping[str, Sequence[str]] = {"loss": ("window_loss",), "probe accuracy": ("linear_probe", "knn")}
"""Default of `curves`: the panels, and the metrics of a run's metrics.jsonl that each of them shows."""


def image_grid(images: Tensor, path: str | Path, *, columns: int | None = None, cell_size: int | None = None) -> Path:
    """Write images in reading order as a grid.

    Args:
        images: [N, C, H, W] in [-1, 1], N of at least 1, C 1 or 3.
        path: the PNG; folders that lack are made.
        columns: images a row; None makes the grid about square.
        cell_size: side in pixels of an image in the picture; None: 64, or the images' own if that is larger.

    Returns:
        The file's path.

    Raises:
        ValueError: images or columns are not as said above.
    """
    images = _check_images(images, "images")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns is {columns}; it must be at least 1")
    rows = [(None, row) for row in images.split(columns)]
    return _save(_draw_rows(rows, cell_size=cell_size, margin=GAP), path)


def labelled_rows(
    rows: Sequence[tuple[str, Tensor]],
    path: str | Path,
    *,
    title: str | None = None,
    column_labels: Sequence[str] = (),
    cell_size: int | None = None,
) -> Path:
    """Write rows of images, each with its label on the left: sources above reconstructions, for example.

    Args:
        rows: (label, images [N, C, H, W] in [-1, 1]), top to bottom; rows may differ in N, C, H and W, and an image of
            another size than the rest is resized to the common cell.
        path: the PNG; folders that lack are made.
        title: a line above the rows.
        column_labels: one label above each column, left to right; a column may go without.
        cell_size: side in pixels of an image in the picture; None: 64, or that of the largest image.

    Returns:
        The file's path.

    Raises:
        ValueError: there is no row, or the images of one are not as said above.
    """
    checked = [(label, _check_images(images, f"row {label!r}")) for label, images in rows]
    if not checked:
        raise ValueError("rows is empty; at least one (label, images) is needed")
    return _save(_draw_rows(checked, title=title, column_labels=column_labels, cell_size=cell_size), path)


def traversal_grid(
    images: Tensor,
    path: str | Path,
    *,
    amounts: Sequence[float],
    unit: str = "σ",
    row_labels: Sequence[str] | None = None,
    title: str | None = None,
    cell_size: int | None = None,
) -> Path:
    """Write what a walk through z looks like: a row a walk, a column an amount.

    Args:
        images: [rows, amounts, C, H, W] in [-1, 1].
        path: the PNG; folders that lack are made.
        amounts: what the columns are labelled with, such as the `amounts` of `traverse`.
        unit: follows each amount; "" for the weights of an interpolation.
        row_labels: None leaves the rows without.
        title: a line above the rows.
        cell_size: side in pixels of an image in the picture; None: 64, or that of the images.

    Returns:
        The file's path.

    Raises:
        ValueError: images, amounts and row_labels do not fit together.
    """
    if images.ndim != 5:
        raise ValueError(f"images has shape {tuple(images.shape)}; it must be [rows, amounts, C, H, W]")
    labels = [None] * len(images) if row_labels is None else list(row_labels)
    if (len(labels), len(amounts)) != tuple(images.shape[:2]):
        raise ValueError(
            f"images has {images.shape[0]} rows of {images.shape[1]}; there are {len(labels)} row_labels "
            f"and {len(amounts)} amounts"
        )
    rows = [(label, _check_images(row, "images")) for label, row in zip(labels, images, strict=True)]
    # Rounded to 2 digits, with a true minus and without a sign on 0.
    texts = [f"{round(amount, 2):+g}".replace("-", "−") if round(amount, 2) else "0" for amount in amounts]
    if min(amounts) >= 0:
        texts = [text.lstrip("+") for text in texts]
    column_labels = [text + unit for text in texts]
    return _save(_draw_rows(rows, title=title, column_labels=column_labels, cell_size=cell_size), path)


def curves(
    metrics: str | Path,
    path: str | Path,
    *,
    panels: Mapping[str, Sequence[str]] = PANELS,
    x_key: str = "images",
    title: str | None = None,
) -> Path:
    """Draw metrics of a run against the images seen.

    Args:
        metrics: a JSONL file: an object a line, with the key `x_key` and any of the metrics. A last line that a crash
            cut short is left out.
        path: the PNG; folders that lack are made.
        panels: for each panel, its y label and the metrics shown; a panel none of whose metrics occurs is left out.
        x_key: the key of the x axis.
        title: a line above the panels.

    Returns:
        The file's path.

    Raises:
        ValueError: a line is not JSON, or none of the metrics occurs.
    """
    # Half a second to import, which the pictures that matplotlib does not draw need not wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    records = _read_jsonl(Path(metrics))
    shown: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for panel, names in panels.items():
        for name in names:
            points = [(record[x_key], record[name]) for record in records if name in record and x_key in record]
            if points:
                shown.setdefault(panel, {})[name] = ([x for x, _ in points], [y for _, y in points])
    if not shown:
        wanted = sorted({name for names in panels.values() for name in names})
        raise ValueError(f"metrics file {str(metrics)!r} has none of {wanted} beside {x_key!r}")
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 11}):
        figure = Figure(figsize=(5.6 * len(shown), 3.8), dpi=150, facecolor="white", layout="constrained")
        grid = figure.subplots(1, len(shown), sharex=True, squeeze=False)
        for axes, (panel, lines) in zip(grid[0], shown.items(), strict=True):
            for name, (xs, ys) in lines.items():
                marker = "o" if len(xs) <= 30 else None
                axes.plot(xs, ys, label=name.replace("_", " "), linewidth=1.6, marker=marker, markersize=4)
            axes.set_xlabel(x_key)
            axes.set_ylabel(panel)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, min_n_ticks=2))
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, linewidth=0.8)
            if len(lines) > 1:
                axes.legend(frameon=False)
        if title is not None:
            figure.suptitle(title)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return _save(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)


def _check_images(images: Tensor, name: str) -> Tensor:
    """Return images [N, C, H, W] in [-1, 1] as uint8 RGB [N, H, W, 3] on the CPU."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"{name} has shape {tuple(images.shape)}; it must be [N, C, H, W], N > 0 and C 1 or 3")
    if not images.is_floating_point():
        raise ValueError(f"{name} is {images.dtype}; it must be floating point in [-1, 1]")
    values = torch.nan_to_num(images.detach().float().cpu(), nan=-1.0).clamp(-1, 1)
    return ((values + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def _draw_rows(
    rows: Sequence[tuple[str | None, Tensor]],
    *,
    title: str | None = None,
    column_labels: Sequence[str] = (),
    cell_size: int | None = None,
    margin: int = MARGIN,
) -> Image.Image:
    """Lay out uint8 RGB rows [N, H, W, 3] with their labels; every text gets the room it needs."""
    if cell_size is None:
        largest = max(max(images.shape[1:3]) for _, images in rows)
        cell_size = largest * max(1, math.ceil(MIN_CELL_SIZE / largest))
    elif cell_size < 1:
        raise ValueError(f"cell_size is {cell_size}; it must be at least 1 pixel")
    font, title_font = _font(FONT_SIZE), _font(TITLE_SIZE)
    line, title_line = sum(font.getmetrics()), sum(title_font.getmetrics())
    label_width = max(math.ceil(font.getlength(label or "")) for label, _ in rows)
    left = margin + (label_width + 12 if label_width else 0)
    top = margin + (title_line + 8 if title else 0) + (line + 4 if column_labels else 0)
    # Columns move apart where a label is wider than an image.
    pitch = max([cell_size + GAP, *(math.ceil(font.getlength(label)) + 8 for label in column_labels)])
    columns = max(len(images) for _, images in rows)
    width = left + (columns - 1) * pitch + cell_size + margin
    if column_labels:
        width += max(0, pitch - GAP - cell_size)
        left += max(0, pitch - GAP - cell_size) // 2
    if title:
        width = max(width, 2 * margin + math.ceil(title_font.getlength(title)))
    height = top + len(rows) * (cell_size + GAP) - GAP + margin
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((margin, margin), title, fill="black", font=title_font)
    for column, label in enumerate(column_labels):
        draw.text((left + column * pitch + cell_size / 2, top - 4), label, fill="black", font=font, anchor="md")
    for row, (row_label, images) in enumerate(rows):
        y = top + row * (cell_size + GAP)
        if row_label:
            draw.text((margin + label_width, y + cell_size / 2), row_label, fill="black", font=font, anchor="rm")
        for column, pixels in enumerate(images):
            canvas.paste(_fit(pixels, cell_size), (left + column * pitch, y))
    return canvas


def _fit(pixels: Tensor, cell_size: int) -> Image.Image:
    """Enlarge or shrink an image [H, W, 3] so that its longer side is the cell's, and centre it on white."""
    image = Image.fromarray(pixels.contiguous().numpy())
    factor = cell_size / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX)
    cell = Image.new("RGB", (cell_size, cell_size), "white")
    cell.paste(image, ((cell_size - size[0]) // 2, (cell_size - size[1]) // 2))
    return cell


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font that matplotlib ships and draws with, so that all pictures look alike on every machine."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the records of a JSONL file, without a last line that was cut short."""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"metrics file {str(path)!r}: line {number} is not JSON: {error}") from error
    return records


def _save(picture: Image.Image, path: str | Path) -> Path:
    """Write a picture as a PNG, in a folder that is made where it lacks."""
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"picture {str(path)!r} ends in {path.suffix!r}; it must end in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        picture.save(unfinished, optimize=True)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from error
    return path
