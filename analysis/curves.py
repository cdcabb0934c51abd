"""Pictures of how a run went: lr_finder.png."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from train.lr_finder import RangeTest, RangeTestError, suggest


def draw_lr_finder(csv_path: Path, png_path: Path) -> None:
    """The range test's curve with the suggested rates marked; the curve alone where it suggests none."""
    test = RangeTest.read_csv(csv_path)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(test.rates, test.losses, color="0.75", linewidth=1, label="loss of each step")
    axes.plot(test.rates, test.smoothed(), color="#0072B2", linewidth=2, label="smoothed")
    try:
        found = suggest(test)
    except RangeTestError as error:
        axes.set_title(str(error), fontsize=9)
    else:
        axes.axvspan(found.lr_min, found.lr_max, color="#0072B2", alpha=0.08)
        for rate, name, colour in ((found.lr_max, "lr_max", "#D55E00"), (found.lr_min, "lr_min", "#009E73")):
            axes.axvline(rate, color=colour, linewidth=1.5, label=f"{name} {rate:.3g}")
        end = "diverged" if test.diverged else "the highest rate tried"
        axes.set_title(f"LR range test: lowest loss at {found.lowest:.3g}, {end} at {found.limit:.3g}", fontsize=11)
    low, high = min(test.smoothed()), test.losses[0]
    axes.set_ylim(low - 0.15 * (high - low), high + 0.6 * (high - low))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.legend(loc="upper left", fontsize=9)
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    figure.savefig(png_path, dpi=130)
