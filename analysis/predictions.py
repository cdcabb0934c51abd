"""predictions.csv: the network's prediction for every test image, computed by the same evaluation as in training.

python -m analysis.predictions runs/NAME
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import log_softmax  # type: ignore[import-untyped]
from torch import Tensor, nn

from analysis.command import command, load_for, parser, progress
from analysis.run import AnalysisError, LoadedRun, Say, loader_of
from analysis.style import Pixels
from dali_pipeline.loader import EvalLoader
from train.disk.atomic import write_csv
from train.screen.log import Log
from train.step.evaluation import evaluate
from train.step.steps import EvalStep

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Predictions:
    """logits (N, C) float32 and labels (N,) int64 in the order of the test set, and what follows from them."""

    logits: npt.NDArray[np.float32]
    labels: Ints

    def __post_init__(self) -> None:
        if self.logits.ndim != 2 or self.labels.shape != self.logits.shape[:1]:
            raise ValueError(f"logits {self.logits.shape} and labels {self.labels.shape}, expected (N, C) and (N,)")

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def log_probabilities(self) -> Floats:
        """(N, C) float64."""
        result: Floats = log_softmax(self.logits.astype(np.float64), axis=1)
        return result

    @cached_property
    def predicted(self) -> Ints:
        """(N,) the class of the largest logit."""
        return torch.from_numpy(self.logits).argmax(1).numpy()

    @cached_property
    def confidence(self) -> Floats:
        """(N,) the probability of the predicted class, 0..1."""
        return np.exp(self.log_probabilities[np.arange(len(self)), self.predicted])

    @cached_property
    def losses(self) -> Floats:
        """(N,) cross-entropy of each image, in nats."""
        return -self.log_probabilities[np.arange(len(self)), self.labels]

    @cached_property
    def hits(self) -> npt.NDArray[np.bool_]:
        return np.equal(self.predicted, self.labels)

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * int(self.hits.sum()) / len(self)

    def runner_up(self) -> Ints:
        """(N,) the class of the second largest logit."""
        ordered = np.argsort(self.logits, axis=1, kind="stable")
        return ordered[:, -2].astype(np.int64)

    def close_calls(self, tolerance: float) -> int:
        """How many images have their two largest logits within `tolerance`: rounding alone can change these predictions."""
        top = np.partition(self.logits, -2, axis=1)[:, -2:]
        return int((top[:, 1] - top[:, 0] <= tolerance).sum())


def eval_step(run: LoadedRun, net: nn.Module | None = None) -> EvalStep:
    """The evaluation step of the training, uncompiled and in eval mode, of the run's network or of `net`."""
    data, runtime = run.snapshot.data, run.runtime
    step = EvalStep(
        run.net if net is None else net,
        data.mean,
        data.std,
        autocast_dtype=runtime.autocast_dtype,
        channels_last=runtime.channels_last,
    )
    return step.to(runtime.device).eval()


def logits_of(step: EvalStep, images: Pixels, device: torch.device, batch_size: int) -> Tensor:
    """(N, C) float32, on the CPU, for images (N, H, W, 3) uint8, at most `batch_size` of them at once."""
    with torch.inference_mode(False), torch.no_grad():
        parts = torch.from_numpy(images).permute(0, 3, 1, 2).split(batch_size)
        logits: list[Tensor] = [step(part.to(device)).float().cpu() for part in parts]
    return torch.cat(logits)


def predict_test(run: LoadedRun, say: Say = print) -> Predictions:
    """The test set through the same pipeline, step and `evaluate` as in training."""
    device, step = run.runtime.device, eval_step(run)
    test, batch_size = run.dataset.test, run.config.train.eval_batch_size
    loader = loader_of(run, lambda backend: EvalLoader(test, batch_size=batch_size, device=device, backend=backend))
    try:
        found = evaluate(step, progress(loader, len(loader), "test batches", say), keep_logits=True)
    finally:
        loader.close()
    assert found.logits is not None and found.labels is not None, "asked for with keep_logits"
    return Predictions(found.logits.numpy(), found.labels.numpy())


def agreement(run: LoadedRun, predictions: Predictions) -> str:
    """A sentence that compares the accuracy with the one that the run measured with these weights.

    Raises AnalysisError where they differ by more images than rounding can explain: then the data or the code have changed.
    """
    recorded = run.recorded_accuracy
    count, correct = len(predictions), int(predictions.hits.sum())
    here = f"{correct}/{count} ({predictions.accuracy:.2f}%)"
    if recorded is None:
        return f"test accuracy {here}; the run did not evaluate these weights itself"
    expected = round(recorded / 100 * count)
    if correct == expected:
        return f"test accuracy {here}, to the last image what the run recorded"
    # 32 roundings of the largest logit, more than the layers of the network accumulate
    bits = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
    trained_in = run.environment.get("precision", run.runtime.precision)
    coarse = max(bits[run.runtime.precision], bits.get(trained_in, 0.0))
    if "cuda" in (run.runtime.device.type, str(run.environment.get("device"))[:4]):
        coarse = max(coarse, 2.0**-11)  # TF32
    close = predictions.close_calls(32 * coarse * float(np.abs(predictions.logits).max()))
    if abs(correct - expected) > close:
        raise AnalysisError(
            f"test accuracy {here}, but the run recorded {recorded:.2f}%, and rounding explains {close} images at most: "
            "the test data are not the run's (--data-root), or the code is not; --accept-difference goes on"
        )
    return (
        f"test accuracy {here}; the run recorded {recorded:.2f}%. The {abs(correct - expected)} images between them are "
        f"rounding ({trained_in} on {run.environment.get('device', 'an unknown device')} then, {run.runtime.precision} on "
        f"{run.runtime.device} now; {close} answers are that close)"
    )


def checked_predictions(run: LoadedRun, say: Say = print, accept_difference: bool = False) -> tuple[Predictions, str]:
    """`predict_test` and the sentence of `agreement`, which is also printed. With `accept_difference` a difference that rounding
    cannot explain is only a warning."""
    predictions = predict_test(run, say)
    try:
        sentence = agreement(run, predictions)
    except AnalysisError as error:
        if not accept_difference:
            raise
        sentence = f"WARNING: {error}"
    say(sentence)
    return predictions, sentence


def worst_first(predictions: Predictions, wrong_only: bool = True) -> Ints:
    """Indices of the (misclassified) test images, highest loss first, ties by index."""
    order = np.argsort(-predictions.losses, kind="stable")
    return order[~predictions.hits[order]] if wrong_only else order


def write_predictions(predictions: Predictions, class_names: tuple[str, ...], path: Path) -> None:
    """CSV, a line a test image: index, label, prediction, confidence (0..1), loss (nats), and the two class names."""
    header = ["index", "label", "prediction", "confidence", "loss", "label_name", "prediction_name"]
    answers = zip(predictions.labels, predictions.predicted, predictions.confidence, predictions.losses, strict=True)
    rows = (
        [index, label, predicted, f"{confidence:.6f}", f"{loss:.6g}", class_names[label], class_names[predicted]]
        for index, (label, predicted, confidence, loss) in enumerate(answers)
    )
    write_csv(path, [header, *rows])


def prediction_options(module: str, description: str, *, one_run: bool = True) -> argparse.ArgumentParser:
    """The shared options of modules that look at the test set's predictions."""
    result = parser(module, description, one_run=one_run)
    result.add_argument(
        "--accept-difference", action="store_true", help="go on where the accuracy is not the one that the run recorded"
    )
    return result


def main(arguments: list[str] | None = None) -> int:
    options = prediction_options(
        "analysis.predictions", "Write predictions.csv: what the network answers for every test image."
    )

    def body(options: argparse.Namespace, log: Log) -> None:
        run = load_for(options, log)
        predictions, _ = checked_predictions(run, log, options.accept_difference)
        path = run.output_dir(options.output) / "predictions.csv"
        write_predictions(predictions, run.class_names, path)
        log(str(path))

    return command(options, arguments, body)


if __name__ == "__main__":
    sys.exit(main())
