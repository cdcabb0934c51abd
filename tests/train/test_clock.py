"""One clock: what summary.json counts as training is what the epochs of metrics.jsonl took, and no save is in it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from training import Lines
from whole_runs import Arm, Stop

from train.config import Config, changed
from train.disk.folder import read_metrics
from train.run import fit
from train.screen.clock import Times

STEP, SLOW_SAVE, STEPS = 1.0, 100.0, 11


class Clock:
    """Stands in for time.perf_counter: it goes on only when told to."""

    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "perf_counter", found)
    return found


def test_a_block_within_another_takes_its_time_from_it(clock: Clock) -> None:
    times = Times()
    with times.on("training"):
        clock.advance(1)
        with times.on("saving"):
            clock.advance(10)
            assert times.seconds()["training"] == 1 and times.seconds()["saving"] == 10
        clock.advance(2)
        assert times.seconds()["training"] == 3
        with times.on("training"):
            clock.advance(4)
    clock.advance(1000)
    expected = dict.fromkeys(times.seconds(), 0.0) | {"training": 7.0, "saving": 10.0}
    assert times.seconds() == expected
    with pytest.raises(Stop), times.on("evaluation"):
        clock.advance(3)
        raise Stop
    times.add({"training": 20.0})
    assert times.seconds() == expected | {"training": 27.0, "evaluation": 3.0}


@pytest.mark.parametrize("every", ["epoch", 1, 3])
def test_slow_saves_are_in_no_epochs_seconds(
    quick_config: Config, clock: Clock, arm: Arm, tmp_path: Path, every: Any
) -> None:
    arm("step", lambda _: clock.advance(STEP))
    arm("write", lambda _: clock.advance(SLOW_SAVE))
    config = changed(quick_config, {"run.checkpoint_every": every, "data.backend": "torch"})
    summary = fit(config, tmp_path / "run", log=Lines())
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [m["seconds"] for m in metrics] == [STEP * STEPS] * 2
    assert [m["images_per_second"] for m in metrics] == [128 / STEP] * 2
    assert summary["seconds"]["training"] == 2 * STEP * STEPS
    saves = 1 + 2 * (1 + (0 if every == "epoch" else (STEPS - 1) // every))
    assert summary["seconds"]["saving"] >= SLOW_SAVE * saves


def test_a_resumed_epoch_counts_what_its_steps_took_before_and_after(
    quick_config: Config, clock: Clock, arm: Arm, tmp_path: Path
) -> None:
    def step(count: int) -> None:
        if count == STEPS + 5:
            raise Stop
        clock.advance(STEP)

    arm("step", step)
    arm("write", lambda _: clock.advance(SLOW_SAVE))
    config = changed(quick_config, {"run.checkpoint_every": 1, "data.backend": "torch"})
    with pytest.raises(Stop):
        fit(config, tmp_path / "run", log=Lines())
    arm("step", lambda _: clock.advance(STEP))
    summary = fit(config, tmp_path / "run", log=Lines(), resume=True)
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [m["seconds"] for m in metrics] == [STEP * STEPS] * 2
    assert summary["seconds"]["training"] == 2 * STEP * STEPS
