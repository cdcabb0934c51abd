"""A training's state as one value: to plain dicts and back, and those of an earlier version."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from training import assert_same, make_trainer

from train.config import Config, changed, to_dict
from train.disk.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from train.disk.snapshot import DataFacts, Position, Snapshot, load_snapshot
from train.step.schedule import Rates

EPOCH = {"epoch": 1, "lr": 0.1, "train_loss": 1.0, "train_accuracy": 75.0, "seconds": 2.0, "images_per_second": 500.0}
EPOCH |= {"test_loss": 0.9, "test_accuracy": 81.0}
FACTS = DataFacts("digits", ("0", "1"), (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), (1, 2, 3), 32, 32)


@pytest.fixture
def snapshot(quick_config: Config) -> Snapshot:
    config = changed(quick_config, {"train.ema_decay": 0.9})
    trainer = make_trainer(config)
    for images, labels in trainer.train_loader.epoch(0, trainer.steps_per_epoch - 2):
        trainer.train_one(images, labels, 0.05)
    position = Position(1, 2, [0.5, 0.25], [60, 70], 1.5, 81.0, 1, [EPOCH])
    trainer.close()
    return Snapshot(
        **trainer.state(),
        position=position,
        rates=Rates(0.1, 0.002),
        steps_per_epoch=trainer.steps_per_epoch,
        times={"training": 2.0},
        machine={"device": "cpu"},
        config=to_dict(config),
        data=FACTS,
    )


def assert_equal(a: Snapshot, b: Snapshot) -> None:
    for part in fields(Snapshot):
        assert_same(getattr(a, part.name), getattr(b, part.name))


def test_a_snapshot_comes_back_from_its_dict_and_from_its_file(snapshot: Snapshot, tmp_path: Path) -> None:
    assert_equal(Snapshot.from_dict(snapshot.to_dict(), "here"), snapshot)
    save_checkpoint(tmp_path / "last.pt", snapshot.to_dict())
    assert_equal(load_snapshot(tmp_path / "last.pt"), snapshot)
    assert snapshot.test_accuracy == snapshot.to_dict()["test_accuracy"] == 81.0


def as_format_2(snapshot: Snapshot) -> dict[str, Any]:
    """Names and content of a checkpoint of format 2, written out: "optimizer" is the state of the one SGD."""
    position, data = snapshot.position, snapshot.data
    return {
        "format": 2,
        "model": snapshot.model,
        "ema": snapshot.ema,
        "optimizer": snapshot.optimizer["sgd"],
        "scaler": snapshot.scaler,
        "epoch": position.epoch,
        "step": position.step,
        "step_losses": position.step_losses,
        "step_correct": position.step_correct,
        "seconds": position.seconds,
        "metrics": position.metrics,
        "best_accuracy": position.best_accuracy,
        "best_epoch": position.best_epoch,
        "test_accuracy": 81.0,
        "lr_max": snapshot.rates.lr_max,
        "lr_min": snapshot.rates.lr_min,
        "steps_per_epoch": snapshot.steps_per_epoch,
        "times": snapshot.times,
        "machine": snapshot.machine,
        "config": snapshot.config,
        "data_name": data.data_name,
        "class_names": list(data.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
        "fill": list(data.fill),
        "height": data.height,
        "width": data.width,
    }


def test_a_checkpoint_holds_what_one_of_format_2_held_but_for_the_optimizers(snapshot: Snapshot) -> None:
    old, new = as_format_2(snapshot), snapshot.to_dict()
    assert (old.keys() - {"format"}) | {"validation"} == new.keys()  # which came later
    assert list(new["optimizer"]) == ["sgd"]
    tensors = ("format", "model", "ema", "optimizer", "scaler")
    plain = {name: value for name, value in old.items() if name not in tensors}
    assert {name: new[name] for name in plain} == plain  # lists too, which are not equal to tuples


def test_a_checkpoint_of_format_2_loads_and_trains_on_to_the_same_bits(
    snapshot: Snapshot, quick_config: Config, tmp_path: Path
) -> None:
    save_checkpoint(
        tmp_path / "last.pt", as_format_2(snapshot)
    )  # `format` of the state stands over that of this version
    assert load_checkpoint(tmp_path / "last.pt")["format"] == 2
    loaded = load_snapshot(tmp_path / "last.pt")
    assert_equal(loaded, snapshot)
    reached = []
    for source in (snapshot, loaded):
        trainer = make_trainer(changed(quick_config, {"train.ema_decay": 0.9}))
        trainer.load_state(source.trainer_state)
        images, labels = next(trainer.train_loader.epoch(1))
        trainer.train_one(images, labels, 0.05)
        reached.append(trainer.state())
        trainer.close()
    assert_same(reached[0], reached[1])


def test_a_checkpoint_from_before_the_machine_was_noted_loads(snapshot: Snapshot) -> None:
    state = as_format_2(snapshot)
    del state["machine"]
    assert Snapshot.from_dict(state, "here").machine == {}


def test_what_a_file_lacks_is_named(snapshot: Snapshot) -> None:
    state = snapshot.to_dict()
    del state["optimizer"], state["best_epoch"], state["lr_min"], state["fill"]
    with pytest.raises(CheckpointError, match=r"old\.pt: .* lacks optimizer, best_epoch, lr_min, fill$"):
        Snapshot.from_dict(state, "old.pt")
