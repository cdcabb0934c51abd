"""The network's answers for your own image files: the five likeliest classes, and with --explain what speaks for them.

python -m analysis.predict runs/NAME cat.jpg holiday/*.png --explain
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from analysis.command import command, load_for, parser
from analysis.grad_cam import default_layer, heat_maps, method_class, normalise, overlay
from analysis.predictions import Floats
from analysis.run import AnalysisError
from analysis.style import BLUE, GREY, Pixels, Tile, draw_sheet, percent, plain, pretty
from dali_pipeline.image_files import ImageFiles
from dali_pipeline.words import to_stderr
from train.screen.log import Log


@dataclass(frozen=True, eq=False)
class Answer:
    """probabilities: (C,) of one file; image: (H, W, 3) uint8 as the network saw it."""

    path: Path
    image: Pixels
    probabilities: Floats

    def top(self, count: int = 5) -> list[tuple[int, float]]:
        """(class, probability), likeliest first."""
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(int(label), float(self.probabilities[label])) for label in order]


def predict_images(net: nn.Module, images: Pixels, mean: Sequence[float], std: Sequence[float]) -> Floats:
    """(N, C) probabilities for images (N, H, W, 3) uint8. The network is in eval mode meanwhile, and afterwards as before."""
    was_training = net.training
    net.eval()
    device = next(net.parameters()).device
    try:
        with torch.no_grad():
            logits = torch.cat([net(part.to(device)).float().cpu() for part in normalise(images, mean, std).split(512)])
    finally:
        net.train(was_training)
    return torch.softmax(logits.double(), 1).numpy()


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
        "analysis.predict", "Classify your own image files: the five likeliest classes of each.", data=False
    )
    options.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="files that Pillow reads: PNG, JPEG, WebP ..."
    )
    options.add_argument("--top", type=int, default=5, help="how many classes (default: 5)")
    options.add_argument("--explain", action="store_true", help="draw predict.png: where the network looked")
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
    run = load_for(options, log)
    height, width = run.snapshot.data.height, run.snapshot.data.width
    images: list[Pixels] = []
    paths: list[Path] = []
    done = failures = 0
    for batch in ImageFiles(height, width, options.fit or run.resize).read([str(path) for path in options.images]):
        for place, image in enumerate(batch.pixels):
            if place in batch.problems:
                failures += 1
                to_stderr(f"error: {batch.problems[place]}")
            else:
                images.append(image)
                paths.append(options.images[done + place])
        done += len(batch.pixels)
    if images:
        mean, std = run.snapshot.data.mean, run.snapshot.data.std
        found = predict_images(run.net, np.stack(images), mean, std)
        answers = [Answer(*parts) for parts in zip(paths, images, found, strict=True)]
        for answer in answers:
            top = ", ".join(f"{run.class_names[label]} {100 * sure:.1f}%" for label, sure in answer.top(options.top))
            log(f"{answer.path}: {top}")
        if options.explain:
            path = run.output_dir(options.output) / "predict.png"
            draw_explanation(
                run.net,
                answers,
                run.class_names,
                path,
                mean=mean,
                std=std,
                layer=options.layer,
                method=options.method,
                caption=run.caption(),
            )
            log(str(path))
    if failures:
        log(f"{failures} of {len(options.images)} files could not be read")
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
