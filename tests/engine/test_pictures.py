"""Pictures: pixels in their places, nothing cropped, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from soda_engine.evaluation.pictures import GAP, MARGIN, curves, image_grid, labelled_rows, traversal_grid


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"
        return np.asarray(picture)


def dark(*shape: int) -> Tensor:
    """Random images in [-1, 0.5], so that none of their pixels is white."""
    return torch.rand(shape) * 1.5 - 1


def content_box(picture: np.ndarray) -> tuple[int, int, int, int]:
    """Rows and columns of margin above, left, below and right of all that is not white."""
    rows, columns = np.nonzero((picture < 250).any(-1))
    height, width = picture.shape[:2]
    return rows.min(), columns.min(), height - 1 - rows.max(), width - 1 - columns.max()


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_enlarges_by_repetition_in_reading_order(tmp_path: Path, channels: int) -> None:
    images = dark(5, channels, 8, 8)
    picture = pixels(image_grid(images, tmp_path / "new" / "grid.png", columns=3))
    assert picture.shape == (2 * 64 + 3 * GAP, 3 * 64 + 4 * GAP, 3)
    for index, image in enumerate(images):
        y, x = (GAP + place * (64 + GAP) for place in divmod(index, 3))
        expected = ((image + 1) * 127.5).round().expand(3, 8, 8).permute(1, 2, 0).numpy().astype(np.uint8)
        np.testing.assert_array_equal(picture[y : y + 64, x : x + 64], np.kron(expected, np.ones((8, 8, 1), np.uint8)))
    assert (picture[-64 - GAP :, -64 - GAP :] == 255).all()


@pytest.mark.parametrize(("side", "cell"), [(8, 64), (12, 72), (32, 64), (100, 100)])
def test_cells_are_whole_multiples_of_at_least_64(tmp_path: Path, side: int, cell: int) -> None:
    assert pixels(image_grid(dark(1, 1, side, side), tmp_path / "grid.png")).shape[0] == cell + 2 * GAP


def test_values_out_of_range_and_nan_are_drawn_as_the_nearest(tmp_path: Path) -> None:
    image = torch.tensor([[5.0, -5.0], [float("nan"), 0.0]]).view(1, 1, 2, 2)
    picture = pixels(image_grid(image, tmp_path / "grid.png", cell_size=2))
    assert picture[GAP : GAP + 2, GAP : GAP + 2, 0].tolist() == [[255, 0], [0, 128]]


@pytest.mark.parametrize("title", [None, "short", "a title that is much wider than the two images below it"])
@pytest.mark.parametrize(
    "labels", [("source", "reconstruction"), ("", ""), ("gÅj, 1σ", "x")], ids=["long", "no", "tall"]
)
def test_no_text_is_cropped(tmp_path: Path, title: str | None, labels: tuple[str, str]) -> None:
    rows = [(labels[0], dark(2, 1, 8, 8)), (labels[1], dark(2, 3, 16, 16))]
    picture = pixels(labelled_rows(rows, tmp_path / "rows.png", title=title, column_labels=["first of two", "2"]))
    assert min(content_box(picture)) >= MARGIN - 2


def test_rows_of_several_sizes_share_a_cell(tmp_path: Path) -> None:
    small, large = -torch.ones(3, 1, 8, 8), -torch.ones(2, 3, 32, 32)
    picture = pixels(labelled_rows([("", small), ("", large)], tmp_path / "rows.png"))
    assert picture.shape == (2 * 64 + GAP + 2 * MARGIN, 3 * 64 + 2 * GAP + 2 * MARGIN, 3)
    assert (picture == 0).all(-1).sum() == 5 * 64 * 64


def test_narrow_columns_make_room_for_their_labels(tmp_path: Path) -> None:
    images = -torch.ones(1, 5, 1, 8, 8)
    path = tmp_path / "walk.png"
    picture = pixels(traversal_grid(images, path, amounts=(-1.5, -0.75, 0, 0.75, 1.5), cell_size=16))
    # Columns without ink, over the labels' rows alone, between one label and the next.
    ink = (picture[MARGIN : MARGIN + 20] < 250).any((0, 2))
    gaps = np.diff(np.nonzero(ink)[0])
    assert (gaps > 6).sum() == 4 and min(content_box(picture)) >= MARGIN - 2


def test_traversal_rows_and_amounts_must_fit(tmp_path: Path) -> None:
    images = dark(2, 3, 1, 8, 8)
    with pytest.raises(ValueError, match="2 row_labels and 4 amounts"):
        traversal_grid(images, tmp_path / "walk.png", amounts=(-1, 0, 1, 2))
    with pytest.raises(ValueError, match="1 row_labels"):
        traversal_grid(images, tmp_path / "walk.png", amounts=(-1, 0, 1), row_labels=["a"])


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 2, 8, 8),
        torch.zeros(0, 1, 8, 8),
        torch.zeros(1, 8, 8),
        torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
    ],
    ids=["two_channels", "none", "one_image", "uint8"],
)
def test_bad_images_are_named(tmp_path: Path, images: Tensor) -> None:
    with pytest.raises(ValueError, match="images (has shape|is torch.uint8)"):
        image_grid(images, tmp_path / "grid.png")
    with pytest.raises(ValueError, match="row 'a'"):
        labelled_rows([("a", images)], tmp_path / "rows.png")


def test_other_formats_and_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.png"):
        image_grid(dark(1, 1, 8, 8), tmp_path / "grid.jpg")
    with pytest.raises(ValueError, match="rows is empty"):
        labelled_rows([], tmp_path / "rows.png")


def write_metrics(path: Path, probes: bool = True) -> Path:
    records: list[dict[str, object]] = [
        {"kind": "train", "images": n * 10_000, "window_loss": 1 / n} for n in range(1, 100)
    ]
    if probes:
        records += [{"kind": "probe", "images": n * 250_000, "linear_probe": 0.8, "knn": 0.7} for n in (1, 2, 3)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_curves_have_a_panel_for_what_occurs(tmp_path: Path) -> None:
    both = pixels(curves(write_metrics(tmp_path / "a.jsonl"), tmp_path / "a.png", title="a run"))
    loss = pixels(curves(write_metrics(tmp_path / "b.jsonl", probes=False), tmp_path / "b.png"))
    assert both.shape[1] == 2 * loss.shape[1]
    assert (both[0] == 255).all() and min(content_box(both)) > 0


def test_curves_leave_out_a_line_cut_short(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path / "a.jsonl")
    whole = pixels(curves(metrics, tmp_path / "a.png"))
    with metrics.open("a") as file:
        file.write('{"images": 99')
    np.testing.assert_array_equal(pixels(curves(metrics, tmp_path / "b.png")), whole)
    with metrics.open("a") as file:
        file.write('\n{"images": 1}\n')
    with pytest.raises(ValueError, match="line 103 is not JSON"):
        curves(metrics, tmp_path / "c.png")


def test_curves_refuse_a_file_without_metrics(tmp_path: Path) -> None:
    metrics = tmp_path / "a.jsonl"
    metrics.write_text('{"images": 1, "lr": 0.1}\n')
    with pytest.raises(ValueError, match="has none of"):
        curves(metrics, tmp_path / "a.png")
    pixels(curves(metrics, tmp_path / "a.png", panels={"rate": ("lr",)}))
