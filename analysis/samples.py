"""samples.png: training images as the pipeline augments them, the first ones of an epoch.

python -m analysis.samples runs/NAME --count 40 --epoch 3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from analysis.command import command, load_for, parser
from analysis.predictions import Ints
from analysis.run import AnalysisError, LoadedRun, loader_of
from analysis.style import BLUE, Pixels, Tile, draw_sheet, pretty
from dali_pipeline.backend import BackendChoice
from dali_pipeline.loader import TrainLoader
from dali_pipeline.plan import Augment
from train.config import changed
from train.screen.log import Log
from train.step.trainer import make_train_loader


def augmented_images(run: LoadedRun, count: int, epoch: int = 0) -> tuple[Pixels, Ints]:
    """The first `count` images (N, H, W, 3) uint8 and labels (N,) of an epoch (from 0), as the run's training saw them."""
    cpu = torch.device("cpu")

    config = changed(run.config, {"data.resident": "never"})  # only the first batches are wanted

    def make(backend: BackendChoice | str) -> TrainLoader:
        return make_train_loader(config, run.dataset, cpu, backend)

    loader = loader_of(run, make) if run.runtime.device.type == "cpu" else make("torch")
    images, labels = [], []
    try:
        for batch, of_batch in loader.epoch(epoch):
            images.append(batch.permute(0, 2, 3, 1).numpy().copy())
            labels.append(of_batch.numpy().copy())
            if sum(len(part) for part in labels) >= count:
                break
    finally:
        loader.close()
    return np.concatenate(images)[:count], np.concatenate(labels)[:count]


def describe(augment: Augment) -> str:
    """The augmentation in words, such as: crop from 4 pixels of black padding, flip, cutout 8 x 8."""
    parts = []
    if augment.crop and augment.pad:
        parts.append(
            f"crop from {augment.pad} pixels of {'black' if augment.padding_mode == 'zero' else 'reflected'} padding"
        )
    if augment.resized:
        parts.append(f"crops of {augment.scale:.0%} of the area or more, resized")
    if augment.flip:
        parts.append("flip" if augment.flip_rule == "random" else f"{augment.flip_rule} flip")
    if augment.cutout:
        parts.append(f"cutout {augment.cutout} x {augment.cutout}")
    return ", ".join(parts) or "no augmentation"


def draw_samples(
    images: Pixels,
    labels: Ints,
    class_names: tuple[str, ...],
    path: Path,
    *,
    columns: int = 8,
    augmentation: str = "",
    caption: str = "",
) -> None:
    """A grid of images (N, H, W, 3) uint8 with their class names."""
    tiles = [Tile(image, ((pretty(class_names[label]), BLUE),)) for image, label in zip(images, labels, strict=True)]
    draw_sheet(
        tiles,
        path,
        columns=min(columns, max(len(tiles), 1)),
        title="Training images as the network sees them",
        notes=(augmentation,) if augmentation else (),
        caption=caption,
    )


def draw_for(run: LoadedRun, path: Path, *, count: int = 40, epoch: int = 0) -> None:
    """Draw samples.png of a run; `epoch` counts from 0."""
    images, labels = augmented_images(run, count, epoch)
    draw_samples(
        images,
        labels,
        run.class_names,
        path,
        augmentation=f"{describe(run.config.augment)}; drawn from seed {run.config.train.seed} as in epoch {epoch + 1}",
        caption=f"run {run.name} · {run.dataset.name}, {len(run.dataset.train):,} training images",
    )


def main(arguments: list[str] | None = None) -> int:
    options = parser("analysis.samples", "Draw samples.png: training images as the pipeline augments them.")
    options.add_argument("--count", type=int, default=40, help="how many images (default: 40)")
    options.add_argument("--epoch", type=int, default=1, help="as in which epoch of the training (default: the first)")

    def body(options: argparse.Namespace, log: Log) -> None:
        if options.epoch < 1 or options.count < 1:
            raise AnalysisError("--epoch and --count must be at least 1")
        run = load_for(options, log)
        path = run.output_dir(options.output) / "samples.png"
        draw_for(run, path, count=options.count, epoch=options.epoch - 1)
        log(str(path))

    return command(options, arguments, body)


if __name__ == "__main__":
    sys.exit(main())
