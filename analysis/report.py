"""The analysis of a run: all pictures and tables, and report.html, which shows them. A picture is a figure for a person, a PNG.

python -m analysis runs/NAME
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from analysis import confusion, curves, grad_cam, samples
from analysis.calibration import Reliability, draw_calibration, reliability
from analysis.command import command
from analysis.confusion import ClassScore, most_confused
from analysis.grad_cam import GradCamUnavailable
from analysis.misclassified import draw_misclassified
from analysis.predictions import (
    Predictions,
    checked_predictions,
    prediction_options,
    worst_first,
    write_predictions,
)
from analysis.run import LoadedRun, Say, load_run
from analysis.style import Pixels, percent
from dali_pipeline.regular import read_regular
from train.config import to_dict
from train.disk.atomic import write_atomic
from train.disk.folder import MOST_BYTES
from train.screen.log import Log
from train.screen.progress import duration
from train.step.measures import Measure, recorded

MAX_WORST = 50  # images in the report's gallery of the highest losses
CONTENT_SECURITY_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

# for each picture its heading and how to read it, in the order of the report
PICTURES = {
    "curves.png": (
        "Loss and accuracy",
        "Training (dashed) is measured on augmented images while the weights still move, the others on plain ones after each "
        "epoch, and with the views of test-time augmentation, if there are any, after the last. A loss that rises while the "
        "training loss falls is overfitting; the star marks the epoch of best.pt.",
    ),
    "learning_rate.png": (
        "Learning rate",
        "The line is the computed schedule, the dots are rates that the run used at the end of each epoch. They must lie on it.",
    ),
    "lr_finder.png": (
        "Learning rate range test",
        "The loss while the rate grows from step to step. The run warmed up and down through the shaded range, from lr_min to "
        "lr_max. Where the recipe asked to find them, they lie where the loss begins to fall, and at twice the rate at which it "
        "rises again.",
    ),
    "samples.png": (
        "Training images",
        "The first images of the training as the pipeline handed them over: this is what the network learns from. Whatever "
        "you cannot recognise here, it cannot learn.",
    ),
    "misclassified.png": (
        "Misclassified test images",
        "The mistakes with the highest loss. Look for images that are labelled wrongly, cut off or ambiguous, and for "
        "backgrounds that are typical of another class.",
    ),
    "grad_cam.png": (
        "Where the network looks: Grad-CAM",
        "Yellow is what raised the score of the class below the map. A right answer should rest on the object; a wrong one "
        "often rests on the background or on one part. Coarse: 4 x 4 places on a 32 x 32 image.",
    ),
    "layer_cam.png": (
        "Where the network looks, closer: LayerCAM",
        "The same images by a method that stays sharp in the layer before (8 x 8 places). Where both agree, trust them more.",
    ),
    "confusion_matrix.png": (
        "Confusion matrix",
        "A row is what the images are, a column what they were taken for. Only mistakes are coloured; a dark pair on both sides "
        "of the diagonal are two classes that the network cannot tell apart.",
    ),
    "per_class.png": (
        "Class by class",
        "Precision far below recall: the class is named too often. Recall far below precision: it is overlooked.",
    ),
    "calibration.png": (
        "Calibration",
        "Bars below the dashed line are answers given with more confidence than they deserve. The expected calibration error "
        "is the mean gap, weighted by the number of answers.",
    ),
}


@dataclass(frozen=True, eq=False)
class Results:
    """What the report contains besides the pictures."""

    predictions: Predictions
    agreement: str
    scores: list[ClassScore]
    calibration: Reliability
    missing: dict[str, str]  # by picture, why it could not be drawn
    drawn: frozenset[str] = frozenset(PICTURES)


def analyse(
    run_dir: Path,
    *,
    data_root: Path | None = None,
    checkpoint: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    download: bool = False,
    output: Path | None = None,
    accept_difference: bool = False,
    log: Say = print,
) -> Path:
    """Draw and write everything into `output` (by default the run's analysis/) and return the path of report.html.

    Arguments as in `analysis.run.load_run`. Raises AnalysisError, CheckpointError, ConfigError, DataError,
    RunFolderError or WriteError, one line each.
    """
    begun = time.perf_counter()
    run = load_run(
        run_dir,
        checkpoint=checkpoint,
        device=device,
        precision=precision,
        data_root=data_root,
        download=download,
        say=log,
    )
    folder = run.output_dir(output)
    if output is None or _is_report(folder / "report.html"):
        for (
            stale
        ) in PICTURES:  # an earlier analysis's picture must not stay beside the new report if it cannot be drawn now
            (folder / stale).unlink(missing_ok=True)
    predictions, agreement = checked_predictions(run, log, accept_difference)
    results = draw_everything(run, predictions, agreement, folder, log)
    path = folder / "report.html"
    write_atomic(path, render(run, results, folder).encode())
    log(f"{len(results.drawn)} pictures and report.html in {folder}, {duration(time.perf_counter() - begun)}")
    return path


def _is_report(path: Path) -> bool:
    """Whether a file is a report that `render` made."""
    try:
        return CONTENT_SECURITY_POLICY in read_regular(path, MOST_BYTES).decode("utf-8")
    except (OSError, ValueError):
        return False


def draw_everything(run: LoadedRun, predictions: Predictions, agreement: str, folder: Path, say: Say) -> Results:
    """Draw and write all pictures and tables of a run, without report.html."""
    missing: dict[str, str] = {}
    images, caption = run.dataset.test.images_on_demand, run.caption(predictions.accuracy)
    write_predictions(predictions, run.class_names, folder / "predictions.csv")
    drawn = {path.name for path in curves.draw_all(run, folder, say)}
    if not run.metrics:
        missing["curves.png"] = "no epoch is finished"
    samples.draw_for(run, folder / "samples.png")
    draw_misclassified(images, predictions, run.class_names, folder / "misclassified.png", caption=caption)
    scores = confusion.draw_for(predictions.labels, predictions.predicted, run.class_names, folder, caption)
    found = reliability(predictions.confidence, predictions.hits)
    draw_calibration(found, folder / "calibration.png", caption=caption)
    drawn |= {"samples.png", "misclassified.png", "confusion_matrix.png", "per_class.png", "calibration.png"}
    for name, method in (("grad_cam.png", "gradcam"), ("layer_cam.png", "layercam")):
        try:
            grad_cam.draw_for(run, predictions, folder / name, method=method)
            drawn.add(name)
        except GradCamUnavailable as error:
            missing[name] = str(error)
            say(f"WARNING: no {name}: {error}")
    return Results(predictions, agreement, scores, found, missing, frozenset(drawn))


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def _tiny_png(image: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return _data_uri(buffer.getvalue())


def _accuracies(run: LoadedRun, predictions: Predictions) -> list[tuple[str, str, str]]:
    """The tiles with the run's accuracies. Where best.pt was chosen by its test accuracy, that of the last epoch comes first, as
    no choice depends on it."""
    answers = f"{int(predictions.hits.sum()):,} of {len(predictions):,} images, {run.file}, epoch {run.epoch}"
    ours = (f"{predictions.accuracy:.2f}%", "test accuracy", answers)
    if not run.metrics or run.file != "best.pt":
        return [ours]
    last, leading = run.metrics[-1], recorded(run.metrics[-1])[0]
    reached = max(float(m[f"{leading.key}_accuracy"]) for m in run.metrics)
    if leading.split == "test":
        at_end = (f"{last['test_accuracy']:.2f}%", "test accuracy", f"after the last epoch, {last['epoch']}")
        return [at_end, (ours[0], "of best.pt", f"{answers}, chosen on the test set itself, which flatters")]
    tiles = [(*ours[:2], f"{answers}, chosen on the validation split ({reached:.2f}%)")]
    if at_last := run.summary.get("test", {}).get("last.pt"):
        tiles.append((f"{at_last['accuracy']:.2f}%", "of last.pt", f"test accuracy, epoch {at_last['epoch']}"))
    return tiles


def _further_accuracies(run: LoadedRun) -> list[tuple[Measure, float]]:
    """After the last epoch, by averaged weights and over several views: of the test set where the run measured it at the end,
    else of the split that it measured after each epoch."""
    at_end = {key.removeprefix("last_"): value for key, value in run.summary.items() if key.startswith("last_")}
    measured = run.metrics[-1] | (at_end if run.summary.get("chosen_on") == "validation" else {})
    measures = recorded(measured)
    split = "test" if any(measure.split == "test" for measure in measures) else measures[0].split
    further = [measure for measure in measures if measure.split == split and measure.kind]
    return [(measure, float(measured[f"{measure.key}_accuracy"])) for measure in further]


def headline(run: LoadedRun, results: Results) -> list[tuple[str, str, str]]:
    """The tiles at the top of the report: (number, what it is, a note)."""
    predictions, metrics = results.predictions, run.metrics
    tiles = _accuracies(run, predictions)
    if metrics:
        planned = run.config.train.epochs
        cut = "" if len(metrics) >= planned else " (interrupted, or still running)"
        tiles.append(
            (f"{len(metrics)} of {planned}", "epochs finished", f"batches of {run.config.train.batch_size:,}{cut}")
        )
        seconds = sum(float(m["seconds"]) for m in metrics)
        rate = sum(float(m["seconds"]) * float(m["images_per_second"]) for m in metrics) / seconds
        device = run.environment.get("device_name") or run.environment.get("device", "unknown device")
        tiles.append((duration(seconds), "training time", f"{rate:,.0f} images/s on {device}, evaluation apart"))
        for measure, accuracy in _further_accuracies(run):
            tiles.append((f"{accuracy:.2f}%", measure.kind, f"{measure.split} accuracy at the end"))
    tiles.append((f"{predictions.losses.mean():.4f}", "test loss", "mean cross-entropy, nats"))
    over = 100 * results.calibration.overconfidence
    tiles.append(
        (
            f"{100 * results.calibration.ece:.2f} points",
            "calibration error",
            f"on average {abs(over):.2f} points {'over' if over > 0 else 'under'}confident",
        )
    )
    count = sum(parameter.numel() for parameter in run.net.parameters())
    tiles.append(
        (f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count:,}", "parameters", f"width {run.config.net.width}")
    )
    return tiles


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", "; ".join(map(str, value)) if isinstance(value, list) else value))
    return rows


@dataclass(frozen=True)
class _Picture:
    """A picture's place in the report. `image` is a data URI; without one `missing` says why, and without either the place is
    left out."""

    name: str
    heading: str
    reading: str
    image: str | None
    missing: str | None


@dataclass(frozen=True)
class _Answer:
    """A test image and the network's answer, as the report shows them."""

    image: str  # data URI
    index: int
    right: bool
    said: str
    confidence: str
    true: str
    loss: str


def render(run: LoadedRun, results: Results, folder: Path) -> str:
    """The content of report.html, which refers to no other file. The template escapes every text that is put into it."""
    predictions, names = results.predictions, run.class_names
    recipe = {
        section: [(key, "null" if value is None else value) for key, value in keys.items()]
        for section, keys in to_dict(run.config).items()
    }
    return _template().render(
        policy=CONTENT_SECURITY_POLICY,
        title=f"Run {run.name}",
        description=(
            f"{run.config.data.name}, {len(names)} classes, {len(run.dataset.train):,} training and {len(predictions):,} "
            f"test images of {run.dataset.test.height} x {run.dataset.test.width}; CustomResNet of width "
            f"{run.config.net.width}. {results.agreement[:1].upper() + results.agreement[1:]}."
        ),
        notes=run.notes,
        tiles=headline(run, results),
        pictures=[_picture(name, results, folder) for name in PICTURES],
        worst=_worst(run, predictions),
        confused=[
            (names[true], names[said], f"{images:,}")
            for true, said, images in most_confused(predictions.labels, predictions.predicted, len(names))
        ],
        classes=[
            (s.name, f"{100 * s.precision:.2f}", f"{100 * s.recall:.2f}", f"{100 * s.f1:.2f}", f"{s.support:,}")
            for s in results.scores
        ],
        recipe=recipe,
        environment=_flatten(run.environment) or [("environment.json", "is not there")],
        summary=_flatten(run.summary),
        path=run.path.resolve(),
    )


def _template() -> Template:
    """analysis/templates/report.html.jinja, with its style file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.jinja")


def _picture(name: str, results: Results, folder: Path) -> _Picture:
    path = folder / name
    there = name in results.drawn and path.exists()
    return _Picture(name, *PICTURES[name], _data_uri(path.read_bytes()) if there else None, results.missing.get(name))


def _worst(run: LoadedRun, predictions: Predictions) -> list[_Answer]:
    """The test images with the highest losses: mistakes, and right answers of low confidence."""
    images, names = run.dataset.test.images_on_demand, run.class_names
    answers = []
    for index in worst_first(predictions, wrong_only=False)[:MAX_WORST]:
        said, true = int(predictions.predicted[index]), int(predictions.labels[index])
        answers.append(
            _Answer(
                image=_tiny_png(images[index]),
                index=int(index),
                right=said == true,
                said=names[said],
                confidence=percent(float(predictions.confidence[index])),
                true=names[true],
                loss=f"{predictions.losses[index]:.2f}",
            )
        )
    return answers


def main(arguments: list[str] | None = None) -> int:
    options = prediction_options(
        "analysis",
        "Draw everything there is to see of a run into runs/NAME/analysis: pictures, tables and report.html.",
    )
    options.epilog = (
        "each part alone: python -m analysis.PART --help, with PART one of curves, samples, misclassified, grad_cam, confusion, "
        "calibration, predictions; and analysis.predict for images of your own, analysis.compare for several runs"
    )

    def body(options: argparse.Namespace, log: Log) -> None:
        report = analyse(
            options.run,
            data_root=options.data_root,
            checkpoint=options.checkpoint,
            device=options.device,
            precision=options.precision,
            download=options.download,
            output=options.output,
            accept_difference=options.accept_difference,
            log=log,
        )
        log(f"open {report}")

    return command(options, arguments, body)


if __name__ == "__main__":
    sys.exit(main())
