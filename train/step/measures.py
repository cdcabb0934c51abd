"""What an evaluation reports: of which split, by which weights, over which views."""

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
        """In metrics.jsonl, before _loss and _accuracy: test, test_tta, ema_test, ema_test_tta."""
        parts = [self.weights, self.split, "" if self.views == "plain" else self.views]
        return "_".join(part for part in parts if part)

    @property
    def kind(self) -> str:
        """How it differs from the plain answer: "", flip TTA, EMA, EMA and flip TTA."""
        return " and ".join(part for part in (WEIGHTS[self.weights], LABELS[self.views]) if part)

    @property
    def label(self) -> str:
        """For a person: test, or test, EMA and flip TTA."""
        return ", ".join(part for part in (self.split, self.kind) if part)


SPLITS = ("validation", "test")


def measures_of(options: TrainOptions, split: str = "test") -> tuple[Measure, ...]:
    """What a recipe reports of a split, the plain answers first."""
    weights = ["", *(["ema"] if options.ema_decay > 0 else [])]
    views = ["plain", *(["tta"] if options.tta else [])]
    return tuple(Measure(split, w, v) for w in weights for v in views)


def recorded(keys: Collection[str]) -> tuple[Measure, ...]:
    """The measures that a record of metrics.jsonl with these keys holds, that which best.pt follows first."""
    known = (Measure(split, w, v) for split in SPLITS for w in WEIGHTS for v in LABELS)
    return tuple(measure for measure in known if f"{measure.key}_accuracy" in keys)
