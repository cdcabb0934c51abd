"""`throughput.py --folder DIR`: how fast image files become batches. torchvision's ImageFolder, which decodes every file in every
epoch, and this project's way with the same files: decoding once, a later start, and epochs of resident and of mapped images."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine_facts
from benchmarks.measure import Rate, Sampled, Stage, interleave
from benchmarks.peers import pil_augmentations
from benchmarks.stages import endless
from dali_pipeline import decoded, sources
from dali_pipeline.backend import choose_backend
from dali_pipeline.dataset import Dataset
from dali_pipeline.errors import UserError, at_home
from dali_pipeline.image_files import ImageFiles
from dali_pipeline.sources.folder import training_folder
from train.config import Config, changed
from train.machine.environment import git_commit, versions
from train.step.trainer import make_train_loader

KIND = "image_folder"  # of a report, in its JSON file
WORKERS = 2
COMPARED = 256  # files whose pixels are compared
LABELS = {
    "image_folder_plain": f"ImageFolder, DataLoader, {WORKERS} workers, not augmented",
    "image_folder": f"ImageFolder, DataLoader, {WORKERS} workers, augmented",
    "decode": "decoding once, kept on the disk",
    "later_start": "a later start",
    "mapped": "an epoch of mapped images, augmented",
    "resident": "an epoch of resident images, augmented",
}
# by name: the stage, and what it is measured by
RATIOS = {
    "decode_over_image_folder_plain": ("decode", "image_folder_plain"),
    "decode_over_image_folder": ("decode", "image_folder"),
    "mapped_over_image_folder": ("mapped", "image_folder"),
    "resident_over_image_folder": ("resident", "image_folder"),
}


@dataclass
class Whole:
    """A stage of which a sample is one call: a start, or an epoch. `run` returns how many images that were."""

    name: str
    run: Callable[[], int]
    prepare: Callable[[], object] = lambda: None  # before each call, not timed
    warm: Callable[[], object] | None = None  # instead of a first call

    def warm_up(self) -> None:
        if self.warm is not None:
            self.warm()
        else:
            self.sample()

    def sample(self) -> float:
        self.prepare()
        begun = time.perf_counter()
        images = self.run()
        return images / (time.perf_counter() - begun)


def check(options: argparse.Namespace) -> None:
    """Raises UserError for options that do not go with --folder."""
    for name in ("data_root", "ablations", "ablate", "profile", "footprint", "picture"):
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')}: does not go with --folder, which measures files alone")
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError where torch and torchvision do not match
        raise UserError(f"--folder: measures torchvision's ImageFolder, which cannot be imported: {error}") from None


def measure_folder(options: argparse.Namespace, config: Config, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure all stages in turn, and return the report. Everything runs on the CPU. Raises DataError where files cannot be
    used."""
    device = torch.device("cpu")
    repeats = options.repeats or 3
    given = at_home(options.folder, "--folder", UserError)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(_without_cache(folder))
        root, theirs = (_linked(given, Path(folder) / name) for name in ("images", "theirs"))
        config = changed(config, {"data.root": str(root), "train.device": "cpu"})
        kept = root / decoded.FOLDER

        def start() -> int:
            dataset = sources.load(config.data)
            return sum(map(len, dataset.splits.values()))

        machine = machine_facts(device)
        dataset = sources.load(config.data, say)
        files = TorchvisionFiles.of(theirs, dataset, config)
        epochs = {name: _epochs(config, dataset, device, name, stack) for name in ("always", "never")}
        plain, whole = (files.loader(config.train.batch_size, augment) for augment in (False, True))
        stages: list[Sampled] = [
            Whole("decode", start, prepare=lambda: shutil.rmtree(kept)),
            Whole("later_start", start),
            Stage("resident", epochs["always"][0], device, 0.3, epochs["always"][1]),
            Stage("mapped", epochs["never"][0], device, 0.3, epochs["never"][1]),
        ]
        for name, loader in (("image_folder_plain", plain), ("image_folder", whole)):
            stages.append(
                Whole(name, lambda loader=loader: _count(loader), warm=lambda loader=loader: _count(loader, 4))
            )
        difference = files.largest_difference(config)
        say(f"{len(dataset.train):,} training files; pixels of both ways differ by at most {difference} of 255")
        rates = interleave(stages, repeats)
    for name in LABELS:
        rate = rates[name]
        say(f"{LABELS[name]:<52}{rate.median:>12,.0f} images/s{rate.spread / rate.median:>8.0%}{len(rate.samples):>4}")
    report = {
        "kind": KIND,
        "machine": machine,
        "versions": {**versions(), "torchvision": files.version},
        "commit": git_commit(),
        "command": "",
        "settings": {
            "batch_size": config.train.batch_size,
            "images": sum(map(len, dataset.splits.values())),
            "training_images": len(dataset.train),
            "image_size": [dataset.height, dataset.width],
            "augment": asdict(config.augment),
            "backend": choose_backend(config.data.backend, device).name,
            "largest_difference": difference,
        },
        "stages": {name: rates[name].record() for name in LABELS},
        "ratios": ratios(rates),
        "load_average_after": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }
    for name, ratio in report["ratios"].items():
        say(f"{name.replace('_', ' ')}: {ratio:.1f}x")
    return report


def ratios(rates: dict[str, Rate]) -> dict[str, float]:
    """Median of the ratios of samples of the same round."""
    return {name: rates[ours].over(rates[theirs]) for name, (ours, theirs) in RATIOS.items()}


@contextmanager
def _without_cache(folder: str) -> Iterator[None]:
    """Inside the block nothing is found among the images that the user has decoded before."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


def _linked(given: Path, folder: Path) -> Path:
    """A folder of links to what lies in the given one, so that what is decoded can be removed without touching what the user
    keeps there. Raises UserError."""
    folder.mkdir()
    if not given.is_dir():
        raise UserError(f"--folder {given}: no such folder; name one of image files, with train/CLASS/ or CLASS/ in it")
    for path in given.iterdir():
        if not path.name.startswith("."):
            (folder / path.name).symlink_to(path.resolve())
    return folder


def _epochs(
    config: Config, dataset: Dataset, device: torch.device, resident: str, stack: ExitStack
) -> tuple[Callable[[int], float], int]:
    """What takes n batches, from one epoch into the next, and the batches of an epoch."""
    order = changed(config, {"data.resident": resident})
    loader = make_train_loader(order, dataset, device, choose_backend(config.data.backend, device))
    stack.callback(loader.close)
    batches = endless(loader)
    for _ in range(loader.steps_per_epoch):  # the first epoch is no part of it
        next(batches)

    def run(steps: int) -> float:
        return float(sum(len(labels) for _, labels in islice(batches, steps)))

    return run, loader.steps_per_epoch


def _count(loader: Any, batches: int | None = None) -> int:
    """The images of an epoch, or of its first batches."""
    return sum(len(labels) for _, labels in islice(iter(loader), batches))


@dataclass(frozen=True)
class TorchvisionFiles:
    """The training files as torchvision reads them."""

    folder: Path
    height: int
    width: int
    fill: tuple[int, int, int]
    version: str

    @classmethod
    def of(cls, root: Path, dataset: Dataset, config: Config) -> TorchvisionFiles:
        import torchvision

        return cls(training_folder(root), dataset.height, dataset.width, dataset.fill, torchvision.__version__)

    def images(self, augment: bool) -> Any:
        """The files as ImageFolder decodes, resizes, crops and augments them: uint8 (3, H, W)."""
        from torchvision import datasets, transforms

        fit = [
            transforms.Resize(min(self.height, self.width), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop((self.height, self.width)),
        ]
        size = (self.height, self.width)
        return datasets.ImageFolder(
            self.folder, transforms.Compose([*fit, *pil_augmentations(size, augment, self.fill)])
        )

    def loader(self, batch_size: int, augment: bool) -> Any:
        return torch.utils.data.DataLoader(
            self.images(augment),
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=WORKERS,
            persistent_workers=WORKERS > 0,
            multiprocessing_context="spawn" if WORKERS else None,  # DALI's threads do not survive a fork
        )

    def largest_difference(self, config: Config) -> int:
        """The largest difference between the pixels of ImageFolder and of this project, over files evenly spread."""
        theirs = self.images(augment=False)
        places = np.unique(np.linspace(0, len(theirs) - 1, COMPARED, dtype=np.int64))
        paths: Sequence[str] = [theirs.samples[place][0] for place in places]
        reader = ImageFiles(self.height, self.width, getattr(config.data, "resize", "crop"))
        ours = np.concatenate([batch.pixels for batch in reader.read(paths)]).astype(np.int64)
        same = np.stack([theirs[place][0].permute(1, 2, 0).numpy() for place in places])
        return int(np.abs(ours - same).max())
