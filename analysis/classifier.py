"""`analysis.load`: a run's network as an object that predicts, evaluates and draws, for scripts and notebooks. Stable from
version 0.2 on: names, arguments and results stay; new ones may be added."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from analysis import curves, grad_cam
from analysis.command import progress
from analysis.predictions import Floats, Ints, Predictions, checked_predictions, eval_step, logits_of
from analysis.report import analyse
from analysis.run import AnalysisError, LoadedRun, averaged_network, load_run, loader_of, with_data
from analysis.style import Pixels
from dali_pipeline.dataset import DataError, Dataset
from dali_pipeline.errors import UserError, at_home
from dali_pipeline.image_files import ImageFiles
from dali_pipeline.images import ImageError, Resize, fit_image
from dali_pipeline.loader import EvalLoader
from train.machine.process import process_as_found
from train.screen.log import Log
from train.step.evaluation import evaluate
from train.step.measures import measures_of
from train.step.steps import EvalStep
from train.step.views import VIEWS, Views

BATCH = 512  # images that are read at once; the network has train.eval_batch_size of them
DEVICES = ("auto", "cpu", "cuda", "mps")
# one image, or several of any kind: a path, a Pillow image, or uint8 (H, W, 3), and (N, H, W, 3) for several
Images: TypeAlias = (
    "str | os.PathLike[str] | Image.Image | Pixels | Iterable[str | os.PathLike[str] | Image.Image | Pixels]"
)


@dataclass(frozen=True, eq=False)
class Answers:
    """What the network says of N images, in their order.

    labels: (N,) int64, the likeliest class of each; names: their names; probabilities: (N, C) float64, rows summing to 1.
    """

    labels: Ints
    names: tuple[str, ...]
    probabilities: Floats

    def __len__(self) -> int:
        return len(self.labels)


def load(
    folder: str | os.PathLike[str],
    checkpoint: str = "best",
    device: str = "auto",
    *,
    data_root: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> Classifier:
    """The network of a run folder, by its checkpoint "best" or "last", on `device`: auto (a GPU where there is one), cpu,
    cuda or mps; it computes in the run's own precision where the device is of the run's kind, else in fp32.

    The data are read when they are first needed: from `data_root` where given, else from the run's data.root; with `download`
    they are downloaded if missing. What a user of the results must know is given as a Python warning.
    Raises UserError (AnalysisError, CheckpointError, ConfigError) with a one-line message for what a user can correct.
    """
    if device not in DEVICES:
        raise AnalysisError(f"device={device!r}: expected one of {', '.join(DEVICES)}")
    with _in_words_of_python(), process_as_found():
        run = load_run(Path(folder), checkpoint=checkpoint, device=device, need_data=False, say=lambda line: None)
    for note in run.notes:
        warnings.warn(note, stacklevel=2)
    return Classifier(run, device=device, data_root=data_root, download=download)


class Classifier:
    """A run's network: see `analysis.load`, which makes it.

    class_names: (C,); image_size: (height, width) of the images that it was trained on.
    """

    def __init__(
        self, run: LoadedRun, *, device: str, data_root: str | os.PathLike[str] | None, download: bool
    ) -> None:
        self._run = run
        self._device, self._download = device, download
        self._data_root = None if data_root is None else at_home(data_root, "data_root", DataError)
        self._log = Log(owns_process=False)

    def __repr__(self) -> str:
        return f"<{self._run.caption()}>"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._run.class_names

    @property
    def image_size(self) -> tuple[int, int]:
        return self._run.snapshot.data.height, self._run.snapshot.data.width

    @property
    def dataset(self) -> Dataset:
        """The run's data: `.test.images` is (N, H, W, 3) uint8, `.test.labels` (N,). Raises DataError, AnalysisError."""
        return self._with_data.dataset

    def predict(self, images: Images, fit: Resize | None = None) -> Answers:
        """What the network says of images: one or several paths, Pillow images, or uint8 arrays (H, W, 3); or one array
        (N, H, W, 3).

        An image of another size is resized to the network's: with `fit` "crop" its middle in the right proportions, with
        "squash" the whole image, stretched; by default as the run's own images were, else "crop". The arithmetic is that of
        the run's evaluation. Raises ImageError, naming the file.
        """
        fit = fit or self._run.resize
        if fit not in ("crop", "squash"):
            raise AnalysisError(f"fit={fit!r}: expected crop or squash")
        step, device = eval_step(self._run), self._run.runtime.device
        batch_size = self._run.config.train.eval_batch_size
        reader, one_by_one = ImageFiles(*self.image_size, fit), _one_by_one(images)
        logits = [torch.empty(0, len(self.class_names))]
        while some := list(islice(one_by_one, BATCH)):
            logits.append(logits_of(step, self._fitted(some, fit, reader), device, batch_size))
        together = torch.cat(logits)
        labels = together.argmax(1).numpy()
        return Answers(
            labels,
            tuple(self.class_names[label] for label in labels),
            torch.softmax(together.double(), 1).numpy(),
        )

    def evaluate(self) -> dict[str, float]:
        """Accuracy in percent on each split: "test" and, where there is one, "validation". Where the recipe has them, also with
        flip test-time augmentation ("test_tta") and with the average of the weights ("ema_test").

        It is the same evaluation as in training, each image once. Raises DataError or AnalysisError.
        """
        run = self._with_data
        found: dict[str, float] = {}
        splits = [name for name in ("test", "validation") if name in run.dataset.splits]
        with process_as_found():
            for split in splits:
                measures = measures_of(run.config.train, split)
                for weights in dict.fromkeys(measure.weights for measure in measures):
                    of_step = [measure for measure in measures if measure.weights == weights]
                    net = averaged_network(run) if weights else run.net
                    scores = self._evaluate(eval_step(run, net), split, [VIEWS[measure.views] for measure in of_step])
                    found |= {m.key: score.accuracy for m, score in zip(of_step, scores, strict=True)}
        return found

    def curves(self) -> Path:
        """Draw loss and accuracy by epoch, analysis/curves.png in the run folder (and learning_rate.png, lr_finder.png
        beside it). Raises AnalysisError where no epoch is finished."""
        if not self._run.metrics:
            raise AnalysisError(f"{self._run.path}: no epoch is finished, there are no curves to draw")
        folder = self._run.output_dir()
        curves.draw_all(self._run, folder, self._log)
        return folder / "curves.png"

    def grad_cam(self) -> Path:
        """Draw where the network looks on right and wrong answers, analysis/grad_cam.png in the run folder."""
        run, predictions = self._with_data, self._predictions
        path = run.output_dir() / "grad_cam.png"
        with _in_words_of_python():
            grad_cam.draw_for(run, predictions, path)
        return path

    def report(self) -> Path:
        """Draw all pictures and the report, as `python -m analysis` does, and return the path of report.html."""
        with _in_words_of_python(), process_as_found():
            return analyse(
                self._run.path,
                data_root=self._data_root,
                checkpoint=self._run.file.removesuffix(".pt"),
                device=self._device,
                download=self._download,
                log=self._log,
            )

    @cached_property
    def _with_data(self) -> LoadedRun:
        known = len(self._run.notes)
        with _in_words_of_python():
            run = with_data(self._run, self._data_root, self._download)
        for note in run.notes[known:]:
            warnings.warn(note, stacklevel=3)
        return run

    @cached_property
    def _predictions(self) -> Predictions:
        with _in_words_of_python(), process_as_found():
            return checked_predictions(self._with_data, self._log)[0]

    def _evaluate(self, step: EvalStep, split: str, views: Sequence[Views]) -> tuple[Any, ...]:
        run = self._with_data
        loader = loader_of(
            run,
            lambda backend: EvalLoader(
                run.dataset.splits[split],
                batch_size=run.config.train.eval_batch_size,
                device=run.runtime.device,
                backend=backend,
            ),
        )
        try:
            return evaluate(step, progress(loader, len(loader), f"{split} batches", self._log), views=views).scores
        finally:
            loader.close()

    def _fitted(self, images: Sequence[Any], fit: Resize, reader: ImageFiles) -> Pixels:
        """The images as (N, H, W, 3) uint8 in the network's size. The files among them are read together."""
        result = np.empty((len(images), *self.image_size, 3), np.uint8)
        files = [place for place, image in enumerate(images) if isinstance(image, (str, os.PathLike))]
        done, problems = 0, dict[int, str]()
        for batch in reader.read([str(at_home(images[place], "image", ImageError)) for place in files]):
            result[files[done : done + len(batch.pixels)]] = batch.pixels
            problems |= {files[done + place]: why for place, why in batch.problems.items()}
            done += len(batch.pixels)
        others = set(range(len(images))).difference(files)
        for place in sorted(others.union(problems)):
            if place in problems:
                raise ImageError(problems[place])
            result[place] = self._fitted_object(images[place], fit)
        return result

    def _fitted_object(self, image: Any, fit: Resize) -> Pixels:
        """A Pillow image or an array as (H, W, 3) uint8 in the network's size."""
        height, width = self.image_size
        if not isinstance(image, Image.Image):
            array = np.asarray(image)
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
                raise ImageError(_not_an_image(image, array))
            if array.shape[:2] == (height, width):
                return np.ascontiguousarray(array)
            image = Image.fromarray(array)
        try:
            return fit_image(image, height, width, fit)
        except MemoryError:
            raise
        except Exception as error:  # a Pillow image decodes late, and decoders raise what they like for a damaged file
            raise ImageError(f"a Pillow image of {image.size} cannot be read: {error}") from None


def _one_by_one(images: Images) -> Iterator[Any]:
    """Yields the single images of an argument of `Classifier.predict`."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return iter((images,))
    array = np.asarray(images) if hasattr(images, "__array__") else None
    if array is not None and array.dtype.kind not in "OUS":  # pixels, not an array of paths
        if array.ndim not in (3, 4):
            raise ImageError(_not_an_image(images, array))
        return iter(array if array.ndim == 4 else array[None])
    if not isinstance(images, Iterable):
        raise ImageError(_not_an_image(images, np.asarray(images)))
    return chain(images)


def _not_an_image(image: object, array: np.ndarray[Any, Any]) -> str:
    found = f"{array.dtype} {array.shape}" if array.dtype != object else type(image).__name__
    return f"{found} is no image; expected a path, a Pillow image, or uint8 0..255 of shape (H, W, 3) or (N, H, W, 3)"


@contextmanager
def _in_words_of_python() -> Iterator[None]:
    """Inside the block, error messages name Python's arguments in place of the command's options."""
    try:
        yield
    except UserError as error:
        error.args = tuple(_in_python(str(line)) for line in error.args)
        raise


def _in_python(text: str) -> str:
    text = re.sub(r"--(checkpoint|device) (\w+)", r'\1="\2"', text)
    for option, argument in (
        ("--data-root DIR", "data_root="),
        ("--data-root", "data_root="),
        ("--download", "download=True"),
        ("--checkpoint", "checkpoint="),
    ):
        text = text.replace(option, argument)
    return text
