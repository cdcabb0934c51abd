"""What an evaluation reports, and under which names."""

from __future__ import annotations

import pytest
from training import make_trainer

from train.config import Config, changed
from train.options import TrainOptions
from train.step.measures import Measure, measures_of, recorded

KEYS = ["test", "test_tta", "ema_test", "ema_test_tta"]
LABELS = ["test", "test, flip TTA", "test, EMA", "test, EMA and flip TTA"]
SIX = ["test", "test_tta", "test_shift", "ema_test", "ema_test_tta", "ema_test_shift"]


@pytest.mark.parametrize(
    ("ema_decay", "tta", "which"),
    [(0.0, False, [0]), (0.0, True, [0, 1]), (0.9, False, [0, 2]), (0.9, True, [0, 1, 2, 3])],
)
def test_measures_have_their_keys_and_labels_the_plain_one_first(ema_decay: float, tta: bool, which: list[int]) -> None:
    measures = measures_of(TrainOptions(ema_decay=ema_decay, tta=tta))
    assert [measure.key for measure in measures] == [KEYS[i] for i in which]
    assert [measure.label for measure in measures] == [LABELS[i] for i in which]
    assert [measure.kind for measure in measures] == [["", "flip TTA", "EMA", "EMA and flip TTA"][i] for i in which]


def test_flip_and_shift_is_reported_beside_flip_and_the_plain_figure() -> None:
    measures = measures_of(TrainOptions(ema_decay=0.9, tta="shift"))
    assert [measure.key for measure in measures] == SIX
    assert [measure.kind for measure in measures[:3]] == ["", "flip TTA", "flip and shift TTA"]
    assert recorded([f"{key}_accuracy" for key in SIX]) == measures


def test_measures_of_several_splits_keep_apart() -> None:
    options = TrainOptions(ema_decay=0.9, tta=True)
    measures = [measure for split in ("validation", "test") for measure in measures_of(options, split)]
    assert measures[0] == Measure("validation")
    assert len({measure.key for measure in measures}) == len({measure.label for measure in measures}) == 8
    # of a record that holds both, best.pt followed the validation split
    assert recorded([f"{measure.key}_accuracy" for measure in measures])[0] == Measure("validation")


def test_a_record_tells_which_measures_it_holds() -> None:
    record = ["epoch", "lr", "train_accuracy", *(f"{key}_{what}" for key in KEYS[::2] for what in ("loss", "accuracy"))]
    assert [measure.key for measure in recorded(record)] == KEYS[::2]
    everything = measures_of(TrainOptions(ema_decay=0.9, tta=True))
    assert recorded([f"{measure.key}_accuracy" for measure in everything]) == everything


def test_a_trainer_measures_what_the_recipe_asks_for(quick_config: Config) -> None:
    trainer = make_trainer(changed(quick_config, {"train.ema_decay": 0.9, "train.tta": True}))
    assert [measure.key for measure in trainer.evaluate()] == [measure.key for measure in trainer.measures] == KEYS
    trainer.close()
