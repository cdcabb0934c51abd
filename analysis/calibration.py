"""calibration.png: whether answers given with 80% confidence are right 80% of the time; expected calibration error.

python -m analysis.calibration runs/NAME
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from analysis.command import command, load_for
from analysis.plotting import drawn, to_rgb
from analysis.predictions import Floats, Ints, checked_predictions, prediction_options
from analysis.run import AnalysisError
from analysis.style import BLUE, GREY, ORANGE, new_figure, save
from train.screen.log import Log

FEW_IMAGES = 10  # a bin with fewer images says little, and is drawn pale


@dataclass(frozen=True, eq=False)
class Reliability:
    """For bins of confidence of equal width: the number of images, and their mean confidence and accuracy (0..1, NaN in an empty
    bin). A bin contains its upper edge but not its lower one; the first contains 0 as well."""

    counts: Ints
    confidence: Floats
    accuracy: Floats

    @property
    def ece(self) -> float:
        """Expected calibration error (arXiv:1706.04599), 0..1: the bins' |accuracy - confidence|, weighted by images."""
        full = self.counts > 0
        gaps = np.abs(self.accuracy[full] - self.confidence[full])
        return float((self.counts[full] * gaps).sum() / self.counts.sum())

    @property
    def overconfidence(self) -> float:
        """Mean confidence minus accuracy, -1..1."""
        full = self.counts > 0
        return float((self.counts[full] * (self.confidence[full] - self.accuracy[full])).sum() / self.counts.sum())


def reliability(confidence: Floats, hits: npt.NDArray[np.bool_], bins: int = 15) -> Reliability:
    """Sort (N,) confidences 0..1 and whether each answer was right into `bins` bins."""
    if len(confidence) == 0 or bins < 1:
        raise ValueError(f"{len(confidence)} confidences in {bins} bins, expected at least one of each")
    # edges rounded as by linspace, so that a confidence of exactly 0.2 falls into the bin that ends at 0.2
    place = np.clip(np.searchsorted(np.linspace(0, 1, bins + 1), confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(
            counts=counts.astype(np.int64),
            confidence=np.bincount(place, weights=confidence, minlength=bins) / counts,
            accuracy=np.bincount(place, weights=hits, minlength=bins) / counts,
        )


@drawn
def draw_calibration(found: Reliability, path: Path, *, caption: str = "") -> None:
    """The reliability diagram, and below it how many answers fall into each bin."""
    bins = len(found.counts)
    edges = np.linspace(0, 100, bins + 1)
    verdict = "overconfident" if found.overconfidence > 0 else "underconfident"
    title = f"Calibration: expected error {100 * found.ece:.2f} points"
    figure = new_figure(6.0, 6.4, title, caption)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 100 / bins
    centres = edges[:-1] + width / 2
    for some, strength in ((found.counts >= FEW_IMAGES, 1.0), ((found.counts > 0) & (found.counts < FEW_IMAGES), 0.3)):
        accuracy, confidence = 100 * found.accuracy[some], 100 * found.confidence[some]
        name = "accuracy of the bin" if strength == 1 else f"of fewer than {FEW_IMAGES} images"
        upper.bar(
            centres[some], accuracy, width=width * 0.94, color=BLUE, alpha=strength, label=name if some.any() else None
        )
        upper.bar(
            centres[some],
            confidence - accuracy,
            width=width * 0.94,
            bottom=accuracy,
            facecolor=(*to_rgb(ORANGE), 0.4 * strength),
            edgecolor=(*to_rgb(ORANGE), strength),
            hatch="//",
            label="gap to its mean confidence" if strength == 1 else None,
        )
    upper.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1, label="perfect")
    upper.set_ylabel("accuracy (%)")
    upper.set_ylim(0, 100)
    upper.set_xlim(0, 100)
    upper.legend(
        fontsize=7.5, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=4, frameon=False, columnspacing=1.2
    )
    lower.set_title(
        f"on average {abs(100 * found.overconfidence):.2f} points {verdict}; how many answers there are:", fontsize=8
    )
    lower.bar(centres, found.counts, width=width * 0.94, color=GREY)
    lower.set_yscale("symlog", linthresh=1)
    lower.set_yticks([t for t in (1, 10, 100, 1000, 10_000, 100_000) if t <= max(10, found.counts.max() * 2)])
    lower.yaxis.set_major_formatter("{x:,.0f}")
    lower.minorticks_off()
    lower.set_ylabel("images")
    lower.set_xlabel("confidence (%)")
    for axes in (upper, lower):
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.set_axisbelow(True)
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    options = prediction_options(
        "analysis.calibration", "Draw calibration.png: reliability diagram and calibration error."
    )
    options.add_argument("--bins", type=int, default=15, help="bins of confidence (default: 15)")

    def body(options: argparse.Namespace, log: Log) -> None:
        if options.bins < 1:
            raise AnalysisError(f"--bins {options.bins}: must be at least 1")
        run = load_for(options, log)
        predictions, _ = checked_predictions(run, log, options.accept_difference)
        found = reliability(predictions.confidence, predictions.hits, options.bins)
        path = run.output_dir(options.output) / "calibration.png"
        draw_calibration(found, path, caption=run.caption(predictions.accuracy))
        log(
            f"expected calibration error {100 * found.ece:.2f} points, overconfident by {100 * found.overconfidence:+.2f}"
        )
        log(str(path))

    return command(options, arguments, body)


if __name__ == "__main__":
    sys.exit(main())
