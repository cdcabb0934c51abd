"""The network's answers for your own image files: the likeliest classes of each, with --explain what speaks for them.

python -m analysis.predict runs/NAME cat.jpg holiday/ "more/**/*.png" --explain
python -m analysis.predict runs/NAME holiday/ --csv answers.csv
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from analysis.command import command, load_for, parser
from analysis.grad_cam import default_layer, heat_maps, method_class, normalise, overlay
from analysis.predictions import Floats, eval_step, logits_of
from analysis.run import AnalysisError, LoadedRun
from analysis.style import BLUE, GREY, Pixels, Tile, draw_sheet, percent, plain, pretty
from dali_pipeline.dataset import some
from dali_pipeline.errors import UserError, at_home
from dali_pipeline.image_files import Decoded, ImageFiles
from dali_pipeline.progress import Meter
from dali_pipeline.sources.folder import SUFFIXES, images_below, not_followed, passed_over
from dali_pipeline.words import path_as_text, printable_path, to_stderr
from train.disk.atomic import write_csv
from train.screen.log import Log

EXPLAINED = 60  # files in predict.png at most
MANY = 500  # files from which on progress is shown

Top = list[tuple[int, float]]  # (class, probability), likeliest first


@dataclass(frozen=True, eq=False)
class Answer:
    """probabilities: (C,) of one file; image: (H, W, 3) uint8 as the network saw it."""

    path: Path
    image: Pixels
    probabilities: Floats

    def top(self, count: int = 5) -> Top:
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(int(label), float(self.probabilities[label])) for label in order]


def find_images(words: Sequence[str], say: Callable[[str], None]) -> tuple[list[str], list[str]]:
    """The files that the words of a command name, each once and in their order, and what is wrong with words that name none. A
    folder stands for the images in it and below, a pattern (with * ? [ or **) that is no file's name for what it matches."""
    found: dict[str, None] = {}
    problems: list[str] = []
    others: Counter[str] = Counter()
    loops: list[str] = []
    for given in words:
        word, matches = given, [given]
        if not word:
            problems.append("an empty name: no such file")
            continue
        if word.startswith("~") and not os.path.lexists(word):  # a shell leaves it in a quoted pattern
            try:
                word = str(at_home(word, "IMAGE"))
            except UserError as error:
                problems.append(str(error))
                continue
            matches = [word]
        if glob.has_magic(word) and not os.path.lexists(word):
            matches = sorted(glob.glob(word, recursive=True), key=os.fsencode)  # noqa: PTH207 - absolute patterns too
            if not matches:
                problems.append(f"{printable_path(word)}: matches no file")
        for match in map(Path, matches):
            if not match.is_dir():
                found[str(match)] = None
                continue
            try:
                inside = sorted((path for path, _ in images_below(match, ".", others, loops)), key=os.fsencode)
            except OSError as error:
                problems.append(f"{printable_path(error.filename or match)}: {error.strerror or error}")
                continue
            if not inside and match == Path(word):
                problems.append(f"{printable_path(match)}: holds no image; read are {', '.join(SUFFIXES)}")
            found.update((str(match / path), None) for path in inside)
    for line in (*not_followed(loops), *passed_over(others)):
        say(f"note: {line}")
    return list(found), problems


def answers_for(run: LoadedRun, paths: Sequence[str], reader: ImageFiles) -> Iterator[Answer | str]:
    """Yields for each file, in order, the network's answer, or why the file cannot be read. The next files are decoded while
    the network has those before."""
    step, done = eval_step(run), 0
    for batch in _ahead(reader.read(paths)):
        logits = logits_of(step, batch.pixels, run.runtime.device, run.config.train.eval_batch_size)
        found = torch.softmax(logits.double(), 1).numpy()
        for place, (image, probabilities) in enumerate(zip(batch.pixels, found, strict=True)):
            yield batch.problems.get(place) or Answer(Path(paths[done + place]), image, probabilities)
        done += len(batch.pixels)


def _ahead(batches: Iterator[Decoded]) -> Iterator[Decoded]:
    """Yields the batches; another thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def draw_explanation(
    net: nn.Module,
    answers: Sequence[Answer],
    class_names: tuple[str, ...],
    path: Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    layer: str | None = None,
    method: str = "gradcam",
    caption: str = "",
) -> None:
    """Draw one row for each file: the image as the network saw it, and what speaks for its likeliest and its second class."""
    layer = layer or default_layer(method)
    inputs = normalise(np.stack([answer.image for answer in answers]), mean, std)
    ranked = [answer.top(2) for answer in answers]
    maps = [
        heat_maps(net, inputs, [top[place][0] for top in ranked], layer=layer, method=method)
        for place in range(min(2, len(class_names)))
    ]
    tiles: list[Tile | None] = []
    for row, answer in enumerate(answers):
        tiles.append(Tile(answer.image, ((plain(answer.path.name, 24), GREY),)))
        for place, colour in zip(range(len(maps)), (BLUE, GREY), strict=False):
            label, sure = ranked[row][place]
            word = "" if place == 0 else "or "
            text = f"{word}{pretty(class_names[label])} {percent(sure)}"
            tiles.append(Tile(overlay(answer.image, maps[place][row]), ((text, colour),)))
    draw_sheet(
        tiles,
        path,
        columns=(1 + len(maps)) * (1 if len(answers) == 1 else 2),
        group=1 + len(maps),
        title="What the network sees in your images",
        notes=[
            f"each: the image as the network sees it; what speaks for its first and second answer ({method} at {layer})"
        ],
        caption=caption,
    )


def main(arguments: list[str] | None = None) -> int:
    options = parser(
        "analysis.predict",
        "Classify your own image files: the likeliest classes of each. A file that cannot be read is named, the others are "
        "answered all the same; the exit code is then 2.",
        data=False,
    )
    options.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files, folders with images in them and below, or quoted patterns such as 'photos/**/*.jpg'",
    )
    options.add_argument("--top", type=int, default=5, help="how many classes (default: 5)")
    options.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="write a table instead of lines: path, label, probability, label_2, ..., error",
    )
    options.add_argument(
        "--explain",
        action="store_true",
        help=f"draw predict.png: where the network looked, in the first {EXPLAINED} files",
    )
    options.add_argument("--method", default="gradcam", help="of --explain (default: gradcam)")
    options.add_argument("--layer", help="of --explain (default: the method's own)")
    options.add_argument(
        "--fit",
        choices=("crop", "squash"),
        help="how a file takes the network's proportions (default: as the run's own images did, else crop)",
    )
    return command(options, arguments, _predict)


def _predict(options: argparse.Namespace, log: Log) -> int:
    if options.top < 1:
        raise AnalysisError(f"--top {options.top}: must be at least 1")
    if options.explain:
        method_class(options.method)
    if options.csv:
        _check_table(options.csv)
    paths, problems = find_images(options.images, log)
    for problem in problems:
        to_stderr(f"error: {problem}")
    if not paths:
        return 2
    run = load_for(options, log)
    reader = ImageFiles(run.snapshot.data.height, run.snapshot.data.width, options.fit or run.resize)
    table = Table(run.class_names, min(options.top, len(run.class_names)))
    explained: list[Answer] = []
    failures = 0
    meter = Meter("predicting", len(paths), to_stderr if len(paths) >= MANY else None, unit="files")
    try:
        for number, (path, answer) in enumerate(zip(paths, answers_for(run, paths, reader), strict=True), 1):
            if isinstance(answer, str):
                failures += 1
                to_stderr(f"error: {answer}")
                table.add(path, [], answer)
            else:
                top = answer.top(table.columns)
                table.add(path, top)
                if not options.csv:
                    named = [f"{run.class_names[label]} {100 * sure:.1f}%" for label, sure in top]
                    log(f"{printable_path(path)}: {', '.join(named)}")
                if options.explain and len(explained) < EXPLAINED:
                    explained.append(answer)
            meter.show(number)
    finally:
        meter.close()
    if reader.fallback:
        log(f"note: {reader.fallback}")
    if len(paths) - failures > 1:
        log(f"{len(paths) - failures:,} files: {table.totals()}")
    if options.csv:
        write_csv(options.csv, table.rows)
        log(str(options.csv))
    if explained:
        picture = run.output_dir(options.output) / "predict.png"
        mean, std = run.snapshot.data.mean, run.snapshot.data.std
        draw_explanation(
            run.net,
            explained,
            run.class_names,
            picture,
            mean=mean,
            std=std,
            layer=options.layer,
            method=options.method,
            caption=run.caption(),
        )
        log(str(picture))
    if failures:
        log(f"{failures:,} of {len(paths):,} files could not be read")
    return 2 if failures or problems else 0


def _check_table(path: Path) -> None:
    """Raises AnalysisError, before any work, where the table cannot be written or would replace an image."""
    if path.is_dir():
        raise AnalysisError(f"--csv {path}: is a folder; name a file in it")
    if path.name.lower().endswith(SUFFIXES):
        raise AnalysisError(f"--csv {path}: bears the name of an image, which a table would replace; name a .csv file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise AnalysisError(f"--csv {path}: cannot be written, its folder does not allow it; name another")


class Table:
    """The answers as rows: path, label and probability of the likeliest class, then of the next ones, and why a file could not be
    read. Bytes of a path that are no UTF-8 become \\xNN."""

    def __init__(self, class_names: Sequence[str], columns: int) -> None:
        self.columns = columns
        self._names = class_names
        self._first: Counter[str] = Counter()
        places = ["", *(f"_{place}" for place in range(2, columns + 1))]
        header = [f"{what}{place}" for place in places for what in ("label", "probability")]
        self.rows: list[list[object]] = [["path", *header, "error"]]

    def add(self, path: str, top: Top, error: str = "") -> None:
        cells: list[object] = [cell for label, sure in top for cell in (self._names[label], f"{sure:.6f}")]
        self._first.update(self._names[label] for label, _ in top[:1])
        self.rows.append([path_as_text(path), *(cells or [""] * 2 * self.columns), error])

    def totals(self) -> str:
        """How often each class is the likeliest one, most frequent first."""
        return some([f"{count:,} {name}" for name, count in self._first.most_common()])


if __name__ == "__main__":
    sys.exit(main())
