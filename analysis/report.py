"""Everything that a person wants to look at of a run: all pictures and tables, and report.html over them.

python -m analysis runs/NAME
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from analysis import confusion, curves, samples
from analysis.calibration import Reliability, draw_calibration, reliability
from analysis.command import command
from analysis.confusion import ClassScore, most_confused
from analysis.grad_cam import GradCamUnavailable, draw_grad_cam
from analysis.misclassified import draw_misclassified
from analysis.predictions import (
    Ints,
    Predictions,
    checked_predictions,
    prediction_options,
    worst_first,
    write_predictions,
)
from analysis.run import LoadedRun, Say, load_run
from analysis.style import Pixels, percent
from train.config import to_dict
from train.disk.atomic import write_atomic
from train.screen.log import Log
from train.screen.progress import duration
from train.step.measures import recorded

WORST = 50
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

# every picture's heading and how to read it, in the order of the report
PICTURES = {
    "curves.png": (
        "Loss and accuracy",
        "Training (dashed) is measured on augmented images while the weights still move, test on plain ones after each epoch. "
        "A test loss that rises while the training loss falls is overfitting; the star marks the best epoch.",
    ),
    "learning_rate.png": (
        "Learning rate",
        "The line is the schedule, computed; the dots are what the finished epochs recorded. They must lie on it.",
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
        "Where the network was most wrong. Look for images that are labelled badly, cut off or ambiguous, and for backgrounds "
        "that led it astray.",
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
    """What the report tells beside the pictures."""

    predictions: Predictions
    agreement: str
    scores: list[ClassScore]
    counts: Ints
    calibration: Reliability
    missing: dict[str, str]  # picture to why it is not there
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
    """Draw and write everything into `output` (the run's analysis/), and give the path of report.html.

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
        for stale in PICTURES:  # of an earlier analysis: what cannot be drawn now must not lie beside the new report
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
        return POLICY in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def draw_everything(run: LoadedRun, predictions: Predictions, agreement: str, folder: Path, say: Say) -> Results:
    """All pictures and tables of a run but report.html."""
    missing: dict[str, str] = {}
    images, caption = run.dataset.test.images, run.caption(predictions.accuracy)
    write_predictions(predictions, run.class_names, folder / "predictions.csv")
    drawn = {path.name for path in curves.draw_all(run, folder, say)}
    if not run.metrics:
        missing["curves.png"] = "no epoch is finished"
    samples.draw_for(run, folder / "samples.png")
    draw_misclassified(images, predictions, run.class_names, folder / "misclassified.png", caption=caption)
    counts, scores = confusion.draw_for(predictions.labels, predictions.predicted, run.class_names, folder, caption)
    found = reliability(predictions.confidence, predictions.hits)
    draw_calibration(found, folder / "calibration.png", caption=caption)
    drawn |= {"samples.png", "misclassified.png", "confusion_matrix.png", "per_class.png", "calibration.png"}
    for name, method in (("grad_cam.png", "gradcam"), ("layer_cam.png", "layercam")):
        try:
            draw_grad_cam(
                run.net,
                images,
                predictions,
                run.class_names,
                folder / name,
                mean=run.snapshot.data.mean,
                std=run.snapshot.data.std,
                method=method,
                caption=caption,
            )
            drawn.add(name)
        except GradCamUnavailable as error:
            missing[name] = str(error)
            say(f"WARNING: no {name}: {error}")
    return Results(predictions, agreement, scores, counts, found, missing, frozenset(drawn))


def _e(value: object) -> str:
    """Text for HTML, quotes included."""
    return html.escape(str(value), quote=True)


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def _tiny_png(image: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return _data_uri(buffer.getvalue())


def _table(header: Sequence[str], rows: Sequence[Sequence[object]], css: str = "") -> str:
    head = "".join(f"<th>{_e(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def headline(run: LoadedRun, results: Results) -> list[tuple[str, str, str]]:
    """(figure, what it is, a note) of the tiles on top."""
    predictions = results.predictions
    tiles = [
        (
            f"{predictions.accuracy:.2f}%",
            "test accuracy",
            f"{int(predictions.hits.sum()):,} of {len(predictions):,} images, {run.file}, epoch {run.epoch}",
        )
    ]
    metrics = run.metrics
    if metrics:
        best = max(metrics, key=lambda m: float(m["test_accuracy"]))
        planned = run.config.train.epochs
        tiles.append(
            (
                f"{best['test_accuracy']:.2f}%",
                "best epoch",
                f"epoch {best['epoch']}; last {metrics[-1]['test_accuracy']:.2f}%",
            )
        )
        cut = "" if len(metrics) >= planned else " (interrupted, or still running)"
        tiles.append(
            (f"{len(metrics)} of {planned}", "epochs finished", f"batches of {run.config.train.batch_size:,}{cut}")
        )
        seconds = sum(float(m["seconds"]) for m in metrics)
        rate = sum(float(m["seconds"]) * float(m["images_per_second"]) for m in metrics) / seconds
        device = run.environment.get("device_name") or run.environment.get("device", "unknown device")
        tiles.append((duration(seconds), "training time", f"{rate:,.0f} images/s on {device}, evaluation apart"))
        for measure in recorded(list(metrics[-1]))[1:]:
            accuracy = metrics[-1][f"{measure.key}_accuracy"]
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


STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --soft: #5a5a5a; --page: #fafafa; --card: #ffffff; --line: #dcdcdc;
  --wrong: #b34700; --right: #00609a; }
@media (prefers-color-scheme: dark) {
  :root { --text: #ececec; --soft: #a8a8a8; --page: #16181b; --card: #212429; --line: #3a3f46;
    --wrong: #ff9a52; --right: #6cc0f5; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .3rem; }
p { margin: .3rem 0 .8rem; } .soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 10.5rem), 1fr)); gap: .7rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .8rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.25; } .tile span { display: block; }
.tile small { color: var(--soft); display: block; line-height: 1.3; margin-top: .2rem; }
figure { margin: 0 0 1rem; } figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff;
  border: 1px solid var(--line); border-radius: .6rem; padding: .4rem; }
.worst { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.6rem, 1fr)); gap: .6rem; }
.worst div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .4rem; font-size: .78rem;
  line-height: 1.3; text-align: center; }
.worst img { width: 96px; height: 96px; max-width: 100%; image-rendering: pixelated; display: block; margin: 0 auto .3rem; }
.wrong { color: var(--wrong); font-weight: 600; } .right { color: var(--right); }
.scroll, figure { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; background: var(--card); }
th, td { border: 1px solid var(--line); padding: .2rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
table.pairs th, table.pairs td { text-align: left; vertical-align: top; }
/* on a phone a picture keeps a readable size and is pushed sideways */
@media (max-width: 42rem) { figure img { max-width: none; width: 44rem; } }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
ul.notes { padding-left: 1.2rem; } code { font-size: .92em; }
"""


def render(run: LoadedRun, results: Results, folder: Path) -> str:
    """report.html: one file that needs nothing else, every text in it escaped."""
    predictions, names = results.predictions, run.class_names
    title = f"Run {run.name}"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # nothing is fetched and nothing runs, whatever a name may hold
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{_e(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{_e(title)}</h1>",
        f'<p class="soft">{_e(run.config.data.name)}, {len(names)} classes, {len(run.dataset.train):,} training and '
        f"{len(predictions):,} test images of {run.dataset.test.height} x {run.dataset.test.width}; CustomResNet of width "
        f"{run.config.net.width}. {_e(results.agreement[:1].upper() + results.agreement[1:])}.</p>",
    ]
    if run.notes:
        parts.append('<ul class="notes">' + "".join(f"<li>{_e(note)}</li>" for note in run.notes) + "</ul>")
    parts.append('<div class="tiles">')
    for figure, what, note in headline(run, results):
        parts.append(f'<div class="tile"><b>{_e(figure)}</b><span>{_e(what)}</span><small>{_e(note)}</small></div>')
    parts.append("</div>")
    for name, (heading, reading) in PICTURES.items():
        path = folder / name
        if name in results.drawn and path.exists():
            parts.append(
                f'<h2>{_e(heading)}</h2><p class="soft">{_e(reading)}</p><figure><img src="{_data_uri(path.read_bytes())}" '
                f'alt="{_e(heading)}"></figure>'
            )
        elif name in results.missing:
            parts.append(f'<h2>{_e(heading)}</h2><p class="soft">Not drawn: {_e(results.missing[name])}</p>')
        if name == "misclassified.png":
            parts.append(_worst(run, predictions))
        if name == "confusion_matrix.png" and (pairs := most_confused(results.counts)):
            confused = [(names[true], names[said], f"{images:,}") for true, said, images in pairs]
            parts.append(_table(["is", "taken for", "images"], confused))
        if name == "per_class.png":
            scores = [
                (s.name, f"{100 * s.precision:.2f}", f"{100 * s.recall:.2f}", f"{100 * s.f1:.2f}", f"{s.support:,}")
                for s in results.scores
            ]
            table = _table(["class", "precision %", "recall %", "F1 %", "images"], scores)
            parts.append(f"<details><summary>All classes as a table</summary>{table}</details>")
    parts.append(
        '<h2>Recipe</h2><p class="soft">Everything resolved, as in config.yaml: the run can be repeated from it.</p>'
    )
    for section, keys in to_dict(run.config).items():
        rows = [(key, "null" if value is None else value) for key, value in keys.items()]
        parts.append(f"<details><summary>{_e(section)}</summary>{_table(['key', 'value'], rows, 'pairs')}</details>")
    parts.append('<h2>Environment</h2><p class="soft">What the figures depend on beside the recipe.</p>')
    environment = _flatten(run.environment) or [("environment.json", "is not there")]
    seconds = _flatten(run.summary)
    parts.append(
        f"<details><summary>Machine and versions</summary>{_table(['key', 'value'], environment, 'pairs')}</details>"
    )
    if seconds:
        parts.append(
            f"<details><summary>Summary of the run</summary>{_table(['key', 'value'], seconds, 'pairs')}</details>"
        )
    parts.append(f'<p class="soft">{_e(run.path.resolve())}</p></body></html>\n')
    return "\n".join(parts)


def _worst(run: LoadedRun, predictions: Predictions) -> str:
    """The images of the highest losses, whether the answer was wrong or barely right."""
    chosen = worst_first(predictions, wrong_only=False)[:WORST]
    images, names = run.dataset.test.images, run.class_names
    cells = []
    for index in chosen:
        said, true = int(predictions.predicted[index]), int(predictions.labels[index])
        css = "right" if said == true else "wrong"
        cells.append(
            f'<div><img src="{_tiny_png(images[index])}" alt="test image {index}" width="32" height="32">'
            f'<span class="{css}">{_e(names[said])} {_e(percent(float(predictions.confidence[index])))}</span><br>'
            f'<span class="right">is {_e(names[true])}</span><br><span class="soft">no. {index}, loss '
            f"{predictions.losses[index]:.2f}</span></div>"
        )
    return (
        f'<h2>The worst {len(chosen)} test images</h2><p class="soft">Highest loss first: the answer with its confidence, the '
        f'truth, the place in the test set (counted from 0) and the loss.</p><div class="worst">{"".join(cells)}</div>'
    )


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
