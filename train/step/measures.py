"""What an evaluation reports: a measure is a split, the weights used, and the views of each image."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from train.options import TrainOptions
from train.step.views import LABELS

WEIGHTS = {"": "", "ema": "EMA"}


@dataclass(frozen=True)
class Measure:
    """`split` is the name of a data set's split, `weights` is "" for the network's own and "ema" for their average,
    `views` a name of views.VIEWS."""

    split: str = "test"
    weights: str = ""
    views: str = "plain"

    @property
    def key(self) -> str:
        """Its name in metrics.jsonl, before _loss and _accuracy: test, test_tta, test_shift, ema_test ..."""
        parts = [self.weights, self.split, "" if self.views == "plain" else self.views]
        return "_".join(part for part in parts if part)

    @property
    def kind(self) -> str:
        """How it differs from plain predictions by the network's own weights: "", flip TTA, EMA, EMA and flip TTA."""
        return " and ".join(part for part in (WEIGHTS[self.weights], LABELS[self.views]) if part)

    @property
    def label(self) -> str:
        """Its name for a person: test, or test, EMA and flip TTA."""
        return ", ".join(part for part in (self.split, self.kind) if part)


SPLITS = ("validation", "test")


def measures_of(options: TrainOptions, split: str = "test") -> tuple[Measure, ...]:
    """The measures of a recipe on a split, first the one with the network's own weights and plain views."""
    weights = ["", *(["ema"] if options.ema_decay > 0 else [])]
    views = ["plain", *(["tta"] if options.tta else []), *(["shift"] if options.tta == "shift" else [])]
    return tuple(Measure(split, w, v) for w in weights for v in views)


def recorded(keys: Collection[str]) -> tuple[Measure, ...]:
    """The measures in a line of metrics.jsonl with these keys; first the one by which best.pt is chosen."""
    known = (Measure(split, w, v) for split in SPLITS for w in WEIGHTS for v in LABELS)
    return tuple(measure for measure in known if f"{measure.key}_accuracy" in keys)
