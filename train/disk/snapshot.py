"""What a checkpoint holds: everything that a resumed run and an analysis need, as plain dicts of tensors, numbers and text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from train.disk.checkpoint import CheckpointError, load_checkpoint
from train.disk.content import problem_with
from train.step.schedule import Rates


@dataclass
class Position:
    """How far a run has come: its finished epochs, the steps done in the next one, and the results of those steps."""

    epoch: int = 0
    step: int = 0
    step_losses: list[float] = field(default_factory=list)
    step_correct: list[int] = field(default_factory=list)
    seconds: float = 0.0  # training time already spent on the unfinished epoch
    best_accuracy: float = -1.0
    best_epoch: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class DataFacts:
    """Facts about the data that a network was trained on. `mean` and `std` are in units of 0..255, `fill` is cutout's colour."""

    data_name: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fill: tuple[int, ...]
    height: int
    width: int
    validation: str | None = None  # fingerprint of the validation split, where there is one


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A training at one moment. `model`, `ema`, `optimizer` and `scaler` are the trainer's state (`Trainer.state`)."""

    model: dict[str, Tensor]
    ema: dict[str, Any] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    position: Position
    rates: Rates
    steps_per_epoch: int
    times: dict[str, float]
    machine: dict[str, Any]  # what is no key of the recipe and changes the result, if only by rounding
    config: dict[str, dict[str, Any]]
    data: DataFacts

    @property
    def test_accuracy(self) -> float | None:
        """The accuracy on the test set after the last finished epoch, in percent; None where the run did not measure it."""
        metrics = self.position.metrics
        return float(metrics[-1]["test_accuracy"]) if metrics and "test_accuracy" in metrics[-1] else None

    @property
    def trainer_state(self) -> dict[str, Any]:
        """What `Trainer.load_state` takes."""
        return {name: getattr(self, name) for name in ("model", "ema", "optimizer", "scaler")}

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("position", "rates", "data")}
        data = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.data).items()}
        return {**own, **vars(self.position), **asdict(self.rates), **data, "test_accuracy": self.test_accuracy}

    @classmethod
    def from_dict(cls, state: dict[str, Any], where: str | Path) -> Snapshot:
        """From the result of `to_dict`, of this version or an earlier one. Raises CheckpointError, naming `where`."""
        if state.get("format") == 2 and "optimizer" in state:
            state = {**state, "optimizer": {"sgd": state["optimizer"]}}
        state = {"machine": {}, "validation": None, **state}
        parts = {"position": Position, "rates": Rates, "data": DataFacts}
        own = [f.name for f in fields(cls) if f.name not in parts]
        inside = {part: [f.name for f in fields(kind)] for part, kind in parts.items()}
        missing = [name for name in chain(own, *inside.values()) if name not in state]
        if missing:
            raise CheckpointError(f"{where}: the checkpoint is no training state, it lacks {', '.join(missing)}")
        if problem := problem_with(state):
            raise CheckpointError(
                f"{where}: holds what no training leaves: {problem}; use another checkpoint of the run"
            )
        data: dict[str, Any] = {}
        for name in inside["data"]:
            value = state[name]
            data[name] = tuple(value) if isinstance(value, list) else value
        return cls(
            **{name: state[name] for name in own},
            position=Position(**{name: state[name] for name in inside["position"]}),
            rates=Rates(**{name: state[name] for name in inside["rates"]}),
            data=DataFacts(**data),
        )


def load_snapshot(path: str | Path) -> Snapshot:
    """Read and verify a checkpoint's file. Raises CheckpointError."""
    return Snapshot.from_dict(load_checkpoint(path), path)
