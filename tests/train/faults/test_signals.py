"""Signals end a run in order: before the training at once, in it after the step and a save; a second one on the spot."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from whole_runs import Arm, Trained, equal, eventually, held, runs_on, temporary
from zygote import Zygote

from train.config import Config, load_config
from train.disk.checkpoint import load_checkpoint
from train.machine.signals import Interrupted, SignalWatch, ending_at_once
from train.run import fit
from train.screen.log import Log
from train.step.evaluation import evaluate


def test_a_signal_finishes_the_step_saves_and_the_rest_of_the_run_has_the_same_bits(
    runs: Zygote, recipe: Path, trained: Trained, tmp_path: Path
) -> None:
    words = ["--config", recipe, "run.checkpoint_every=epoch"]
    go_on = tmp_path / "go on"
    # before the fourth step of the second epoch; there is no fifth
    before = held("step", 11 + 4, go_on, then="os._exit(98)")
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 128 + signal.SIGUSR1}
    jobs = {number: runs.start(*words, f"run.dir={tmp_path / number.name}", before=before) for number in codes}
    for number, job in jobs.items():
        job.until("now")
        job.kill(number)
    go_on.touch()
    for number, job in jobs.items():
        assert job.wait() == codes[number]
        assert "continue with --resume" in job.stdout and "ending after this step" in job.stderr
        assert "continue with --resume" in job.stderr  # where `| tee` was ended by the same Ctrl-C
    state, *others = (load_checkpoint(tmp_path / number.name / "last.pt") for number in codes)
    assert (state["epoch"], state["step"]) == (1, 4)
    assert all(equal(state, other) for other in others)
    parts = tmp_path / signal.SIGINT.name
    assert runs.run(*words, f"run.dir={parts}", "--resume")[0] == 0
    whole = trained(load_config(recipe, ["run.checkpoint_every=epoch"]))
    assert equal(load_checkpoint(whole / "last.pt"), load_checkpoint(parts / "last.pt"))


def test_a_second_signal_ends_at_once_and_spoils_nothing(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    seconds = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    words = {second: ["--config", recipe, f"run.dir={tmp_path / second.name}"] for second in seconds}
    jobs = {second: runs.start(*words[second], before=held("step", 5)) for second in seconds}
    for second, job in jobs.items():
        job.until("now")
        job.kill(signal.SIGINT)
        eventually(lambda job=job: "ending after this step" in job.stderr)  # type: ignore[misc]
        assert runs_on(job)
        job.kill(second)
        assert job.wait(timeout=60) == -second  # and not 97, the end of the step
    state, *others = (load_checkpoint(tmp_path / second.name / "last.pt") for second in seconds)
    assert state["step"] == 4 and all(equal(state, other) for other in others)
    assert runs.run(*words[signal.SIGTERM], "--resume")[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_save_lets_it_finish(runs: Zygote, recipe: Path, tmp_path: Path, number: int) -> None:
    go_on = tmp_path / "go on"
    # environment.json, config.yaml, then last.pt and metrics.jsonl of each save: in last.pt of the third
    job = runs.start("--config", recipe, f"run.dir={tmp_path / 'run'}", before=held("write", 2 + 2 * 2 + 1, go_on))
    job.until("now")
    assert [name.startswith(".last.pt.") for name in temporary(tmp_path / "run")] == [True]
    job.kill(number)
    go_on.touch()
    assert job.wait() == 128 + number
    assert temporary(tmp_path / "run") == []
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] >= 2
    load_checkpoint(tmp_path / "run" / "previous.pt")


@pytest.mark.parametrize("last", [(), ("train.epochs=1", "schedule.peak_epoch=0.5", "train.tta=shift")])
def test_a_signal_in_the_evaluation_does_not_wait_for_its_end(
    runs: Zygote, recipe: Path, trained: Trained, tmp_path: Path, last: tuple[str, ...]
) -> None:
    """That of an epoch, and that of the last one, which has the views."""
    more = ["train.eval_batch_size=10", "run.checkpoint_every=epoch", *last]
    words = ["--config", recipe, *more]
    go_on = tmp_path / "go on"
    before = held("evaluate", 2, go_on, then="os._exit(98)")  # of 36 batches; there is no third
    job = runs.start(*words, f"run.dir={tmp_path / 'parts'}", before=before)
    job.until("now")
    job.kill(signal.SIGTERM)
    go_on.touch()
    assert job.wait() == 143
    state = load_checkpoint(tmp_path / "parts" / "last.pt")
    assert (state["epoch"], state["step"], len(state["step_losses"])) == (0, 11, 11)
    assert runs.run(*words, f"run.dir={tmp_path / 'parts'}", "--resume")[0] == 0
    whole = trained(load_config(recipe, more))
    assert equal(load_checkpoint(whole / "last.pt"), load_checkpoint(tmp_path / "parts" / "last.pt"))


def test_evaluation_gives_the_mode_back_when_it_is_ended_early() -> None:
    class Early(Exception):
        pass

    def stop(done: int) -> None:
        raise Early

    step = torch.nn.Linear(2, 2)
    step.train()
    batch = (torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool))
    with pytest.raises(Early):
        evaluate(step, [batch], after_batch=stop)
    assert step.training


@pytest.mark.parametrize("place", ["load", "build"])
def test_a_signal_before_the_training_ends_at_once_and_leaves_no_folder(
    runs: Zygote, recipe: Path, tmp_path: Path, place: str
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        job = runs.start("--config", recipe, f"run.dir={tmp_path / 'run'}", before=held(place))
        job.until("now")
        job.kill(number)
        assert job.wait(timeout=60) == 128 + number
        (line,) = job.stderr.splitlines()
        assert line.startswith(f"{signal.Signals(number).name}: stopped, nothing was trained")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_beside_the_training_is_said_and_its_default_action_comes_back(number: signal.Signals) -> None:
    with pytest.raises(Interrupted, match=number.name) as ended, ending_at_once():
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert ended.value.code == 128 + number and not ended.value.saved
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_signal_in_the_save_at_an_epochs_end_stops_after_it(quick_config: Config, tmp_path: Path, arm: Arm) -> None:
    arm("best written", lambda count: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted) as caught:
        fit(quick_config, tmp_path / "run", log=Log(quiet=True))
    assert (caught.value.code, caught.value.saved) == (130, True)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1


def test_repeated_signals_count_as_one_under_torchrun_only_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(number))
    watch = SignalWatch(repeats=True, announce=False)
    with watch.watching(), pytest.raises(Interrupted), watch.deferring():
        signal.raise_signal(signal.SIGINT)
        now += 1
        signal.raise_signal(signal.SIGTERM)
        assert watch.received == signal.SIGINT and not killed
        now += 5
        signal.raise_signal(signal.SIGTERM)
        assert killed == [signal.SIGTERM]


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def work() -> None:
        with SignalWatch().watching():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_program_that_has_its_own_use_for_sigusr1_keeps_it() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        watch = SignalWatch()
        with watch.watching(), watch.deferring():
            signal.raise_signal(signal.SIGUSR1)
        assert received == [signal.SIGUSR1] and watch.received is None
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_was_not_set_from_python_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """signal.signal could not give it back: for such a handler it knows None."""
    before, given = signal.getsignal, signal.signal
    touched: list[int] = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else before(number))
    monkeypatch.setattr(signal, "signal", lambda number, call: (touched.append(number), given(number, call))[1])
    with SignalWatch().watching():
        assert signal.SIGTERM not in touched and signal.SIGINT in touched
    assert signal.SIGTERM not in touched
