"""misclassified.png: test images that the network gets wrong, with its prediction and confidence, and the true class.

python -m analysis.misclassified runs/NAME --order confidence --class cat --count 24
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from analysis.command import command, load_for
from analysis.predictions import Ints, Predictions, checked_predictions, prediction_options, worst_first
from analysis.run import AnalysisError, class_index
from analysis.style import BLUE, VERMILLION, Pixels, Tile, draw_sheet, percent, pretty
from dali_pipeline.dataset import ImagesOnDemand
from train.screen.log import Log

ORDERS = {
    "loss": "highest loss first",
    "confidence": "surest of the wrong answer first",
    "random": "drawn at random",
}


def choose(
    predictions: Predictions, *, order: str = "loss", label: int | None = None, count: int | None = None, seed: int = 0
) -> Ints:
    """Indices of misclassified test images in `order` (loss, confidence or random), of true class `label` alone if given."""
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}, expected one of {', '.join(ORDERS)}")
    wrong = worst_first(predictions)
    if label is not None:
        wrong = wrong[predictions.labels[wrong] == label]
    if order == "confidence":
        wrong = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")]
    elif order == "random":
        wrong = np.random.default_rng(seed).permutation(np.sort(wrong))
    return wrong[:count]


def draw_misclassified(
    images: Pixels | ImagesOnDemand,
    predictions: Predictions,
    class_names: tuple[str, ...],
    path: Path,
    *,
    count: int = 40,
    order: str = "loss",
    label: int | None = None,
    columns: int = 8,
    seed: int = 0,
    caption: str = "",
) -> Ints:
    """A grid of `count` of the test images (N, H, W, 3) uint8, and the indices that it shows."""
    total = len(choose(predictions, label=label))
    chosen = choose(predictions, order=order, label=label, count=count, seed=seed)
    tiles = [
        Tile(
            images[index],
            (
                (
                    f"said {pretty(class_names[predictions.predicted[index]])} {percent(predictions.confidence[index])}",
                    VERMILLION,
                ),
                (f"is {pretty(class_names[predictions.labels[index]])}", BLUE),
            ),
        )
        for index in chosen
    ]
    of_class = "" if label is None else f" of class {class_names[label]}"
    count_all = len(predictions) if label is None else int((predictions.labels == label).sum())
    draw_sheet(
        tiles,
        path,
        columns=min(columns, max(len(tiles), 1)),
        title=f"Misclassified test images{of_class}: {len(chosen)} of {total:,}, {ORDERS[order]}",
        notes=(
            f"orange: the answer and its confidence; blue: the truth ({total:,} of {count_all:,} images{of_class} are wrong)",
        ),
        caption=caption,
        empty="every image is classified correctly",
    )
    return chosen


def main(arguments: list[str] | None = None) -> int:
    options = prediction_options("analysis.misclassified", "Draw misclassified.png: what the network gets wrong.")
    options.add_argument("--count", type=int, default=40, help="how many images (default: 40)")
    options.add_argument("--order", choices=tuple(ORDERS), default="loss", help="default: highest loss first")
    options.add_argument("--class", dest="label", metavar="NAME", help="images of this true class alone")
    options.add_argument("--seed", type=int, default=0, help="of --order random")

    def body(options: argparse.Namespace, log: Log) -> None:
        if options.count < 1:
            raise AnalysisError(f"--count {options.count}: must be at least 1")
        run = load_for(options, log)
        label = None if options.label is None else class_index(options.label, run.class_names)
        predictions, _ = checked_predictions(run, log, options.accept_difference)
        path = run.output_dir(options.output) / "misclassified.png"
        draw_misclassified(
            run.dataset.test.images_on_demand,
            predictions,
            run.class_names,
            path,
            count=options.count,
            order=options.order,
            label=label,
            seed=options.seed,
            caption=run.caption(predictions.accuracy),
        )
        log(str(path))

    return command(options, arguments, body)


if __name__ == "__main__":
    sys.exit(main())
