"""Kills at any moment leave a run that goes on to the same end. More random ones with -m long, the most with FAULTS=full too."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from whole_runs import Trained, dies, equal, runs_on, temporary
from zygote import Zygote

from train.config import load_config
from train.disk.checkpoint import FORMAT, load_checkpoint
from train.disk.folder import read_metrics

FULL = os.environ.get("FAULTS") == "full"


@pytest.mark.slow
@pytest.mark.parametrize("kills", [12, pytest.param(200 if FULL else 50, marks=pytest.mark.long)])
def test_kill_9_at_random_moments_leaves_a_run_that_ends_with_the_bits_of_an_undisturbed_one(
    runs: Zygote, recipe: Path, tmp_path: Path, kills: int
) -> None:
    seed = int(os.environ.get("FAULTS_SEED", "5"))
    generator = random.Random(seed)
    words = ["--config", recipe, f"train.epochs={12 if kills == 12 else 24}", "train.ema_decay=0.9"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    in_a_save, done, rounds = 0, 0, 0
    while done < kills:
        resumable = (parts / "last.pt").exists()
        job = runs.start(*words, f"run.dir={parts}", "--resume" if resumable else "--overwrite")
        begun = time.monotonic()
        if generator.random() < 0.6:  # wait for a save to begin, then hit somewhere in it
            after = begun + generator.uniform(0.1, 0.6)
            seen = ""
            while not seen and runs_on(job):
                names = temporary(parts) if time.monotonic() > after else []
                seen = next((name for name in names if name.startswith((".last", ".best", ".previous", ".metr"))), "")
            time.sleep(generator.uniform(0, 0.002))
            in_a_save += bool(seen)
        else:
            time.sleep(generator.uniform(0.05, 0.8))
        job.kill(signal.SIGKILL)
        code = job.wait()
        assert code in (-signal.SIGKILL, 0), job.stderr
        if (parts / "last.pt").exists():
            assert load_checkpoint(parts / "last.pt")["format"] == FORMAT
        for name in ("previous.pt", "best.pt"):
            if (parts / name).exists():
                load_checkpoint(parts / name)
        if code == 0:  # it had ended before
            shutil.rmtree(parts)
            rounds += 1
        else:
            done += 1
    resumable = (parts / "last.pt").exists()
    last = runs.run(*words, f"run.dir={parts}", "--resume" if resumable else "--overwrite")
    assert last[0] == 0, last[2]
    assert runs.run(*words, f"run.dir={whole}")[0] == 0
    for name in ("last.pt", "best.pt"):
        assert equal(load_checkpoint(whole / name), load_checkpoint(parts / name)), name
    assert [m["test_loss"] for m in read_metrics(whole / "metrics.jsonl")] == [
        m["test_loss"] for m in read_metrics(parts / "metrics.jsonl")
    ]
    assert temporary(parts) == []
    print(f"seed {seed}: {done} kills, {in_a_save} while a file was being written, {rounds} runs had ended before")
    assert in_a_save >= done // 5


@pytest.mark.parametrize(
    ("place", "at", "every"),
    [("best written", 1, "epoch"), ("last written", 2, "epoch"), ("previous written", 2, 4)],
    ids=["after best.pt", "after last.pt", "between the two names of last.pt"],
)
def test_a_kill_between_two_files_of_a_save_is_mended_by_the_resumed_run(
    runs: Zygote, recipe: Path, trained: Trained, tmp_path: Path, place: str, at: int, every: str | int
) -> None:
    """The epoch's last save writes best.pt, last.pt and metrics.jsonl; the process dies between two of them, or within the
    replacement of last.pt in the middle of the epoch."""
    cut = tmp_path / "cut"
    more = ["train.epochs=1", "schedule.peak_epoch=0.5", f"run.checkpoint_every={every}"]
    words = ["--config", recipe, *more]
    assert runs.run(*words, f"run.dir={cut}", before=dies(place, at))[0] == 99
    assert (cut / "best.pt").exists() == (every == "epoch")
    code, _, err = runs.run(*words, f"run.dir={cut}", "--resume")
    assert code == 0, err
    whole = trained(load_config(recipe, more))
    for name in ("last.pt", "best.pt"):
        assert equal(load_checkpoint(cut / name), load_checkpoint(whole / name))
    assert len(read_metrics(cut / "metrics.jsonl")) == 1
    assert temporary(cut) == []
