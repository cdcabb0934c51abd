"""confusion_matrix.png and .csv, per_class.png and .csv: which classes are confused, and each one's precision, recall and F1.

python -m analysis.confusion runs/NAME
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from analysis.command import command, load_for
from analysis.plotting import MaxNLocator, drawn
from analysis.predictions import Ints, checked_predictions, prediction_options
from analysis.style import BLUE, GREEN, VERMILLION, new_figure, plain, pretty, save
from train.disk.atomic import write_csv
from train.screen.log import Log

MAX_NUMBERED_CLASSES = 20  # with more, a cell of the matrix has no room for its number
MAX_CLASSES = 200  # with more, the pictures show the most confused classes and those known least
LEAST_KNOWN = 50


@dataclass(frozen=True)
class ClassScore:
    """Precision, recall and F1 (0..1; 0 where there is nothing to divide by) and the number of test images of a class."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


def confusion(labels: Ints, predicted: Ints, num_classes: int) -> Ints:
    """(C, C) counts: rows are true classes, columns predictions."""
    counts: Ints = confusion_matrix(labels, predicted, labels=np.arange(num_classes)).astype(np.int64)
    return counts


def per_class(labels: Ints, predicted: Ints, class_names: tuple[str, ...]) -> list[ClassScore]:
    """The scores of every class, in the order of the labels."""
    scores = precision_recall_fscore_support(labels, predicted, labels=np.arange(len(class_names)), zero_division=0.0)
    rows = zip(class_names, *(part.tolist() for part in scores), strict=True)
    return [ClassScore(name, precision, recall, f1, int(support)) for name, precision, recall, f1, support in rows]


def cells(labels: Ints, predicted: Ints, num_classes: int) -> list[tuple[int, int, int]]:
    """(true, predicted, images) of the cells of the confusion matrix that are not empty, row by row."""
    places, images = np.unique(labels.astype(np.int64) * num_classes + predicted, return_counts=True)
    return list(zip((places // num_classes).tolist(), (places % num_classes).tolist(), images.tolist(), strict=True))


def most_confused(labels: Ints, predicted: Ints, num_classes: int, count: int = 10) -> list[tuple[int, int, int]]:
    """(true, predicted, images) of the largest cells off the diagonal, largest first."""
    wrong = [cell for cell in cells(labels, predicted, num_classes) if cell[0] != cell[1]]
    return sorted(wrong, key=lambda cell: -cell[2])[:count]


def write_confusion(counts: Ints, class_names: tuple[str, ...], path: Path) -> None:
    """CSV: a line a true class, a column a prediction."""
    rows = ([name, *row] for name, row in zip(class_names, counts.tolist(), strict=True))
    write_csv(path, [["true \\ predicted", *class_names], *rows])


def write_per_class(scores: list[ClassScore], path: Path) -> None:
    """CSV: class, precision, recall, f1, support."""
    rows = ([s.name, f"{s.precision:.6f}", f"{s.recall:.6f}", f"{s.f1:.6f}", s.support] for s in scores)
    write_csv(path, [["class", "precision", "recall", "f1", "support"], *rows])


@drawn
def draw_confusion(
    counts: Ints,
    class_names: tuple[str, ...],
    path: Path,
    *,
    title: str = "Which classes are taken for which",
    caption: str = "",
) -> None:
    """The matrix with its mistakes coloured; the diagonal is grey, so that the few mistakes are not lost beside it."""
    n = len(class_names)
    few = n <= MAX_NUMBERED_CLASSES
    size = 3.2 + 0.52 * n if few else 3.0 + 0.105 * n
    figure = new_figure(size + 0.6, size, title, caption)
    axes = figure.subplots()
    mistakes: npt.NDArray[np.float64] = counts.astype(float)
    np.fill_diagonal(mistakes, np.nan)
    top = max(float(np.nanmax(mistakes)) if n > 1 else 0.0, 1.0)
    axes.set_facecolor("0.88")
    shown = axes.imshow(mistakes, cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
    bar = figure.colorbar(shown, ax=axes, shrink=0.7, pad=0.02, ticks=MaxNLocator(integer=True))
    bar.set_label("test images taken for another class", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    names = [pretty(name) for name in class_names]
    font = 9 if few else 5.2
    axes.set_xticks(range(n), names, rotation=45 if few else 90, ha="right" if few else "center", fontsize=font)
    axes.set_yticks(range(n), names, fontsize=font)
    axes.tick_params(length=2 if few else 1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8 if few else 0.25)
    axes.tick_params(which="minor", length=0)
    if few:
        for (row, column), value in np.ndenumerate(counts):
            if value:
                dark = row != column and value > 0.6 * top
                axes.text(
                    column,
                    row,
                    str(value),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                    fontweight="bold" if row == column else "normal",
                )
    right = int(np.trace(counts))
    axes.set_title(f"{right:,} of {int(counts.sum()):,} on the diagonal (grey)", fontsize=9)
    save(figure, path)


def known_least(scores: list[ClassScore]) -> tuple[list[ClassScore], str]:
    """The classes that are drawn, lowest F1 first, and the picture's title: all classes, or of more than MAX_CLASSES the
    LEAST_KNOWN lowest of those that have test images."""
    ordered = sorted(scores, key=lambda s: s.f1)
    if len(ordered) <= MAX_CLASSES:
        return ordered, "How well each class is known"
    tested = [score for score in ordered if score.support]
    shown = tested[:LEAST_KNOWN]
    return shown, f"The {len(shown)} of {len(tested):,} tested classes known least"


@drawn
def draw_per_class(scores: list[ClassScore], path: Path, *, caption: str = "") -> None:
    """Precision, recall and F1 of every class in percent, best F1 on top; of very many classes those with the lowest, of those
    that have test images."""
    ordered, title = known_least(scores)
    step = 0.34 if len(ordered) <= MAX_NUMBERED_CLASSES else 0.145
    figure = new_figure(7.6, 1.7 + step * len(ordered), title, caption)
    axes = figure.subplots()
    places = np.arange(len(ordered))
    low = [100 * min(s.precision, s.recall) for s in ordered]
    high = [100 * max(s.precision, s.recall) for s in ordered]
    axes.hlines(places, low, high, color="0.7", linewidth=1.5, zorder=1)
    size = 55 if len(ordered) <= MAX_NUMBERED_CLASSES else 16
    for name, marker, colour, values in (
        ("precision: of those called so, how many are", "<", BLUE, [s.precision for s in ordered]),
        ("recall: of those that are, how many are called so", ">", VERMILLION, [s.recall for s in ordered]),
        ("F1: their harmonic mean", "|", GREEN, [s.f1 for s in ordered]),
    ):
        axes.scatter(
            [100 * v for v in values], places, s=size, marker=marker, color=colour, label=name, zorder=2, clip_on=False
        )
    with_support = [f"{pretty(s.name)}  ({s.support:,})" for s in ordered]
    axes.set_yticks(places, with_support, fontsize=9 if len(ordered) <= MAX_NUMBERED_CLASSES else 5.5)
    axes.set_ylim(-0.7, len(ordered) - 0.3)
    margin = max(0.05 * (max(high) - min(low)), 1.0)
    axes.set_xlim(max(min(low) - margin, 0), min(max(high) + margin, 100))
    axes.set_xlabel("percent; in brackets the number of test images")
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(loc="lower center", bbox_to_anchor=(0.42, 1.0), ncols=3, fontsize=7, frameon=False)
    save(figure, path)


def draw_for(
    labels: Ints, predicted: Ints, class_names: tuple[str, ...], folder: Path, caption: str = ""
) -> list[ClassScore]:
    """Write all four files, and return the scores in them. With more than MAX_CLASSES classes the matrix is that of the most
    confused ones, and confusion_matrix.csv has a line a cell that is not empty."""
    scores = per_class(labels, predicted, class_names)
    table, picture = folder / "confusion_matrix.csv", folder / "confusion_matrix.png"
    if len(class_names) <= MAX_CLASSES:
        counts = confusion(labels, predicted, len(class_names))
        write_confusion(counts, class_names, table)
        draw_confusion(counts, class_names, picture, caption=caption)
    else:
        found = cells(labels, predicted, len(class_names))
        rows = ([class_names[true], class_names[said], images] for true, said, images in found)
        write_csv(table, [["true", "predicted", "images"], *rows])
        shown = _most_confused_classes(labels, predicted, len(class_names))
        place = {label: n for n, label in enumerate(shown)}
        counts = np.zeros((len(shown), len(shown)), np.int64)
        for true, said, images in found:
            if true in place and said in place:
                counts[place[true], place[said]] = images
        title = f"The most confused of {len(class_names):,} classes"
        draw_confusion(counts, tuple(class_names[label] for label in shown), picture, title=title, caption=caption)
    write_per_class(scores, folder / "per_class.csv")
    draw_per_class(scores, folder / "per_class.png", caption=caption)
    return scores


def _most_confused_classes(labels: Ints, predicted: Ints, num_classes: int) -> list[int]:
    """The classes of the most confused pairs, MAX_NUMBERED_CLASSES of them, or the first ones where nothing is confused."""
    pairs = most_confused(labels, predicted, num_classes, MAX_NUMBERED_CLASSES)
    both = [label for true, said, _ in pairs for label in (true, said)]
    return sorted(list(dict.fromkeys([*both, *range(MAX_NUMBERED_CLASSES)]))[:MAX_NUMBERED_CLASSES])


def main(arguments: list[str] | None = None) -> int:
    options = prediction_options(
        "analysis.confusion",
        "Draw and write confusion_matrix.png/.csv and per_class.png/.csv; print the worst confusions.",
    )

    def body(options: argparse.Namespace, log: Log) -> None:
        run = load_for(options, log)
        predictions, _ = checked_predictions(run, log, options.accept_difference)
        folder = run.output_dir(options.output)
        caption = run.caption(predictions.accuracy)
        draw_for(predictions.labels, predictions.predicted, run.class_names, folder, caption)
        for true, said, images in most_confused(predictions.labels, predictions.predicted, len(run.class_names)):
            log(f"{images:6,}  {plain(run.class_names[true])} taken for {plain(run.class_names[said])}")
        for name in ("confusion_matrix.png", "confusion_matrix.csv", "per_class.png", "per_class.csv"):
            log(str(folder / name))

    return command(options, arguments, body)


if __name__ == "__main__":
    sys.exit(main())
