"""compare.png and a table: several runs on the same test images, and their differences with 95% intervals.

python -m analysis.compare runs/A runs/B [runs/C ...]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, norm  # type: ignore[import-untyped]

from analysis.command import command, load_for
from analysis.plotting import MaxNLocator, drawn
from analysis.predictions import checked_predictions, prediction_options
from analysis.run import AnalysisError, LoadedRun
from analysis.style import BLUE, GREY, SERIES, new_figure, plain, save
from train.config import changes, to_dict
from train.screen.log import Log
from train.screen.progress import duration
from train.step.measures import recorded

Hits = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Difference:
    """Accuracy of one network minus that of another on the same images, in percentage points, with its 95% interval.

    `gained` counts the images that only the first answers correctly, `lost` those that only the other does; `p_value` is that of
    McNemar's exact test.
    """

    points: float
    low: float
    high: float
    gained: int
    lost: int
    p_value: float


def paired_difference(ours: Hits, theirs: Hits, level: float = 0.95) -> Difference:
    """Compare two networks image by image, from whether each answer is correct (N,).

    The interval is Agresti and Min's (2005, Statistics in Medicine 24): Wald's with half an image added to each cell of
    the 2 x 2 table, which keeps its level when few images differ. McNemar's test is the exact binomial one. Both are about
    these two networks only; the variation between seeds is not included.
    """
    if ours.shape != theirs.shape or ours.ndim != 1 or len(ours) == 0:
        raise ValueError(f"answers of shapes {ours.shape} and {theirs.shape}, expected the same (N,)")
    count = len(ours)
    gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    b, c, n = gained + 0.5, lost + 0.5, count + 2
    middle = (b - c) / n
    half = float(norm.ppf(0.5 + level / 2)) * math.sqrt((b + c) - (b - c) ** 2 / n) / n
    p_value = float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0
    return Difference(
        points=100 * (gained - lost) / count,
        low=100 * max(middle - half, -1.0),
        high=100 * min(middle + half, 1.0),
        gained=gained,
        lost=lost,
        p_value=p_value,
    )


@dataclass(frozen=True, eq=False)
class Contender:
    """One of the runs compared: what is kept of it once its predictions are made."""

    name: str
    file: str
    epoch: int
    config: dict[str, dict[str, Any]]
    metrics: list[dict[str, Any]]
    test_set: str  # fingerprint of the test images and labels
    validation: str | None  # fingerprint of the validation split, where there is one
    hits: Hits
    where: str  # device and precision of the training

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * float(self.hits.mean())

    @property
    def seconds(self) -> float:
        """Training time over all its epochs."""
        return sum(float(m["seconds"]) for m in self.metrics)

    @property
    def images_per_second(self) -> float:
        """Over all its epochs; NaN where none is finished."""
        images = sum(float(m["seconds"]) * float(m["images_per_second"]) for m in self.metrics)
        return images / self.seconds if self.seconds else math.nan


def contender(run: LoadedRun, name: str, hits: Hits) -> Contender:
    """The parts of a run that the comparison needs."""
    environment = run.environment
    return Contender(
        name=name,
        file=run.file,
        epoch=run.epoch,
        config=to_dict(run.config),
        metrics=run.metrics,
        test_set=run.dataset.test.fingerprint,
        validation=_validation(run),
        hits=hits,
        where=f"{environment.get('device_name') or environment.get('device', '?')}, {environment.get('precision', '?')}",
    )


def _validation(run: LoadedRun) -> str | None:
    split = run.dataset.validation
    return None if split is None else split.fingerprint


def check_same_splits(first: Contender, other: LoadedRun, name: str) -> None:
    """AnalysisError where two runs have different test images, or different validation splits."""
    if first.test_set == other.dataset.test.fingerprint:
        if first.validation != _validation(other):
            ours, theirs = (
                amount or "nothing" for amount in (first.config["data"].get("validation"), other.config.data.validation)
            )
            raise AnalysisError(
                f"{name} holds out {theirs} of the training images (data.validation), {first.name} {ours}: they were trained "
                "and chosen on different images, and cannot be compared; train them with the same data.validation"
            )
        return
    ours, theirs = first.config["data"]["name"], other.config.data.name
    found = theirs if ours != theirs else f"other test images of {ours}, of another folder or version"
    raise AnalysisError(
        f"{name} is tested on {found}, {first.name} on {ours}: their accuracies cannot be compared; give runs over the same data"
    )


def differing_keys(configs: Sequence[dict[str, dict[str, Any]]]) -> list[tuple[str, list[Any]]]:
    """(section.key, its value in each recipe) for every key in which the recipes differ, except keys that change nothing."""
    # a key that only some recipes have counts as null in the others
    names = dict.fromkeys(f"{section}.{key}" for config in configs for section, keys in config.items() for key in keys)
    found = []
    for name in names:
        section, key = name.split(".", 1)
        values = [config[section].get(key) for config in configs]
        if changes(name) != "nothing" and any(value != values[0] for value in values):
            found.append((name, values))
    return found


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parent folders as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise AnalysisError(f"{paths[0]}: given more than once")


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned lines, the first column left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def describe(runs: Sequence[Contender]) -> list[str]:
    """The comparison as lines of text: each run, its difference from the first, and the keys in which the recipes differ."""
    rows = [["run", "weights", "test accuracy", "training", "images/s", "on"]]
    for run in runs:
        rate = f"{run.images_per_second:,.0f}" if run.seconds else "-"
        rows.append(
            [run.name, f"{run.file}, epoch {run.epoch}", f"{run.accuracy:.2f}%", duration(run.seconds), rate, run.where]
        )
    lines = table(rows)
    lines.append("")
    first = runs[0]
    rows = [[f"against {first.name}", "points", "95% interval", "right alone", "wrong alone", "McNemar p"]]
    for run in runs[1:]:
        d = paired_difference(run.hits, first.hits)
        rows.append(
            [
                run.name,
                f"{d.points:+.2f}",
                f"{d.low:+.2f} to {d.high:+.2f}",
                f"{d.gained:,}",
                f"{d.lost:,}",
                f"{d.p_value:.2g}",
            ]
        )
    lines += table(rows)
    lines += [
        f"paired over the {len(first.hits):,} test images; of these networks, not of their recipes: other seeds give others"
    ]
    flattered = [run.name for run in runs if run.file == "best.pt" and run.validation is None]
    if flattered:
        lines.append(
            f"best.pt of {', '.join(flattered)} was chosen on the test set itself, which flatters; --checkpoint last compares "
            "the last epochs"
        )
    differing = differing_keys([run.config for run in runs])
    lines.append("")
    if not differing:
        return [*lines, "the recipes are equal"]
    return lines + table(
        [["key", *(run.name for run in runs)], *([name, *map(_short, values)] for name, values in differing)]
    )


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@drawn
def draw_comparison(runs: Sequence[Contender], path: Path) -> None:
    """Test accuracy by epoch and by training time, and the differences from the first run with their intervals."""
    count = len(runs)
    caption = f"tested on the same {len(runs[0].hits):,} images of {runs[0].config['data']['name']}"
    figure = new_figure(
        10.5, 4.6 + 0.22 * count, " against ".join(r.name for r in runs) if count < 4 else f"{count} runs", caption
    )
    grid = figure.add_gridspec(2, 2, height_ratios=(3.2, 0.5 + 0.35 * (count - 1)))
    by_epoch, by_time = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    differences = figure.add_subplot(grid[1, :])
    by_epoch.sharey(by_time)
    for number, run in enumerate(runs):
        if not run.metrics:
            continue
        measured = recorded(run.metrics[-1])[0]
        accuracy = [float(m[f"{measured.key}_accuracy"]) for m in run.metrics]
        style: dict[str, Any] = {
            "color": SERIES[number % len(SERIES)],
            "linestyle": ("-", "--", "-.", ":")[number // len(SERIES) % 4],
            "marker": "os^Dvx"[number % 6] if len(accuracy) <= 40 else "",
            "markersize": 3.5,
        }
        by_epoch.plot(
            [m["epoch"] for m in run.metrics], accuracy, label=f"{plain(run.name, 40)}: {run.accuracy:.2f}%", **style
        )
        by_time.plot(np.cumsum([float(m["seconds"]) for m in run.metrics]), accuracy, **style)
    by_epoch.set_xlabel("epoch")
    by_epoch.set_ylabel("accuracy after each epoch (%)" if runs[0].validation else "test accuracy (%)")
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_epoch.legend(fontsize=8, loc="lower right")
    by_time.set_xlabel("training time (s)")
    by_time.tick_params(labelleft=True)
    found = [paired_difference(run.hits, runs[0].hits) for run in runs[1:]]
    for place, d in enumerate(found):
        differences.plot([d.low, d.high], [place, place], color=BLUE, linewidth=2)
        differences.plot([d.points], [place], "o", color=BLUE)
        differences.annotate(
            f"{d.points:+.2f} [{d.low:+.2f}, {d.high:+.2f}], p = {d.p_value:.2g}",
            (d.points, place),
            xytext=(0, 5),
            textcoords="offset points",
            fontsize=8,
            ha="center",
        )
    differences.axvline(0, color=GREY, linewidth=1, linestyle="--")
    differences.set_yticks(range(len(found)), [plain(run.name, 40) for run in runs[1:]])
    differences.set_ylim(len(found) - 0.4, -0.9)
    reach = 1.25 * max(max(abs(d.low), abs(d.high)) for d in found)
    differences.set_xlim(-reach, reach)
    differences.set_xlabel(
        f"points more than {plain(runs[0].name, 40)}, with the 95% interval (paired); p by McNemar's exact test"
    )
    for axes in (by_epoch, by_time, differences):
        axes.grid(alpha=0.3, linewidth=0.5)
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    options = prediction_options(
        "analysis.compare", "Compare runs over the same test images: prints a table, draws compare.png.", one_run=False
    )
    options.add_argument("runs", nargs="+", type=Path, metavar="runs/NAME", help="two or more run folders")
    options.add_argument(
        "--output", type=Path, default=Path("compare.png"), metavar="FILE", help="default: compare.png"
    )
    return command(options, arguments, _compare)


def _compare(options: argparse.Namespace, log: Log) -> None:
    if len(options.runs) < 2:
        raise AnalysisError("one run is nothing to compare; give two or more run folders")
    names = distinct_names(options.runs)
    runs: list[Contender] = []
    for path, name in zip(options.runs, names, strict=True):
        run = load_for(options, log, path)
        if runs:
            check_same_splits(runs[0], run, name)
        predictions, _ = checked_predictions(run, log, options.accept_difference)
        runs.append(contender(run, name, predictions.hits))
    log("")
    for line in describe(runs):
        log(line)
    draw_comparison(runs, options.output)
    log(str(options.output))


if __name__ == "__main__":
    sys.exit(main())
