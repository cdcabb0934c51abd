"""A look at a data set before training: counts, sizes, balance, mean and deviation, what is there twice, what is broken.

python -m analysis.data NAME_OR_DIR [section.key=value ...]

Writes classes.csv, duplicates.csv, samples.png (training images with and without augmentation) and, of files, broken.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from analysis.command import command
from analysis.predictions import Ints
from analysis.run import AnalysisError, nearest
from analysis.samples import describe
from analysis.style import BLUE, GREY, Pixels, Tile, draw_sheet, pretty
from dali_pipeline import sources
from dali_pipeline.dataset import Dataset, Split
from dali_pipeline.decoded import DecodedImages
from dali_pipeline.errors import at_home
from dali_pipeline.hold_out import digests
from dali_pipeline.image_files import cpu_threads
from dali_pipeline.images import quiet
from dali_pipeline.plan import draw_plan
from dali_pipeline.progress import Meter
from dali_pipeline.sources.folder import Folder, Found
from dali_pipeline.sources.own_images import SPLITS
from dali_pipeline.words import path_as_text, printable_path, to_stderr
from train.config import Config, changed, load_config
from train.disk.atomic import write_csv
from train.screen.log import Log
from train.screen.streams import Parser
from train.step.trainer import make_train_loader

RECIPES = {"folder": "folder", "npz": "folder", "digits": "quickstart", "cifar100": "cifar100"}  # else onecycle
LISTED = 20  # classes that are printed; classes.csv has all
AUGMENTED = 3  # augmented versions of each image in samples.png
MANY = 5000  # files from which on progress is shown while their sizes are read


def recipe_for(word: str, overrides: Sequence[str], recipe: str | None = None) -> Config:
    """The recipe with the data set that `word` names: a data.name, or a folder of images or an .npz file. Raises AnalysisError or
    ConfigError."""
    name, root = word, None
    if word not in sources.SOURCES:
        path = at_home(word, "NAME_OR_DIR", AnalysisError)
        if not path.exists():
            known = nearest(word, list(sources.SOURCES))
            raise AnalysisError(
                f"{printable_path(word)}: neither a folder of images, an .npz file nor a data set{known}"
            )
        if not path.is_dir() and path.suffix.lower() != ".npz":
            raise AnalysisError(f"{printable_path(word)}: is a file; expected a folder of images or an .npz file")
        name, root = "folder" if path.is_dir() else "npz", word
    given = {override.partition("=")[0] for override in overrides}
    ours = [] if "data.name" in given else [f"data.name={name}"]
    config = load_config(recipe or RECIPES.get(name, "onecycle"), [*ours, *overrides])
    return changed(config, {"data.root": root}) if root is not None and "data.root" not in given else config


# the same image more than once


@dataclass(frozen=True, eq=False)
class Copies:
    """The images that are there more than once, M in all, ordered by group.

    group, split, label, index: (M,), which of them are equal, the place of the split in SPLITS, the class, and the place in the
    split; head: (M,) uint64, the first eight bytes of the SHA-256.
    """

    group: Ints
    split: Ints
    label: Ints
    index: Ints
    head: np.ndarray[Any, np.dtype[np.uint64]]

    def extra(self, split: int) -> int:
        """How many images of a split are there already in the same split."""
        here = self.group[self.split == split]
        return len(here) - len(np.unique(here))

    def shared(self, split: int) -> int:
        """How many images of a split are among the training images too."""
        training = self.group[self.split == SPLITS.index("train")]
        return int(np.isin(self.group[self.split == split], training).sum())

    def conflicting(self) -> int:
        """How many images there are, each counted once, that stand in several classes."""
        groups = self.group.max(initial=-1) + 1
        low, high = np.full(groups, np.iinfo(np.int64).max), np.full(groups, -1)
        np.minimum.at(low, self.group, self.label)
        np.maximum.at(high, self.group, self.label)
        return int((low != high).sum())


def copies(dataset: Dataset) -> Copies:
    """The images of a data set that are equal, by the SHA-256 of their files or else of their pixels."""
    columns = []
    for name, split in dataset.splits.items():
        head = np.ascontiguousarray(digests(split)[:, :8]).view(np.uint64).ravel()
        columns.append((head, np.full(len(split), SPLITS.index(name)), split.labels, np.arange(len(split))))
    head, split_of, label, index = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    _, group, count = np.unique(head, return_inverse=True, return_counts=True)
    there = np.flatnonzero(count[group] > 1)
    there = there[np.argsort(group[there], kind="stable")]
    _, numbered = np.unique(group[there], return_inverse=True)
    return Copies(numbered, split_of[there], label[there], index[there], head[there])


def copies_rows(found: Copies, class_names: Sequence[str], files: Files | None) -> list[list[object]]:
    """duplicates.csv: a line an image, equal ones with one hash; `image` is the path of a file, or the place in the split."""
    rows: list[list[object]] = [["hash", "split", "class", "image"]]
    if files is not None:
        return [*rows, *files.rows_of(found)]
    for head, split, label, index in zip(found.head, found.split, found.label, found.index, strict=True):
        rows.append([head.tobytes().hex(), SPLITS[split], class_names[label], index])
    return rows


# files


@dataclass(frozen=True, eq=False)
class Files:
    """The files of a folder and what became of them."""

    root: Path
    found: Found
    decoded: DecodedImages

    def sizes(self) -> Ints:
        """(n, 2): height and width, as stored, of the files that could be read, from their heads."""
        paths = self.found.paths.part(0, len(self.found.paths), below=self.root)
        readable = [place for place in range(len(paths)) if place not in self.decoded.problems]
        meter = Meter("reading sizes", len(readable), to_stderr if len(readable) >= MANY else None, unit="files")
        result = np.zeros((len(readable), 2), np.int64)
        try:
            with quiet(), ThreadPoolExecutor(cpu_threads()) as threads:
                for number, size in enumerate(threads.map(_stored_size, (paths[place] for place in readable))):
                    result[number] = size
                    meter.show(number + 1)
        finally:
            meter.close()
        return result[result.all(1)]

    def rows_of(self, copies: Copies) -> list[list[object]]:
        """The lines of duplicates.csv."""
        heads = np.ascontiguousarray(self.decoded.facts.digests[:, :8]).view(np.uint64).ravel()
        splits: dict[tuple[int, int], set[int]] = {}  # of the images of a hash and class
        for head, split, label in zip(copies.head.tolist(), copies.split.tolist(), copies.label.tolist(), strict=True):
            splits.setdefault((head, label), set()).add(split)
        rows: list[list[object]] = []
        for place in np.flatnonzero(np.isin(heads, copies.head)).tolist():
            label = self.found.labels[place]
            there = splits.get((int(heads[place]), label), set())
            if not there or place in self.decoded.problems:
                continue
            noted = self.found.splits[place]
            split = noted if noted in there else min(there)  # held-out ones are noted as training images
            path = path_as_text(self.found.paths[place])
            rows.append([heads[place].tobytes().hex(), SPLITS[split], self.found.class_names[label], path])
        return sorted(rows, key=lambda row: (str(row[0]), SPLITS.index(str(row[1])), str(row[3])))


def _stored_size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception:  # it was readable a moment ago; decoders raise what they like
        return 0, 0


def size_lines(sizes: Ints, height: int, width: int) -> list[str]:
    """What is worth knowing of files of these sizes (n, 2) that become height x width."""
    if not len(sizes):
        return []
    several = Counter(map(tuple, sizes.tolist()))
    (most, count), *_ = several.most_common(1)
    if len(several) == 1:
        lines = [f"files: all of {most[0]} x {most[1]} (height x width)"]
    else:
        areas = sizes.prod(1)
        small, large = sizes[areas.argmin()], sizes[areas.argmax()]
        middle = np.median(sizes, 0)
        lines = [
            f"files: from {small[0]} x {small[1]} to {large[0]} x {large[1]} (height x width), median {middle[0]:.0f} x "
            f"{middle[1]:.0f}; {len(several):,} different sizes, {count:,} of {len(sizes):,} have {most[0]} x {most[1]}"
        ]
    if enlarged := int(((sizes[:, 0] < height) | (sizes[:, 1] < width)).sum()):
        lines.append(f"{enlarged:,} files are smaller than {height} x {width} and so are enlarged")
    return lines


# classes


def class_counts(dataset: Dataset) -> dict[str, Ints]:
    """By split, how many images each class has, (C,)."""
    return {name: np.bincount(split.labels, minlength=dataset.num_classes) for name, split in dataset.splits.items()}


def balance_lines(class_names: Sequence[str], counts: dict[str, Ints]) -> list[str]:
    """A table of the classes; of many those with the most and the fewest training images."""
    order: list[int | None] = list(range(len(class_names)))
    if len(class_names) > LISTED:
        by_count = np.argsort(-counts["train"], kind="stable").tolist()
        order = [*by_count[: LISTED // 2], None, *by_count[-(LISTED // 2) :]]
    names = [printable_path(class_names[label])[:40] if label is not None else "..." for label in order]
    width = max(5, *map(len, names))
    lines = [f"{'class':<{width}}" + "".join(f"{name:>12}" for name in counts)]
    for name, label in zip(names, order, strict=True):
        cells = "" if label is None else "".join(f"{of_split[label]:>12,}" for of_split in counts.values())
        lines.append(f"{name:<{width}}{cells}")
    return lines


# samples.png


def chosen(split: Split, count: int, seed: int) -> Ints:
    """The places of `count` images, of all classes in turn, drawn by the seed."""
    order = np.random.default_rng(seed).permutation(len(split))
    labels = split.labels[order]
    by_class = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[by_class], labels[by_class])
    rank = np.empty(len(order), np.int64)
    rank[by_class] = np.arange(len(order)) - first  # how many of its class come before it
    return np.asarray(order[np.lexsort((labels, rank))[:count]])


def augmented(config: Config, dataset: Dataset, some: Split, epoch: int) -> Pixels:
    """The images (N, H, W, 3) of a split in their order, each as the recipe augments it in an epoch of these alone."""
    config = changed(config, {"train.batch_size": len(some), "data.resident": "always"})
    try:
        loader = make_train_loader(config, replace(dataset, train=some), torch.device("cpu"), "torch")
    except ValueError as error:
        raise AnalysisError(str(error)) from None
    try:
        ((images, _),) = loader.epoch(epoch)
    finally:
        loader.close()
    plan = draw_plan(config.train.seed, epoch, len(some), config.augment, (some.height, some.width))
    result = np.empty_like(some.images)
    result[plan.indices] = images.permute(0, 2, 3, 1).numpy()
    return result


def draw_look(config: Config, dataset: Dataset, path: Path, count: int) -> None:
    """Draw samples.png: training images of all classes, each as it is and as the recipe augments it."""
    some = dataset.train.take(chosen(dataset.train, min(count, len(dataset.train)), config.train.seed))
    versions = [augmented(config, dataset, some, epoch) for epoch in range(AUGMENTED)]
    tiles = []
    for place, image in enumerate(some.images):
        tiles.append(Tile(image, ((pretty(dataset.class_names[some.labels[place]]), BLUE),)))
        tiles += [Tile(version[place], (("augmented", GREY),)) for version in versions]
    group = 1 + AUGMENTED
    draw_sheet(
        tiles,
        path,
        columns=group * min(2, len(some)),
        group=group,
        title="Training images without and with augmentation",
        notes=(describe(config.augment),),
        caption=f"{dataset.name}, {len(dataset.train):,} training images of {dataset.num_classes} classes",
    )


def look(config: Config, output: Path, count: int, log: Log) -> None:
    """Print what the data of a recipe are, and write the tables and the picture into the folder `output`. Files that cannot be
    read are left out, whatever data.on_error is."""
    files = None
    source = sources.source_of(config.data)
    stops = isinstance(source, Folder) and source.on_error == "stop"
    if stops:
        config = changed(config, {"data.on_error": "skip"})
    dataset = sources.load(config.data, to_stderr)
    if isinstance(source, Folder):
        root = at_home(config.data.root, "data.root", AnalysisError)
        found = source.find(root)
        files = Files(root, found, source.decode(root, found, to_stderr)[0])
    counts, class_names = class_counts(dataset), dataset.class_names
    numbers = ", ".join(f"{len(split):,} {name}" for name, split in dataset.splits.items())
    log(f"data: {dataset.name}, {dataset.num_classes} classes ({dataset.source})")
    log(f"images: {numbers}; the network gets {dataset.height} x {dataset.width}")
    for line in size_lines(files.sizes(), dataset.height, dataset.width) if files else []:
        log(line)
    log(
        f"mean {_triple(dataset.mean)}, deviation {_triple(dataset.std)} (red, green, blue, of 0..255; training images)"
    )
    for line in dataset.remarks:
        log(line)
    log("")
    for line in balance_lines(class_names, counts):
        log(line)
    log("")
    twice = copies(dataset)
    log(_copies_line(twice, dataset))
    for note in dataset.notes:
        log(f"WARNING: {note}")
    if stops and files and files.decoded.problems:
        log(
            f"{len(files.decoded.problems):,} files cannot be read: training stops there until they are mended or removed, or "
            "left out by data.on_error=skip"
        )
    output.mkdir(parents=True, exist_ok=True)
    written = [output / name for name in ("classes.csv", "duplicates.csv", "samples.png")]
    rows = zip(class_names, *counts.values(), strict=True)
    write_csv(written[0], [["class", *counts], *([path_as_text(name), *numbers] for name, *numbers in rows)])
    write_csv(written[1], copies_rows(twice, class_names, files))
    if files:
        written.append(output / "broken.csv")
        broken = ([path_as_text(files.found.paths[place]), why] for place, why in files.decoded.problems.items())
        write_csv(written[-1], [["file", "reason"], *broken])
    draw_look(config, dataset, written[2], count)
    for path in written:
        log(str(path))


def _copies_line(found: Copies, dataset: Dataset) -> str:
    parts = []
    for name in dataset.splits:
        if extra := found.extra(SPLITS.index(name)):
            parts.append(f"within {name} {extra:,}")
        if name != "train" and (shared := found.shared(SPLITS.index(name))):
            parts.append(f"{name} in train {shared:,}")
    if conflicting := found.conflicting():
        parts.append(f"under different classes {conflicting:,}")
    return f"equal images: {'; '.join(parts) or 'none'}"


def _triple(values: Sequence[float]) -> str:
    return "/".join(f"{value:.2f}" for value in values)


def main(arguments: list[str] | None = None) -> int:
    options = Parser(
        prog="python -m analysis.data",
        description="A look at a data set before training: counts, sizes, class balance, mean and deviation, equal images, "
        "broken files, and samples.png with and without augmentation.",
    )
    options.add_argument(
        "data",
        metavar="NAME_OR_DIR",
        help=f"a data set ({', '.join(name for name in sources.SOURCES if name not in ('folder', 'npz'))}), a folder of images "
        "or an .npz file; ./NAME where a folder is called like a data set",
    )
    options.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="as for training: data.image_size=64, augment.pad=8 ...",
    )
    options.add_argument(
        "--config", metavar="RECIPE", help="whose augmentation is drawn (default: the data set's own recipe)"
    )
    options.add_argument("--count", type=int, default=12, help="images in samples.png (default: 12)")
    options.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: runs/data/NAME)")

    def body(options: argparse.Namespace, log: Log) -> None:
        if options.count < 1:
            raise AnalysisError(f"--count {options.count}: must be at least 1")
        config = recipe_for(options.data, options.overrides, options.config)
        name = options.data
        if name not in sources.SOURCES:
            path = Path(name).expanduser().resolve()
            name = path.name if path.is_dir() else path.stem
        look(config, options.output or Path("runs") / "data" / name, options.count, log)

    return command(options, arguments, body)


if __name__ == "__main__":
    sys.exit(main())
