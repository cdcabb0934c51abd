"""Damaged checkpoints are refused by name, and fallen back from when asked; a best.pt that is not the best is put right."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from training import Lines
from whole_runs import Arm, Stop, Trained, dies, equal, one_line, stop_before
from zygote import Zygote

from train.config import Config, changed
from train.disk.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from train.failpoints import disarm
from train.run import fit
from train.screen.log import Log
from train.step.trainer import Trainer


def test_a_damaged_checkpoint_is_refused_by_name_and_falls_back_when_asked(
    runs: Zygote, recipe: Path, tmp_path: Path
) -> None:
    words = ["--config", recipe, f"run.dir={tmp_path / 'run'}"]
    whole = load_checkpoint_of(runs, words, tmp_path / "run")
    last = tmp_path / "run" / "last.pt"
    content = last.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 3] ^= 4
    for damage in (content[: len(content) // 2], b"", bytes(flipped), b"cos\nsystem\n(S'touch payload'\ntR."):
        last.write_bytes(damage)
        code, _, err = runs.run(*words, "--resume")
        assert code == 2
        line = one_line(err)
        assert str(last) in line and "--fallback" in line
        assert not Path("payload").exists() and not (ROOT / "payload").exists()
    assert last.read_bytes() == damage
    code, out, err = runs.run(*words, "--resume", "--fallback")
    assert code == 0, err
    assert "WARNING" in out and "continuing from" in out
    assert equal(load_checkpoint(last), whole)


def load_checkpoint_of(runs: Zygote, words: list[Any], folder: Path) -> dict[str, Any]:
    code, _, err = runs.run(*words)
    assert code == 0, err
    return load_checkpoint(folder / "last.pt")


def test_falling_back_never_puts_the_damaged_file_in_the_place_of_the_good_one(
    runs: Zygote, recipe: Path, tmp_path: Path
) -> None:
    words = ["--config", recipe, f"run.dir={tmp_path / 'run'}"]
    assert runs.run(*words)[0] == 0
    (tmp_path / "run" / "last.pt").write_bytes(b"damaged")
    assert runs.run(*words, "--resume", "--fallback", before=dies("step"))[0] == 99
    for name in ("last.pt", "previous.pt"):
        load_checkpoint(tmp_path / "run" / name)
    both = tmp_path / "run"
    for name in ("last.pt", "previous.pt"):
        (both / name).write_bytes(b"damaged")
    code, _, err = runs.run(*words, "--resume", "--fallback")
    assert code == 2 and "previous.pt" in one_line(err)


def test_a_checkpoint_that_is_no_training_state_is_refused(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run" / "last.pt", {"model": {}})
    code, _, err = runs.run("--config", recipe, f"run.dir={tmp_path / 'run'}", "--resume")
    assert code == 2 and "lacks ema, optimizer" in one_line(err)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "gone": lambda path: path.unlink(),
    "of another epoch": lambda path: shutil.copy(path.with_name("previous.pt"), path),
}


@pytest.mark.parametrize("how", ["cut short", "gone", "of another epoch"])
def test_a_damaged_best_is_written_anew_from_a_last_of_its_epoch(
    quick_config: Config, trained: Trained, tmp_path: Path, arm: Arm, how: str
) -> None:
    config = changed(quick_config, {"data.backend": "torch"})
    arm("step", stop_before(12))  # the first of the second epoch
    with pytest.raises(Stop):
        fit(config, tmp_path / "run", log=Log(quiet=True))
    disarm()
    best = tmp_path / "run" / "best.pt"
    assert load_checkpoint(best)["epoch"] == load_checkpoint(tmp_path / "run" / "last.pt")["best_epoch"] == 1
    DAMAGE[how](best)
    log = Lines()
    fit(config, tmp_path / "run", log=log, resume=True)
    assert f"WARNING: {best}: " in log.text and "written anew from last.pt, which is of that epoch" in log.text
    for name in ("last.pt", "best.pt"):
        assert equal(load_checkpoint(tmp_path / "run" / name), load_checkpoint(trained(config) / name))


@pytest.mark.parametrize("how", ["cut short", "gone"])
def test_a_lost_best_is_said_and_the_best_of_the_epochs_to_come_takes_its_place(
    quick_config: Config, tmp_path: Path, arm: Arm, how: str
) -> None:
    config = changed(quick_config, {"data.backend": "torch", "run.checkpoint_every": 1})
    arm("step", stop_before(11 + 3))
    with pytest.raises(Stop):
        fit(config, tmp_path / "run", log=Log(quiet=True))
    disarm()
    DAMAGE[how](tmp_path / "run" / "best.pt")
    log = Lines()
    summary = fit(config, tmp_path / "run", log=log, resume=True)
    assert "the weights of epoch 1 (" in log.text and "are lost, and best.pt will be the best of" in log.text
    assert load_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == summary["best_epoch"] == 2


@pytest.mark.parametrize("validation", [None, 200])
def test_a_best_that_a_finished_run_has_lost_has_no_accuracy(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: int | None
) -> None:
    original, right = Trainer.evaluate, iter((150, 100))

    def falling(self: Trainer, *rest: Any) -> Any:
        return {measure: replace(score, correct=next(right)) for measure, score in original(self, *rest).items()}

    config = changed(quick_config, {"data.backend": "torch", "data.validation": validation})
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "evaluate", falling)
        assert fit(config, tmp_path / "run", log=Log(quiet=True))["best_epoch"] == 1
    (tmp_path / "run" / "best.pt").unlink()
    log = Lines()
    summary = fit(config, tmp_path / "run", log=log, resume=True)
    assert summary["best_epoch"] is summary["best_accuracy"] is summary.get("best_validation_accuracy") is None
    assert "best.pt        lost, and no epoch came after that" in log.text and "-1" not in log.text
    assert summary["last_accuracy"] > 0


def test_a_kill_between_best_and_last_is_noticed_and_the_run_ends_with_the_same_bits(
    quick_config: Config, trained: Trained, tmp_path: Path, arm: Arm
) -> None:
    config = changed(quick_config, {"data.backend": "torch"})
    arm("best written", stop_before(2))
    with pytest.raises(Stop):
        fit(config, tmp_path / "run", log=Log(quiet=True))
    disarm()
    assert load_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == 2
    assert load_checkpoint(tmp_path / "run" / "last.pt")["best_epoch"] == 1
    log = Lines()
    fit(config, tmp_path / "run", log=log, resume=True)
    assert "best.pt: is of epoch 2, and the best epoch of last.pt is 1" in log.text
    for name in ("last.pt", "best.pt"):
        assert equal(load_checkpoint(tmp_path / "run" / name), load_checkpoint(trained(config) / name))


def test_a_huge_file_and_a_pipe_in_the_place_of_a_checkpoint_are_named_at_once(tmp_path: Path) -> None:
    with (tmp_path / "last.pt").open("wb") as file:
        file.truncate(200_000_000_000)
    os.mkfifo(tmp_path / "best.pt")
    for name, said in (("last.pt", "it carries no sha256"), ("best.pt", "is a named pipe, not a regular file")):
        with pytest.raises(CheckpointError, match=f"{name}: .*{said}"):
            load_checkpoint(tmp_path / name)
