"""Faults of every kind, each with what must come of it. FAULTS=full repeats the random ones more often."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from zygote import Job, Zygote, zygote

import train.checkpoint
import train.loop
from train.checkpoint import FORMAT, CheckpointError, WriteError, load_checkpoint, save_checkpoint, seal, write_atomic
from train.config import TRAINING_IMAGES, Config, to_yaml
from train.evaluation import evaluate
from train.failures import explained
from train.lr_finder import RangeTest
from train.record import FOLDERS, WRITTEN, Log, RunFolder, RunFolderError, read_metrics
from train.signals import Interrupted, SignalWatch

ROOT = CONFIGS.parent
FULL = os.environ.get("FAULTS") == "full"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork()")
    with zygote(tmp_path_factory.mktemp("runs")) as made:
        yield made


@pytest.fixture
def recipe(quick_config: Config, tmp_path: Path) -> Path:
    """The quick run on torch's pipeline, saved after every step."""
    quick_config.data.backend = "torch"
    quick_config.run.checkpoint_every, quick_config.run.analyse = 1, False
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(quick_config))
    return path


def equal(a: Any, b: Any) -> bool:
    """Whether two checkpoints hold the same bits, times and places left out."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        passed = {"seconds", "times", "images_per_second", "eval_seconds", "run"}
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a if key not in passed)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def one_line(text: str) -> str:
    """The error, which must be one line and no traceback."""
    lines = text.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    return lines[0]


def temporary(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".*.tmp")]


# --- kills


@pytest.mark.slow
def test_kill_9_at_random_moments_leaves_a_run_that_ends_with_the_bits_of_an_undisturbed_one(
    runs: Zygote, recipe: Path, tmp_path: Path
) -> None:
    kills, seed = (200 if FULL else 50), int(os.environ.get("FAULTS_SEED", "5"))
    generator = random.Random(seed)
    words = ["--config", recipe, "train.epochs=24", "train.ema_decay=0.9"]
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


def runs_on(job: Job) -> bool:
    """Whether the process has not ended (as a zombie it still has an id)."""
    try:
        return Path(f"/proc/{job.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("moment", ["after best.pt", "after last.pt", "between the two names of last.pt"])
def test_a_kill_between_two_files_of_a_save_is_mended_by_the_resumed_run(
    runs: Zygote, recipe: Path, tmp_path: Path, moment: str
) -> None:
    """The epoch's last save writes best.pt, last.pt and metrics.jsonl; the process dies between two of them."""
    target = {
        "after best.pt": "path.name == 'last.pt' and (path.parent / 'best.pt').exists()",
        "after last.pt": "path.name == 'metrics.jsonl' and (path.parent / 'best.pt').exists()",
    }
    if moment in target:
        die = f"""
import os, train.checkpoint as c, train.record as r
original = c.write_atomic
def write(path, *rest, **more):
    if {target[moment]}: os._exit(99)
    original(path, *rest, **more)
c.write_atomic = r.write_atomic = write
"""
    else:
        die = """
import os, pathlib, train.checkpoint as c
original, count = pathlib.Path.replace, 0
def replace(self, target):
    global count
    result = original(self, target)
    count += str(target).endswith("previous.pt")
    if count == 2: os._exit(99)
    return result
pathlib.Path.replace = replace
"""
    words = ["--config", recipe, "train.epochs=1", "schedule.peak_epoch=0.5", "run.checkpoint_every=epoch"]
    if moment not in target:
        words[-1] = "run.checkpoint_every=4"
    assert runs.run(*words, f"run.dir={tmp_path / 'cut'}", before=die)[0] == 99
    code, _, err = runs.run(*words, f"run.dir={tmp_path / 'cut'}", "--resume")
    assert code == 0, err
    assert runs.run(*words, f"run.dir={tmp_path / 'whole'}")[0] == 0
    for name in ("last.pt", "best.pt"):
        assert equal(load_checkpoint(tmp_path / "cut" / name), load_checkpoint(tmp_path / "whole" / name))
    assert len(read_metrics(tmp_path / "cut" / "metrics.jsonl")) == 1
    assert temporary(tmp_path / "cut") == []


# --- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_the_rest_of_the_run_has_the_same_bits(
    runs: Zygote, recipe: Path, tmp_path: Path, number: int, code: int
) -> None:
    words = ["--config", recipe, "run.checkpoint_every=epoch"]
    slow = "import time, train.trainer as t\no = t.Trainer.train_one\n"
    slow += "t.Trainer.train_one = lambda s, *a: (time.sleep(0.05), o(s, *a))[1]"
    job = runs.start(*words, f"run.dir={tmp_path / 'parts'}", before=slow)
    job.until("epoch 1/2: lr")
    time.sleep(0.2)  # in the middle of the second epoch
    begun = time.monotonic()
    job.kill(number)
    assert job.wait() == code
    assert time.monotonic() - begun < 10
    state = load_checkpoint(tmp_path / "parts" / "last.pt")
    assert (state["epoch"], 0 < state["step"] < 11) == (1, True)
    assert "continue with --resume" in job.stdout and "ending after this step" in job.stderr
    assert runs.run(*words, f"run.dir={tmp_path / 'parts'}", "--resume")[0] == 0
    assert runs.run(*words, f"run.dir={tmp_path / 'whole'}")[0] == 0
    assert equal(load_checkpoint(tmp_path / "whole" / "last.pt"), load_checkpoint(tmp_path / "parts" / "last.pt"))


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_and_spoils_nothing(
    runs: Zygote, recipe: Path, tmp_path: Path, second: int
) -> None:
    stuck = """
import time, train.trainer as t
original, steps = t.Trainer.train_one, 0
def stuck(self, *arguments):
    global steps
    steps += 1
    if steps == 5:
        print("now", flush=True)
        time.sleep(60)
    return original(self, *arguments)
t.Trainer.train_one = stuck
"""
    job = runs.start("--config", recipe, f"run.dir={tmp_path / 'run'}", before=stuck)
    job.until("now")
    job.kill(signal.SIGINT)
    time.sleep(0.3)
    assert runs_on(job)
    begun = time.monotonic()
    job.kill(second)
    assert job.wait() == -second
    assert time.monotonic() - begun < 2
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4
    assert runs.run("--config", recipe, f"run.dir={tmp_path / 'run'}", "--resume")[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_save_lets_it_finish(runs: Zygote, recipe: Path, tmp_path: Path, number: int) -> None:
    slow = """
import os, sys, time
original, count = os.fsync, 0
def fsync(handle):
    global count
    count += 1
    if count > 12:
        print("saving", flush=True)
        time.sleep(0.5)
    original(handle)
os.fsync = fsync
"""
    job = runs.start("--config", recipe, f"run.dir={tmp_path / 'run'}", before=slow)
    job.until("saving")
    job.kill(number)
    assert job.wait() == 128 + number
    assert temporary(tmp_path / "run") == []
    for name in ("last.pt", "previous.pt"):
        load_checkpoint(tmp_path / "run" / name)


def test_a_signal_in_the_evaluation_does_not_wait_for_its_end(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    slow = """
import time, train.steps as s
original = s.EvalStep.forward
def forward(self, images):
    print("evaluating", flush=True)
    time.sleep(0.5)
    return original(self, images)
s.EvalStep.forward = forward
"""
    words = ["--config", recipe, "train.eval_batch_size=10", "run.checkpoint_every=epoch"]
    job = runs.start(*words, f"run.dir={tmp_path / 'parts'}", before=slow)
    job.until("evaluating")
    job.kill(signal.SIGTERM)
    assert job.wait(timeout=15) == 143
    state = load_checkpoint(tmp_path / "parts" / "last.pt")
    assert (state["epoch"], state["step"], len(state["step_losses"])) == (0, 11, 11)
    assert runs.run(*words, f"run.dir={tmp_path / 'parts'}", "--resume")[0] == 0
    assert runs.run(*words, f"run.dir={tmp_path / 'whole'}")[0] == 0
    assert equal(load_checkpoint(tmp_path / "whole" / "last.pt"), load_checkpoint(tmp_path / "parts" / "last.pt"))


def test_a_signal_before_the_training_ends_at_once_and_leaves_no_folder(
    runs: Zygote, recipe: Path, tmp_path: Path
) -> None:
    slow = "import time, train.fit as f\no = f.Setup.build\n"
    slow += "f.Setup.build = lambda s, d: (print('building', flush=True), time.sleep(60), o(s, d))[2]"
    for number in (signal.SIGINT, signal.SIGTERM):
        job = runs.start("--config", recipe, f"run.dir={tmp_path / 'run'}", before=slow)
        job.until("building")
        begun = time.monotonic()
        job.kill(number)
        assert job.wait() == 128 + number
        assert time.monotonic() - begun < 5
        assert "Traceback" not in job.stderr
        assert not (tmp_path / "run").exists()


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


# --- losses that are no numbers


def test_a_rate_of_1e20_is_exit_code_3_with_step_and_images_and_the_checkpoint_stays_finite(
    runs: Zygote, recipe: Path, tmp_path: Path
) -> None:
    for every in (1, "epoch"):
        run = tmp_path / f"run-{every}"
        words = ["--config", recipe, "schedule.lr_max=1e20", "schedule.lr_min=1e20", f"run.checkpoint_every={every}"]
        code, _, err = runs.run(*words, f"run.dir={run}")
        assert code == 3
        line = one_line(err)
        assert "epoch 1, step" in line and "schedule.lr_max" in line
        assert "training images" in line or "not finite" in line
        state = load_checkpoint(run / "last.pt")
        assert all(torch.isfinite(value).all() for value in state["model"].values())
        assert all(math.isfinite(loss) for loss in state["step_losses"])


def test_weights_that_are_not_finite_are_never_saved(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a step is that before its update: a bad update shows only in the weights."""
    from train.fit import fit
    from train.progress import NonFiniteLoss
    from train.trainer import Trainer

    original, steps = Trainer.train_one, 0

    def poisoned(self: Trainer, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        result = original(self, *arguments)
        if steps == 3:
            self.net.classifier.bias.data[1] = math.inf
        return result

    monkeypatch.setattr(Trainer, "train_one", poisoned)
    quick_config.run.checkpoint_every = 1
    with pytest.raises(NonFiniteLoss, match=r"not finite after epoch 1, step 3"):
        fit(quick_config, tmp_path / "run", log=Log(quiet=True))
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2


# --- disks


def mounted(folder: Path, *options: str) -> None:
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting needs root on Linux")
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is refused here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    mounted(folder, "-o", "size=640k")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so_in_one_line(
    runs: Zygote, recipe: Path, small_disk: Path
) -> None:
    fill = f"""
import train.loop as l
original, saves = l.Run._write, 0
def write(self, folder, best):
    global saves
    saves += 1
    if saves == 6:
        import os
        with open({str(small_disk / "filler")!r}, "wb", buffering=0) as file:
            try:
                while True: file.write(bytes(4096))
            except OSError: pass
    original(self, folder, best)
l.Run._write = write
"""
    words = ["--config", recipe, f"run.dir={small_disk / 'run'}"]
    code, _, err = runs.run(*words, before=fill)
    assert code == 1
    line = one_line(err)
    assert "No space left on device" in line and "last.pt" in line and "--resume" in line
    assert load_checkpoint(small_disk / "run" / "last.pt")["step"] == 4
    assert temporary(small_disk / "run") == []
    (small_disk / "filler").unlink()
    assert runs.run(*words, "--resume")[0] == 0


def test_a_disk_too_small_for_a_checkpoint_is_noticed_before_the_first_step(
    runs: Zygote, recipe: Path, small_disk: Path
) -> None:
    code, out, err = runs.run("--config", recipe, "net.width=16", f"run.dir={small_disk / 'run'}")
    assert code == 1 and "No space left on device" in one_line(err)
    assert "epoch 1" not in out


def test_a_quota_leaves_the_old_checkpoint(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for a quota: no file may grow beyond the size of the first checkpoint."""
    limit = """
import train.loop as l, resource, os
original, saves = l.Run._write, 0
def write(self, folder, best):
    global saves
    saves += 1
    if saves == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    original(self, folder, best)
l.Run._write = write
"""
    words = ["--config", recipe, f"run.dir={tmp_path / 'run'}"]
    code, _, err = runs.run(*words, before=limit)
    assert code == 1
    assert "File too large" in one_line(err)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2
    assert runs.run(*words, "--resume")[0] == 0


def test_a_folder_that_cannot_be_written_is_refused_before_training(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folders = [tmp_path / "file" / "run", tmp_path / "file", Path("/proc/run")]
    for folder in folders:
        code, out, err = runs.run("--config", recipe, f"run.dir={folder}")
        assert code == 2, out
        assert f"{folder}: cannot be written" in one_line(err)
        assert "data:" not in out


def test_a_read_only_run_folder_is_refused_for_resuming_too(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    mounted(folder)
    try:
        words = ["--config", recipe, "train.epochs=1", "schedule.peak_epoch=0.5", f"run.dir={folder / 'run'}"]
        assert runs.run(*words)[0] == 0
        before = (folder / "run" / "last.pt").read_bytes()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        for option in ("--resume", "--overwrite"):
            code, _, err = runs.run(*words, option)
            assert code == 2 and "Read-only file system" in one_line(err)
        assert (folder / "run" / "last.pt").read_bytes() == before
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_system_without_hard_links_keeps_the_previous_checkpoint_as_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for epoch in range(3):
        save_checkpoint(tmp_path / "last.pt", {"epoch": epoch}, keep_previous=tmp_path / "previous.pt")
    assert load_checkpoint(tmp_path / "previous.pt")["epoch"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_a_write_into_a_folder_that_is_gone_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(WriteError) as caught:
        write_atomic(tmp_path / "gone" / "last.pt", b"x")
    assert caught.value.filename == str(tmp_path / "gone" / "last.pt")


def test_overwrite_removes_nothing_when_the_new_run_cannot_begin(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    words = ["--config", recipe, f"run.dir={tmp_path / 'run'}"]
    assert runs.run(*words, "train.epochs=1", "schedule.peak_epoch=0.5")[0] == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    missing = ["data.name=cifar10", "data.download=false", f"data.root={tmp_path / 'none'}"]
    assert runs.run(*words, *missing, "--overwrite")[0] == 2
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


# --- what --overwrite removes


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("option", ["--overwrite", "--find-lr --overwrite"])
def test_overwrite_in_a_source_checkout_is_refused_and_removes_nothing(
    runs: Zygote, recipe: Path, tmp_path: Path, option: str
) -> None:
    checkout = tmp_path / "checkout"
    for package in ("analysis", "train", "docs"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "notes.txt").write_text("mine")
    before = contents(checkout)
    code, out, err = runs.run("--config", recipe, f"run.dir={checkout}", *option.split())
    assert code == 2, out
    line = one_line(err)
    assert "analysis/" in line and "choose another run.dir=" in line and "data:" not in out
    assert contents(checkout) == before


@pytest.mark.parametrize("name", [*WRITTEN, *(f"{folder}/mine.txt" for folder in FOLDERS)])
def test_a_file_that_has_only_its_name_from_a_run_is_refused_by_overwrite_and_stays(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text("{}\n")
    with pytest.raises(RunFolderError, match=rf"{name.partition('mine')[0]}.*choose another run\.dir="):
        RunFolder(run, overwrite=True, range_test=True)
    assert contents(run) == {name: b"{}\n"}


def whole_run(folder: Path, proof: str) -> None:
    """Files of all names that a run, its analysis and its exports write, of which `proof` alone shows a run."""
    for name in WRITTEN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("damaged")
    for place, files in FOLDERS.items():
        (folder / place).mkdir()
        for name in files:
            (folder / place / name.replace("*", "1700000000.host.17.0")).write_text("old")
    (folder / "analysis" / ".report.html.17.tmp").write_text("half")
    if proof == "environment.json":
        keys = ("versions", "device", "precision", "compile", "backend", "data_source")
        (folder / proof).write_text(json.dumps(dict.fromkeys(keys, "x")))
    elif proof == "lr_finder.csv":
        RangeTest((0.1, 0.2), (2.0, 1.0), diverged=False).write_csv(folder / proof)
    else:
        save_checkpoint(folder / proof, {"epoch": 1})


@pytest.mark.parametrize("proof", ["last.pt", "previous.pt", "best.pt", "environment.json", "lr_finder.csv"])
def test_overwrite_removes_what_runs_write_and_names_what_stays(tmp_path: Path, proof: str) -> None:
    whole_run(tmp_path / "run", proof)
    mine = ["notes.txt", ".notes.tmp", "src/analysis/report.html", "analysis/report.py", "analysis/report.html.bak"]
    mine += ["analysis/samples.png.d/x", "tensorboard/events.txt", "export/other.onnx", "export/model.pt2/x"]
    (tmp_path / "run" / "export" / "model.pt2").unlink()
    for name in mine:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    folder = RunFolder(tmp_path / "run", overwrite=True)
    stays = folder.start_over()
    folder.close()
    assert set(contents(tmp_path / "run")) - {".lock"} == set(mine)
    assert set(stays) == {
        *("notes.txt", ".notes.tmp", "src", "analysis/report.py", "analysis/report.html.bak"),
        *("analysis/samples.png.d", "tensorboard/events.txt", "export/other.onnx", "export/model.pt2"),
    }


def test_overwrite_of_a_run_with_nothing_else_in_it_leaves_an_empty_folder(tmp_path: Path) -> None:
    whole_run(tmp_path / "run", "last.pt")
    folder = RunFolder(tmp_path / "run", overwrite=True)
    assert folder.start_over() == []
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    folder.close()
    assert not (tmp_path / "run").exists()


def test_a_kill_while_overwrite_removes_the_old_run_leaves_one_that_can_be_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    whole_run(tmp_path / "whole", "environment.json")
    count, original = len(contents(tmp_path / "whole")), Path.unlink
    for removed in range(count):
        run = tmp_path / f"run-{removed}"
        shutil.copytree(tmp_path / "whole", run)
        folder, left = RunFolder(run, overwrite=True), removed

        def unlink(self: Path, missing_ok: bool = False) -> None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            original(self, missing_ok)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "unlink", unlink)
            folder.start_over()
        folder.close()
        folder = RunFolder(run, overwrite=True)
        assert folder.start_over() == []
        folder.close()


def test_the_names_that_overwrite_removes_are_those_that_analysis_and_export_write() -> None:
    import ast

    import train.export
    from analysis.report import PICTURES

    written = set()  # every name of a file that the code of the analysis holds
    for path in (ROOT / "analysis").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if text.endswith((".png", ".csv", ".html")) and " " not in text:
                written.add(text)
    # compare.png is of several runs and lies in none, lr_finder.csv is the run's, which the analysis reads
    written -= {"compare.png", "lr_finder.csv"}
    assert set(FOLDERS["analysis"]) == written >= set(PICTURES)
    assert {name for name in FOLDERS["export"] if not name.startswith(".")} == set(train.export.MAKERS)


def test_a_run_that_is_overwritten_says_what_it_left(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    words = ["--config", recipe, "train.epochs=1", "schedule.peak_epoch=0.5", f"run.dir={tmp_path / 'run'}"]
    code, out, err = runs.run(*words, "--overwrite")
    assert code == 0 and "--overwrite" not in out, err
    (tmp_path / "run" / "analysis").mkdir()
    (tmp_path / "run" / "analysis" / "own.py").write_text("mine")
    (tmp_path / "run" / "analysis" / "report.html").write_text("old")
    for number in range(12):
        (tmp_path / "run" / f"note{number:02}.txt").write_text("mine")
    code, out, err = runs.run(*words, "--overwrite")
    assert code == 0, err
    said = [line for line in out.splitlines() if line.startswith("--overwrite: left in ")]
    assert len(said) == 1 and "note00.txt, note01.txt" in said[0] and said[0].endswith(" and 3 more")
    assert (tmp_path / "run" / "analysis" / "own.py").read_text() == "mine"
    assert not (tmp_path / "run" / "analysis" / "report.html").exists()
    assert len(list((tmp_path / "run").glob("note*.txt"))) == 12


# --- links


def test_no_file_of_a_run_is_written_through_a_link(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--config", recipe, "--find-lr", "net.width=4", "schedule.find_steps=40", f"run.dir={run}", "--overwrite"]
    assert runs.run(*words)[0] == 0  # a folder that can be overwritten, and resumed
    again = [word for word in words if word != "--find-lr"]
    again += ["schedule.lr_max=find", "schedule.lr_min=find", "train.epochs=1", "schedule.peak_epoch=0.5"]
    for command in (words, again, [*(word for word in again if word != "--overwrite"), "--resume"]):
        links = [name for name in WRITTEN if "--overwrite" in command or not name.endswith(".pt")]
        for name in [*links, ".writable.tmp"]:
            if name not in ("lr_finder.csv", "environment.json"):  # which show that a run lies here
                (tmp_path / f"target of {name}").write_text("mine")
                (run / name).unlink(missing_ok=True)
                (run / name).symlink_to(tmp_path / f"target of {name}")
        code, _, err = runs.run(*command)
        assert code == 0, err
        assert {path.read_text() for path in tmp_path.glob("target of *")} == {"mine"}
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        assert not (run / name).is_symlink() and (run / name).stat().st_size > 10


@pytest.mark.parametrize("nofollow", [True, False])
@pytest.mark.parametrize("target", ["a file", "nothing"])
def test_a_link_as_the_lock_is_refused_by_name_and_its_target_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, nofollow: bool
) -> None:
    if not nofollow:
        monkeypatch.delattr(os, "O_NOFOLLOW")
    mine = tmp_path / "mine"
    if target == "a file":
        mine.write_text("123")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(mine)
    with pytest.raises(RunFolderError, match=r"run/\.lock: is a symbolic link.*choose another run\.dir="):
        RunFolder(tmp_path / "run")
    assert contents(tmp_path) == ({"mine": b"123", "run/.lock": b"123"} if target == "a file" else {})
    assert (tmp_path / "run" / ".lock").is_symlink()


def test_a_link_that_takes_the_place_of_the_lock_meanwhile_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("123")
    original, looks = Path.is_symlink, 0

    def late(self: Path) -> bool:
        nonlocal looks
        looks += self.name == ".lock"
        if self.name == ".lock" and looks == 1:
            self.symlink_to(tmp_path / "mine")
            return False
        return original(self)

    monkeypatch.setattr(Path, "is_symlink", late)
    with pytest.raises(RunFolderError, match="is a symbolic link"):
        RunFolder(tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "123"


def test_a_lock_that_no_run_wrote_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("another program's\n")
    with pytest.raises(RunFolderError, match=r"\.lock: no run wrote this file"):
        RunFolder(tmp_path)
    assert contents(tmp_path) == {".lock": b"another program's\n"}


@pytest.mark.parametrize("left", [b"", b"123", b"123\n", b"\0" * 5])
def test_what_a_dead_run_can_leave_in_its_lock_is_no_obstacle(tmp_path: Path, left: bytes) -> None:
    (tmp_path / ".lock").write_bytes(left)
    folder = RunFolder(tmp_path)
    assert (tmp_path / ".lock").read_text() == str(os.getpid())
    folder.close()


@pytest.mark.parametrize("name", [*FOLDERS, ".lock"])
def test_a_link_to_a_folder_elsewhere_is_refused_before_anything_is_written(
    runs: Zygote, recipe: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "report.html").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    for option in ([], ["--overwrite"], ["--find-lr"]):
        code, out, err = runs.run("--config", recipe, f"run.dir={tmp_path / 'run'}", *option)
        assert code == 2 and f"run/{name}: is a symbolic link" in one_line(err) and "data:" not in out
    assert contents(tmp_path / "elsewhere") == {"report.html": b"mine"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_a_run_folder_that_is_itself_a_link_is_used(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    folder = RunFolder(tmp_path / "run")
    folder.write_text("config.yaml", "x")
    folder.close()
    assert (tmp_path / "disk" / "config.yaml").read_text() == "x" and (tmp_path / "run").is_symlink()


# --- damaged checkpoints


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
    die = "import os, train.loop as l\nl.Run._epoch = lambda self: os._exit(99)"
    assert runs.run(*words, "--resume", "--fallback", before=die)[0] == 99
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


def test_resuming_on_other_data_is_refused(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    words = ["--config", recipe, f"run.dir={tmp_path / 'run'}"]
    assert runs.run(*words, "train.epochs=1", "schedule.peak_epoch=0.5")[0] == 0
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    state["mean"] = [1.0, 2.0, 3.0]
    save_checkpoint(tmp_path / "run" / "last.pt", state)
    code, _, err = runs.run(*words, "train.epochs=1", "schedule.peak_epoch=0.5", "--resume")
    assert code == 2 and "not what the run was trained on" in one_line(err)


def test_resuming_under_other_conditions_is_said(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    words = ["--config", recipe, f"run.dir={tmp_path / 'run'}", "train.epochs=1", "schedule.peak_epoch=0.5"]
    assert runs.run(*words)[0] == 0
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    state["machine"]["processes"] = 4
    save_checkpoint(tmp_path / "run" / "last.pt", state)
    code, out, _ = runs.run(*words, "--resume")
    assert code == 0 and "WARNING: resumed under other conditions" in out and "processes 4 -> 1" in out


@pytest.mark.parametrize("words", [["--fallback"], ["--extend"], ["--find-lr", "--resume"]])
def test_options_without_the_one_they_go_with_are_refused(runs: Zygote, recipe: Path, words: list[str]) -> None:
    code, _, err = runs.run("--config", recipe, *words)
    assert code == 2 and words[0] in one_line(err)


# --- resuming with a gradient scaler, and at the very end


@pytest.mark.parametrize("steps", [3, 11, 22])
def test_resume_with_a_scaler_is_exact(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    from test_fit import Stop, interrupt_after

    from train.fit import fit
    from train.trainer import Trainer

    original = Trainer.__init__

    def with_scaler(self: Trainer, *arguments: Any, **more: Any) -> None:
        original(self, *arguments, **more)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)

    monkeypatch.setattr(Trainer, "__init__", with_scaler)
    quick_config.run.checkpoint_every, quick_config.train.ema_decay = 1, 0.9
    fit(copy.deepcopy(quick_config), tmp_path / "whole", log=Log(quiet=True))
    with monkeypatch.context() as patch:
        interrupt_after(steps, patch)
        try:
            fit(copy.deepcopy(quick_config), tmp_path / "parts", log=Log(quiet=True))
        except Stop:
            assert steps < 22
    fit(copy.deepcopy(quick_config), tmp_path / "parts", log=Log(quiet=True), resume=True)
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert a["scaler"]["scale"] > 2.0**10
    assert equal(a, b)


@pytest.mark.slow
def test_deterministic_mode_gives_the_same_bits_twice_compiled(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler here")
    words = ["--config", recipe, "train.deterministic=true", "train.compile=default", "run.checkpoint_every=epoch"]
    words += ["train.epochs=1", "schedule.peak_epoch=0.5"]
    for name in "ab":
        job = runs.start(*words, f"run.dir={tmp_path / name}")
        assert job.wait(timeout=400) == 0, job.stderr
    assert equal(load_checkpoint(tmp_path / "a" / "last.pt"), load_checkpoint(tmp_path / "b" / "last.pt"))


# --- any checkpoint

LEAVES = st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=9) | st.booleans()
PLAIN = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(state=st.dictionaries(st.text(max_size=5), PLAIN, max_size=4), numbers=st.lists(st.floats(width=32), max_size=9))
def test_any_plain_state_comes_back_equal(tmp_path: Path, state: dict[str, Any], numbers: list[float]) -> None:
    tensor = torch.tensor(numbers)
    save_checkpoint(tmp_path / "c.pt", {**state, "tensor": tensor, "format": FORMAT})
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert {key: loaded[key] for key in state if key not in ("tensor", "format")} == {
        key: value for key, value in state.items() if key not in ("tensor", "format")
    }
    assert loaded["tensor"].numpy().tobytes() == tensor.numpy().tobytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(content=st.binary(max_size=300), sealed=st.booleans())
def test_any_other_bytes_are_refused_by_name(tmp_path: Path, content: bytes, sealed: bool) -> None:
    if sealed:  # a right digest over anything: what is behind it is not trusted either
        content = seal(content + b"\0\0")
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"c\.pt"):
        load_checkpoint(tmp_path / "c.pt")


# --- memory


def test_out_of_memory_names_the_batch_size_and_changes_nothing(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    limit = """
import resource, train.fit as f
original = f.Setup.build
def build(self, dataset):
    trainer = original(self, dataset)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20,) * 2)
    return trainer
f.Setup.build = build
"""
    if sys.platform != "linux":
        pytest.skip("RLIMIT_AS is not enforced here")
    words = ["--config", recipe, "net.width=64", "train.batch_size=1024", f"run.dir={tmp_path / 'run'}"]
    code, _, err = runs.run(*words, before=limit)
    assert code == 1
    line = one_line(err)
    assert "train.batch_size=1024" in line and "lower one of them" in line
    assert read_config(tmp_path / "run") == 1024


def read_config(folder: Path) -> int:
    import yaml

    return int(yaml.safe_load((folder / "config.yaml").read_text())["train"]["batch_size"])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        MemoryError(),
        RuntimeError("CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_every_kind_of_out_of_memory_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str], quick_config: Config
) -> None:
    with explained(quick_config, Log()) as outcome:
        raise error
    assert outcome.code == 1
    assert "train.batch_size=128" in one_line(capsys.readouterr().err)


def test_other_errors_are_not_explained_away(quick_config: Config) -> None:
    for error in (RuntimeError("a bug"), OSError(2, "No such file"), ValueError("x")):
        with pytest.raises(type(error)), explained(quick_config, Log()):
            raise error


# --- what is missing on the machine


BROKEN_DALI = {
    "missing": ("import sys\nsys.modules['nvidia.dali'] = None", "nvidia"),
    "import broken": (
        "import importlib, dali_pipeline.dali_graph as g\n"
        "def broken(): raise ImportError('libcufft.so.11: cannot open shared object file')\n"
        "g._import_dali = broken",
        "libcufft.so.11",
    ),
    "no driver": (
        "import dali_pipeline.dali_graph as g\n"
        "def probe(device): raise RuntimeError('Unable to load libcuda.so')\n"
        "g.probe = probe",
        "libcuda.so",
    ),
}


@pytest.mark.parametrize("how", BROKEN_DALI)
def test_without_dali_auto_says_so_and_trains_and_an_explicit_request_fails(
    runs: Zygote, recipe: Path, tmp_path: Path, how: str
) -> None:
    before, word = BROKEN_DALI[how]
    words = ["--config", recipe, "train.epochs=1", "schedule.peak_epoch=0.5", f"run.dir={tmp_path / 'run'}"]
    code, out, err = runs.run(*words, "data.backend=auto", before=before)
    assert code == 0, err
    warning = next(line for line in out.splitlines() if "pipeline: torch" in line)
    assert warning.startswith("WARNING") and word in warning
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["backend"] == "torch" and word in environment["backend_reason"]
    code, _, err = runs.run(*words, "data.backend=dali", "--overwrite", before=before)
    assert code == 2 and "data.backend=dali cannot run" in one_line(err)


def test_without_a_compiler_auto_says_so_and_trains_and_an_explicit_request_fails(
    runs: Zygote, recipe: Path, tmp_path: Path
) -> None:
    env = {"PATH": str(tmp_path), "CXX": ""}
    words = ["--config", recipe, "train.epochs=1", "schedule.peak_epoch=0.5", f"run.dir={tmp_path / 'run'}"]
    code, out, err = runs.run(*words, "train.compile=auto", env=env)
    assert code == 0, err
    assert "compile: off (no C++ compiler on the PATH" in out
    code, _, err = runs.run(*words, "train.compile=default", "--overwrite", env=env)
    assert code == 2 and "no C++ compiler" in one_line(err)


def test_a_compiler_that_fails_is_gone_without_loudly_under_auto_and_an_error_when_asked_for(
    runs: Zygote, recipe: Path, tmp_path: Path
) -> None:
    fail = """
import torch, train.runtime as r, torch._dynamo.exc as e
r._compile = lambda *a: ("default", "g++ found")
def compile(self, **_):
    def call(*_, **__): raise e.BackendCompilerFailed(lambda: None, RuntimeError("g++ crashed"), None)
    self._compiled_call_impl = call
torch.nn.Module.compile = compile
"""
    words = ["--config", recipe, "train.epochs=1", "schedule.peak_epoch=0.5", f"run.dir={tmp_path / 'run'}"]
    code, out, err = runs.run(*words, "train.compile=auto", before=fail)
    assert code == 0, err
    assert "WARNING: compile: off (torch.compile failed" in out
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["compile"] == "off" and any("torch.compile failed" in note for note in environment["notes"])
    assert load_checkpoint(tmp_path / "run" / "last.pt")["machine"]["compile"] == "off"
    code, _, err = runs.run(*words, "train.compile=default", "--overwrite", before=fail)
    assert code == 1 and "g++ crashed" in err


# --- streams


def command(recipe: Path, *words: str) -> str:
    return " ".join([sys.executable, "-m", "train", "--config", str(recipe), *words])


@pytest.mark.slow
@pytest.mark.parametrize("end", ["| head -n 1", ">&-", "2>&-", ">&- 2>&- <&-"])
def test_a_run_goes_on_when_nobody_reads_it(recipe: Path, tmp_path: Path, end: str) -> None:
    line = command(recipe, "train.epochs=1", "schedule.peak_epoch=0.5", f"run.dir={tmp_path / 'run'}")
    script = f"set -o pipefail; {line} {end}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1
    assert (tmp_path / "run" / ".lock").read_text().isdecimal()  # and nothing that was printed


def test_a_terminal_that_goes_away_stops_the_bar_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.progress import EpochDisplay, StepMeter

    class Gone:
        n = 0

        def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

        def update(self, _: int) -> None:
            raise OSError(5, "Input/output error")

    display = EpochDisplay(Log(quiet=True), "epoch", 3, 0, 10)
    display.bar = Gone()  # type: ignore[assignment]
    meter = StepMeter(0, 3, torch.device("cpu"))
    display.update(1, meter)
    display.update(2, meter)
    display.close()


# --- the lock


def test_the_second_run_into_one_folder_is_refused_and_a_dead_owner_replaced(
    runs: Zygote, recipe: Path, tmp_path: Path
) -> None:
    wait = "import time, train.fit as f\no = f.Setup.build\n"
    wait += "f.Setup.build = lambda s, d: (print('building', flush=True), time.sleep(60), o(s, d))[2]"
    words = ["--config", recipe, f"run.dir={tmp_path / 'run'}"]
    first = runs.start(*words, before=wait)
    first.until("building")
    for option in ([], ["--overwrite"]):
        code, _, err = runs.run(*words, *option)
        assert code == 2 and f"process {first.pid}" in one_line(err)
    first.kill(signal.SIGKILL)
    first.wait()
    assert (tmp_path / "run" / ".lock").read_text() == str(first.pid)
    code, _, err = runs.run(*words)
    assert code == 0, err


def test_a_run_that_ended_between_the_look_and_the_lock_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RunFolder._acquire

    def late(self: RunFolder) -> None:
        original(self)
        (self.path / "last.pt").write_bytes(b"another run's")

    monkeypatch.setattr(RunFolder, "_acquire", late)
    with pytest.raises(RunFolderError, match="already holds a run"):
        RunFolder(tmp_path / "run")
    assert (tmp_path / "run" / "last.pt").read_bytes() == b"another run's"


def test_a_lock_file_that_its_owner_removes_meanwhile_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = RunFolder._lock_file, 0

    def slow(self: RunFolder, lock: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / "run" / ".lock").unlink()
        original(self, lock)

    monkeypatch.setattr(RunFolder, "_lock_file", slow)
    folder = RunFolder(tmp_path / "run")
    assert calls == 2 and (tmp_path / "run" / ".lock").read_text() == str(os.getpid())
    folder.close()


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    import train.record

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(train.record.fcntl, "flock", refuse)
    RunFolder(tmp_path / "run").close()


# --- smaller things


def test_batch_sizes_are_checked_against_the_data_sets_as_they_are() -> None:
    from dali_pipeline.datasets import CIFARS, load

    assert len(load("digits", "unused").train) == TRAINING_IMAGES["digits"]
    for name, cifar in CIFARS.items():
        assert sum(file.count for file in cifar.train_files) == TRAINING_IMAGES[name]


def test_a_batch_larger_than_the_data_is_refused_without_importing_torch() -> None:
    code = "import sys, train.__main__ as m\n"
    code += "c = m.main(['--config', 'configs/onecycle.yaml', 'train.batch_size=50001', 'data.root=/nowhere'])\n"
    code += "assert c == 2 and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "50001 is more than the 50000 training images of cifar10" in one_line(done.stderr)


def test_the_range_test_alone_leaves_its_curve_and_is_not_overwritten(
    runs: Zygote, recipe: Path, tmp_path: Path
) -> None:
    words = ["--config", recipe, "--find-lr", "net.width=4", "schedule.find_steps=40", f"run.dir={tmp_path / 'run'}"]
    code, out, err = runs.run(*words)
    assert code == 0, err
    assert "found lr_max" in out and "lr_finder.png" in out
    assert {path.name for path in (tmp_path / "run").iterdir()} - {".lock"} == {"lr_finder.csv", "lr_finder.png"}
    assert (tmp_path / "run" / "lr_finder.png").read_bytes()[:4] == b"\x89PNG"
    code, _, err = runs.run(*words)
    assert code == 2 and "already holds a run" in one_line(err)
    assert runs.run(*words, "--overwrite")[0] == 0


def test_a_drawing_that_fails_leaves_the_run_complete(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    fail = "import analysis.report as r\ndef no(*a, **b): raise ValueError('no font\\nat all')\nr.analyse = no"
    code, out, err = runs.run("--config", recipe, "run.analyse=true", f"run.dir={tmp_path / 'run'}", before=fail)
    assert code == 0 and err == ""
    assert f"the run is complete, its analysis is not: no font. Again with: python -m analysis {tmp_path}" in out


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


def test_the_first_checkpoint_is_there_before_the_first_step(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_fit import Stop, interrupt_after

    from train.fit import fit

    with monkeypatch.context() as patch, pytest.raises(Stop):
        interrupt_after(0, patch)
        fit(copy.deepcopy(quick_config), tmp_path / "parts", log=Log(quiet=True))
    assert load_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 0
    fit(copy.deepcopy(quick_config), tmp_path / "parts", log=Log(quiet=True), resume=True)
    fit(copy.deepcopy(quick_config), tmp_path / "whole", log=Log(quiet=True))
    assert equal(load_checkpoint(tmp_path / "parts" / "last.pt"), load_checkpoint(tmp_path / "whole" / "last.pt"))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "parts" / "none.pt")
    assert train.loop.RESUMED


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    import threading

    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def work() -> None:
        with SignalWatch().watching():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_signal_in_the_save_at_an_epochs_end_stops_after_it(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.fit import fit

    original = train.loop.Run._write

    def write(self: train.loop.Run, folder: RunFolder, best: bool) -> None:
        if self.position.epoch == 1:
            signal.raise_signal(signal.SIGINT)
        original(self, folder, best)

    monkeypatch.setattr(train.loop.Run, "_write", write)
    with pytest.raises(Interrupted) as caught:
        fit(quick_config, tmp_path / "run", log=Log(quiet=True))
    assert (caught.value.code, caught.value.saved) == (130, True)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1


@pytest.fixture
def in_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, and slow: the training goes on meanwhile."""
    original = train.loop.store

    def slow(*arguments: Any) -> None:
        time.sleep(0.1)
        original(*arguments)

    monkeypatch.setattr(train.loop, "saves_in_background", lambda device: True)
    monkeypatch.setattr(train.loop, "store", slow)


def test_saving_in_the_background_leaves_the_same_files(
    quick_config: Config, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from train.fit import fit

    quick_config.run.checkpoint_every, quick_config.train.ema_decay = 3, 0.9
    fit(copy.deepcopy(quick_config), tmp_path / "front", log=Log(quiet=True))
    request.getfixturevalue("in_background")
    fit(copy.deepcopy(quick_config), tmp_path / "back", log=Log(quiet=True))
    for name in ("last.pt", "previous.pt", "best.pt"):
        assert equal(load_checkpoint(tmp_path / "front" / name), load_checkpoint(tmp_path / "back" / name))
    assert len(read_metrics(tmp_path / "back" / "metrics.jsonl")) == quick_config.train.epochs


@pytest.mark.usefixtures("in_background")
def test_a_run_interrupted_during_a_save_in_the_background_is_resumed_exactly(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.fit import fit
    from train.trainer import Trainer

    fit(copy.deepcopy(quick_config), tmp_path / "whole", log=Log(quiet=True))
    original, steps = Trainer.train_one, 0

    def interrupted(self: Trainer, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    quick_config.run.checkpoint_every = 1
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_one", interrupted)
        with pytest.raises(Interrupted):
            fit(copy.deepcopy(quick_config), tmp_path / "parts", log=Log(quiet=True))
    assert load_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 4
    fit(copy.deepcopy(quick_config), tmp_path / "parts", log=Log(quiet=True), resume=True)
    whole, parts = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert equal(whole["model"], parts["model"]) and equal(whole["optimizer"], parts["optimizer"])


@pytest.mark.usefixtures("in_background")
def test_a_save_in_the_background_that_fails_ends_the_run_with_its_error(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.fit import fit

    original, saves = train.checkpoint.write_atomic, 0

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        nonlocal saves
        saves += path.name == "last.pt"
        if saves == 3:
            raise WriteError(28, "No space left on device", str(path))
        original(path, *arguments, **options)

    monkeypatch.setattr(train.checkpoint, "write_atomic", refuse)
    quick_config.run.checkpoint_every = 2
    with pytest.raises(WriteError, match="No space left"):
        fit(quick_config, tmp_path / "run", log=Log(quiet=True))
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2


@pytest.mark.usefixtures("in_background")
@pytest.mark.parametrize(("ends_by", "failing_step"), [("signal", 4), ("loss", 3)])
def test_a_failed_save_in_the_background_is_not_hidden_by_how_the_run_ends(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_by: str, failing_step: int
) -> None:
    """The save that the signal asked for; the one that was under way when the loss became no number."""
    from test_fit import Lines

    from train.fit import fit
    from train.progress import NonFiniteLoss
    from train.trainer import Trainer

    store, train_one, steps = train.loop.store, Trainer.train_one, 0

    def refuse(folder: RunFolder, state: dict[str, Any], best: bool) -> None:
        if state["step"] == failing_step:
            raise WriteError(28, "No space left on device", "last.pt")
        store(folder, state, best)

    def ended(self: Trainer, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4 and ends_by == "signal":
            signal.raise_signal(signal.SIGINT)
        elif steps == 4:
            self.net.classifier.bias.data.fill_(math.nan)
        return train_one(self, *arguments)

    monkeypatch.setattr(train.loop, "store", refuse)
    monkeypatch.setattr(Trainer, "train_one", ended)
    quick_config.run.checkpoint_every = 3
    log = Lines()
    with pytest.raises(WriteError if ends_by == "signal" else NonFiniteLoss):
        fit(quick_config, tmp_path / "run", log=log)
    assert ends_by == "signal" or "WARNING: the last save failed, the one before it is kept" in log.text


def test_a_test_loss_that_is_no_number_is_not_saved(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.evaluation import Evaluation, Score
    from train.fit import fit
    from train.progress import NonFiniteLoss
    from train.trainer import Trainer

    monkeypatch.setattr(Trainer, "evaluate", lambda *_: (Evaluation(Score(math.nan, 0, 355)), None))
    with pytest.raises(NonFiniteLoss, match="test loss nan after epoch 1"):
        fit(quick_config, tmp_path / "run", log=Log(quiet=True))
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 0


def test_a_previous_checkpoint_that_cannot_be_kept_leaves_both_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for epoch in range(2):
        save_checkpoint(tmp_path / "last.pt", {"epoch": epoch}, keep_previous=tmp_path / "previous.pt")
    original = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if target.name == "previous.pt":
            raise OSError(5, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(WriteError, match="Input/output error"):
        save_checkpoint(tmp_path / "last.pt", {"epoch": 2}, keep_previous=tmp_path / "previous.pt")
    assert [load_checkpoint(tmp_path / name)["epoch"] for name in ("last.pt", "previous.pt")] == [1, 0]
    assert temporary(tmp_path) == []
