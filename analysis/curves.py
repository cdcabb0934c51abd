"""Pictures of the course of a run: curves.png, learning_rate.png, lr_finder.png.

python -m analysis.curves runs/NAME
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.command import command, load_for, parser
from analysis.plotting import Axes, MaxNLocator, drawn
from analysis.run import LoadedRun, Say
from analysis.style import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILLION, new_figure, plain, save
from dali_pipeline.regular import NotARegularFile
from train.options import OptimOptions
from train.screen.log import Log
from train.step.measures import recorded
from train.step.range_test import RangeTest, RangeTestError, Suggestion, suggest
from train.step.schedule import OneCycle, make_schedule

Metrics = Sequence[dict[str, Any]]
# of the measures after the first
COLOURS = {"plain": ORANGE, "tta": GREEN, "shift": PURPLE}  # by the views
LINES = {"": ":", "ema": "-."}  # by the weights
POINTS = {"": "D", "ema": "s"}  # likewise, where some epochs lack the measure
TRAINING = "training, augmented"


def loss_label(options: OptimOptions) -> str:
    """What the training loss is of: beside augmented images, whatever else the loss of an evaluation is not of."""
    apart = ["labels smoothed"] if options.label_smoothing else []
    return ", ".join([TRAINING, *apart, *(["classes weighed"] if options.class_weights == "balanced" else [])])


@drawn
def draw_curves(
    metrics: Metrics,
    path: Path,
    *,
    training_loss: str = TRAINING,
    title: str = "Loss and accuracy",
    caption: str = "",
) -> None:
    """Draw loss (logarithmic) and accuracy by epoch, on the training images and for every measure that the run evaluated; the
    epoch of best.pt is marked. `metrics`: the lines of metrics.jsonl; `training_loss`: what `loss_label` says of it."""
    if not metrics:
        raise ValueError("no epoch to draw")
    leading, *others = recorded({key for line in metrics for key in line})
    measured = f"{leading.key}_accuracy"
    epochs = [int(m["epoch"]) for m in metrics]
    figure = new_figure(9.6, 4.2, title, caption)
    left, right = figure.subplots(1, 2)
    marks = {"marker": "o", "markersize": 3.5} if len(epochs) <= 40 else {}
    for axes, key, label in ((left, "loss", training_loss), (right, "accuracy", TRAINING)):
        values = [m[f"train_{key}"] for m in metrics]
        axes.plot(epochs, values, color=BLUE, linestyle="--", label=label, **marks)
        values = [m[f"{leading.key}_{key}"] for m in metrics]
        axes.plot(epochs, values, color=VERMILLION, label=leading.label, **marks)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(epochs) == 1:
            axes.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
    for measure in others:
        values = [m.get(f"{measure.key}_accuracy", math.nan) for m in metrics]
        colour, line = COLOURS[measure.views], LINES[measure.weights]
        once, label = {}, measure.label
        if any(map(math.isnan, values)):  # points that may lie on each other: their numbers tell them apart
            once = {"marker": POINTS[measure.weights], "markersize": 5}
            label += f" {next(value for value in reversed(values) if not math.isnan(value)):.2f}%"
        right.plot(epochs, values, color=colour, linestyle=line, label=label, **once)
    left.set_ylabel("cross-entropy")
    left.set_yscale("log")
    _plain_log_ticks(left)
    right.set_ylabel("accuracy (%)")
    best = max(metrics, key=lambda m: float(m[measured]))
    for axes in (left, right):
        axes.axvline(best["epoch"], color=GREY, linewidth=1, linestyle=":")
    right.plot([best["epoch"]], [best[measured]], marker="*", markersize=13, color=VERMILLION, markeredgecolor="white")
    low = min(float(m[key]) for m in metrics for key in ("train_accuracy", measured))
    right.set_ylim(max(0, low - 5), min(102, max(float(best[measured]), float(metrics[-1]["train_accuracy"])) + 4))
    chosen = " (the test set chose it)" if leading.split == "test" else ""
    right.set_title(
        f"last {metrics[-1][measured]:.2f}%; best.pt {best[measured]:.2f}%, epoch {best['epoch']}{chosen}", fontsize=10
    )
    left.set_title(f"{leading.split} loss: last {metrics[-1][f'{leading.key}_loss']:.4f}", fontsize=10)
    left.legend(fontsize=8, loc="upper right")
    right.legend(fontsize=8, loc="lower right")
    save(figure, path)


def _plain_log_ticks(axes: Axes) -> None:
    """Label the axis 0.02, 0.5, 3 and not with powers of ten; minor ticks are labelled where it spans less than two decades."""
    low, high = axes.get_ylim()
    few = math.log10(high / low) < 2
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if few else "")
    axes.tick_params(axis="y", which="minor", labelsize=7)


def learning_rates(schedule: OneCycle, points: int = 2000) -> tuple[list[int], list[float]]:
    """Steps and rates of the schedule: all of them, or about `points` with the peak and both ends among them."""
    last = schedule.total_steps - 1
    steps = np.unique(np.linspace(0, last, min(points, schedule.total_steps)).round().astype(int)).tolist()
    steps = sorted({*steps, min(math.floor(schedule.peak_step), last), min(math.ceil(schedule.peak_step), last)})
    return steps, [schedule(step) for step in steps]


@drawn
def draw_learning_rate(
    schedule: OneCycle,
    steps_per_epoch: int,
    path: Path,
    *,
    metrics: Metrics = (),
    filters_peak: float | None = None,
    title: str = "Learning rate, step by step",
    caption: str = "",
) -> None:
    """Draw the schedule with its peak and end; dots are the rates in metrics.jsonl, those of each epoch's last step.
    `filters_peak`: where another optimizer trains the filters, its rate at the schedule's peak, which its title names."""
    steps, rates = learning_rates(schedule)
    figure = new_figure(7.4, 4.0, title, caption)
    axes = figure.subplots()
    if filters_peak is not None:
        axes.set_title(f"that of SGD; Muon's goes up and down with it, to {filters_peak:.4g} at the peak", fontsize=9)
    axes.plot([step / steps_per_epoch for step in steps], rates, color=BLUE, linewidth=2, label="schedule")
    if metrics:
        axes.plot(
            [m["epoch"] - 1 / steps_per_epoch for m in metrics],
            [m["lr"] for m in metrics],
            "o",
            color=ORANGE,
            markeredgecolor="black",
            markeredgewidth=0.5,
            markersize=5,
            label="stepped: last step of each epoch",
        )
    peak, rate = max(zip(steps, rates, strict=True), key=lambda point: point[1])
    last = schedule.total_steps - 1
    for step, value, text, colour, marker in (
        (peak, rate, f"peak: {rate:.4g} at step {peak:,}, {peak / steps_per_epoch:.3g} epochs in", VERMILLION, "^"),
        (last, schedule(last), f"end: {schedule(last):.4g} at step {last:,}, the last", GREEN, "s"),
    ):
        axes.plot([step / steps_per_epoch], [value], marker, color=colour, markersize=9, label=text)
    axes.set_ylim(-0.04 * schedule.lr_max, schedule.lr_max * 1.3)
    axes.set_xlabel("epoch")
    axes.set_ylabel("learning rate")
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, loc="upper right", ncols=2)
    save(figure, path)


@drawn
def draw_lr_finder(
    csv_path: Path, png_path: Path, *, used: tuple[float, float] | None = None, caption: str = ""
) -> None:
    """Draw the range test's curve and mark the rates `used` (lr_max, lr_min), by default those that it suggests. If it suggests
    none, only the curve is drawn."""
    test = RangeTest.read_csv(csv_path)
    found: Suggestion | None = None
    try:
        found = suggest(test)
    except RangeTestError as error:
        title = str(error)
    else:
        title = f"LR range test: the first valley of the loss is at a rate of {found.lowest:.3g}"
    figure = new_figure(7.4, 4.2, title, caption)
    if found is None:
        figure.suptitle(plain(title, 200), fontsize=8, wrap=True)
    axes = figure.subplots()
    axes.plot(test.rates, test.losses, color="0.75", linewidth=1, label="loss of each step")
    axes.plot(test.rates, test.smoothed(), color=BLUE, linewidth=2, label="smoothed")
    if used is None and found is not None:
        used = found.lr_max, found.lr_min
    if used is not None:
        axes.axvspan(used[1], used[0], color=BLUE, alpha=0.08)
        for rate, name, colour, style in ((used[0], "lr_max", VERMILLION, "-"), (used[1], "lr_min", GREEN, "--")):
            axes.axvline(rate, color=colour, linewidth=1.5, linestyle=style, label=f"{name} {rate:.3g}")
    if test.losses:
        low, high = min(test.smoothed()), test.losses[0]
        room = max(high - low, 1e-3)
        axes.set_ylim(low - 0.15 * room, high + 0.6 * room)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.legend(loc="upper left", fontsize=9)
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    save(figure, png_path)


def schedule_of(run: LoadedRun) -> OneCycle:
    """The schedule that the run used."""
    config, snapshot = run.config, run.snapshot
    return make_schedule(config.schedule, snapshot.rates, config.train.epochs, snapshot.steps_per_epoch)


def draw_all(run: LoadedRun, folder: Path, say: Say = print) -> list[Path]:
    """Draw curves.png, learning_rate.png and lr_finder.png, each if the run has the data for it. Returns their paths."""
    drawn = []
    # the curves show the whole run, whichever checkpoint was loaded
    caption = f"run {run.name} · {len(run.metrics)} of {run.config.train.epochs} epochs"
    if run.metrics:
        leading = recorded(run.metrics[-1])[0]
        caption += f" · last {leading.label} accuracy {run.metrics[-1][f'{leading.key}_accuracy']:.2f}%"
        said = loss_label(run.config.optim)
        draw_curves(run.metrics, folder / "curves.png", training_loss=said, caption=caption)
        drawn.append(folder / "curves.png")
    else:
        say("no epoch is finished: no curves.png")
    optim = run.config.optim
    draw_learning_rate(
        schedule_of(run),
        run.snapshot.steps_per_epoch,
        folder / "learning_rate.png",
        metrics=run.metrics,
        filters_peak=optim.muon_lr if optim.filters == "muon" else None,
        caption=caption,
    )
    drawn.append(folder / "learning_rate.png")
    if (run.path / "lr_finder.csv").exists():
        try:
            used = run.snapshot.rates.lr_max, run.snapshot.rates.lr_min
            draw_lr_finder(run.path / "lr_finder.csv", folder / "lr_finder.png", used=used, caption=caption)
            drawn.append(folder / "lr_finder.png")
        except (ValueError, KeyError, TypeError, NotARegularFile) as error:
            say(f"lr_finder.csv is damaged ({error}): no lr_finder.png")
    return drawn


def main(arguments: list[str] | None = None) -> int:
    options = parser("analysis.curves", "Draw curves.png, learning_rate.png and lr_finder.png.", data=False)

    def body(options: argparse.Namespace, log: Log) -> None:
        run = load_for(options, log)
        for path in draw_all(run, run.output_dir(options.output), log):
            log(str(path))

    return command(options, arguments, body)


if __name__ == "__main__":
    sys.exit(main())
