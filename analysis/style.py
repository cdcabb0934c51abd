"""What all pictures share: palette, captions, and sheets of images whose pixels are drawn as squares. Uses matplotlib's Figure
and not pyplot, which keeps global state; analysis/plotting.py keeps the user's settings out."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from analysis.plotting import Figure, drawn, in_own_style
from train.disk.atomic import write_atomic

# Okabe and Ito's palette, told apart by colour-blind readers too
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
SERIES = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
GREY = "#555555"
DPI = 130

Pixels = npt.NDArray[np.uint8]


def plain(text: object, limit: int = 90) -> str:
    """Text for matplotlib: dollar signs start no formula, control characters are removed, and it is cut at `limit`."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    if len(shown) > limit:
        shown = shown[: limit - 1] + "…"
    return shown.replace("$", r"\$")


def pretty(class_name: str) -> str:
    """A class name as pictures show it: blanks for underscores, at most 18 characters."""
    return plain(class_name.replace("_", " "), 18)


def percent(share: float) -> str:
    """A probability 0..1 in percent; 100% and 0% only where it is exactly that."""
    if share >= 0.995:
        return f"{min(100 * share, 99.9):.1f}%" if share < 1 else "100%"
    return f"{100 * share:.0f}%" if share >= 0.01 else "<1%"


def new_figure(width: float, height: float, title: str, caption: str) -> Figure:
    """A figure of width x height inches, with a title on top and the caption in grey below."""
    assert in_own_style(), "a function that draws is marked @drawn"
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(plain(title), fontsize=12, fontweight="bold")
    figure.supxlabel(plain(caption, 160), fontsize=8, color=GREY)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG; characters that the font lacks become boxes without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        content = io.BytesIO()
        figure.savefig(content, dpi=DPI, format="png", facecolor="white")
    write_atomic(path, content.getvalue())


@dataclass(frozen=True)
class Tile:
    """An image (H, W, 3) uint8 and the lines of text (text, colour) below it; the first is printed bold."""

    image: Pixels
    lines: tuple[tuple[str, str], ...] = ()


@drawn
def draw_sheet(
    tiles: Sequence[Tile | None],
    path: Path,
    *,
    columns: int,
    title: str,
    caption: str,
    notes: Sequence[str] = (),
    group: int = 0,
    scale: int | None = None,
    empty: str = "nothing to show",
) -> None:
    """Draw tiles in rows of `columns`; each pixel of an image is a square of `scale` screen pixels. `notes` are below the title.

    With `group` > 0 there is a gap after every `group` columns. A tile None leaves its place empty.
    """
    present = [tile for tile in tiles if tile is not None]
    height, width = present[0].image.shape[:2] if present else (32, 32)
    scale = scale or max(1, round(128 / height))
    tile_h, tile_w = height * scale, width * scale
    point = DPI / 72
    font, line = 7.0, 7.0 * point * 1.3
    # a character of DejaVu Sans is about 0.6 of its size wide, bold ones 0.68
    longest = max(
        (len(text) * (0.68 if i == 0 else 0.6) for tile in present for i, (text, _) in enumerate(tile.lines)), default=0
    )
    pitch_x = max(tile_w + 12, math.ceil(longest * font * point) + 10)
    lines = max((len(tile.lines) for tile in present), default=0)
    pitch_y = tile_h + (round(lines * line) + 16 if lines else 8)
    rows = max(1, -(-len(tiles) // columns))
    gap = 26 if group else 0
    groups = -(-columns // group) if group else 1
    head = round(34 * point / 1.8) + round(len(notes) * 8 * point * 1.35) + 14
    foot = 34
    text_width = max(len(title) * 11 * 0.7, *(len(text) * 8 * 0.58 for text in (caption, *notes))) * point
    canvas_w = max(columns * pitch_x + (groups - 1) * gap + 24, round(min(text_width, 1400)) + 32)
    canvas_h = head + (rows * pitch_y if present else 80) + foot
    left = (canvas_w - columns * pitch_x - (groups - 1) * gap) // 2
    canvas = np.full((canvas_h, canvas_w, 3), 255, np.uint8)
    figure = Figure(figsize=(canvas_w / DPI, canvas_h / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for place, tile in enumerate(tiles):
        if tile is None:
            continue
        row, column = divmod(place, columns)
        x = left + column * pitch_x + (column // group * gap if group else 0)
        y = head + row * pitch_y
        corner = x + (pitch_x - tile_w) // 2
        canvas[y : y + tile_h, corner : corner + tile_w] = tile.image.repeat(scale, 0).repeat(scale, 1)
        for number, (text, colour) in enumerate(tile.lines):
            axes.text(
                x + pitch_x / 2,
                y + tile_h + 4 + number * line,
                text,
                color=colour,
                fontsize=font,
                fontweight="bold" if number == 0 else "normal",
                ha="center",
                va="top",
            )
    axes.imshow(canvas, interpolation="nearest", extent=(0, canvas_w, canvas_h, 0), aspect="auto")
    middle = canvas_w / 2
    axes.text(middle, 10, plain(title), fontsize=12, fontweight="bold", ha="center", va="top")
    for number, text in enumerate(notes):
        axes.text(
            middle,
            10 + 22 * point * 0.95 + number * 8 * point * 1.35,
            plain(text, 200),
            fontsize=8,
            ha="center",
            va="top",
        )
    axes.text(middle, canvas_h - 10, plain(caption, 160), fontsize=8, color=GREY, ha="center", va="bottom")
    if not present:
        axes.text(middle, head + 30, plain(empty), fontsize=10, color=GREY, ha="center", va="center")
    save(figure, path)
