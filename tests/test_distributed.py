"""Several processes under torchrun, over gloo: the single-process run's losses, one writer, and nobody left waiting."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import CONFIGS
from torch import nn
from zygote import Job, Zygote, zygote

from dali_pipeline.datasets import load
from dali_pipeline.loader import BackendChoice, EvalLoader
from train.checkpoint import load_checkpoint
from train.config import Config, to_yaml
from train.distributed import Group, GroupError, OtherProcessFailed, _timeout, is_lost
from train.evaluation import evaluate
from train.optim import OneCycle, set_learning_rate
from train.record import read_metrics
from train.runtime import prepare, seed_everything
from train.steps import EvalStep
from train.sync_bn import HostSyncBatchNorm, synchronise_batch_norm
from train.trainer import Trainer

ROOT = CONFIGS.parent
pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or not hasattr(os, "fork"), reason="needs gloo and fork()"
)


# --- in forked processes, which need no second import of torch


def _forked(rank: int, work: Any, store: str, world_size: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        torch.save(work(Group(rank, world_size, rank)), f"{out}.{rank}")
    finally:
        dist.destroy_process_group()


def on_processes(work: Any, folder: Path, world_size: int = 2) -> list[Any]:
    """What `work(group)` gives on each of the processes."""
    mp.start_processes(
        _forked, (work, str(folder / "store"), world_size, str(folder / "out")), world_size, start_method="fork"
    )
    return [torch.load(f"{folder / 'out'}.{rank}", weights_only=False) for rank in range(world_size)]


def _batch_norm(group: Group) -> dict[str, Any]:
    torch.manual_seed(3)
    x = 5 + 2 * torch.randn(8, 4, 3, 3, dtype=torch.float32)
    weights = torch.randn(8, 4, 3, 3)
    net = synchronise_batch_norm(nn.Sequential(nn.Sequential(nn.BatchNorm2d(4))), torch.device("cpu"))
    share = x[group.rank :: group.world_size].clone().requires_grad_()
    y = net(share)
    (y * weights[group.rank :: group.world_size]).sum().backward()
    gradients = []
    for p in net.parameters():
        assert p.grad is not None
        dist.all_reduce(p.grad)
        gradients.append(p.grad)
    assert share.grad is not None
    state = dict(net.state_dict())
    net.eval()
    return {"y": y.detach(), "dx": share.grad, "gradients": gradients, "state": state, "eval": net(x).detach()}


def test_batch_norm_over_two_processes_equals_the_one_over_the_whole_batch(tmp_path: Path) -> None:
    results = on_processes(_batch_norm, tmp_path)
    torch.manual_seed(3)
    x = (5 + 2 * torch.randn(8, 4, 3, 3)).requires_grad_()
    weights = torch.randn(8, 4, 3, 3)
    net = nn.Sequential(nn.Sequential(nn.BatchNorm2d(4)))
    y = net(x)
    (y * weights).sum().backward()
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["y"], y[rank::2].detach())
        torch.testing.assert_close(result["dx"], x.grad[rank::2], rtol=1e-4, atol=1e-5)  # type: ignore[index]
        for ours, theirs in zip(result["gradients"], net.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.grad)
        assert result["state"].keys() == net.state_dict().keys()
        for name, value in net.state_dict().items():
            torch.testing.assert_close(result["state"][name], value)
    net.eval()
    torch.testing.assert_close(results[0]["eval"], net(x).detach())


def test_batch_norm_alone_is_torchs_own() -> None:
    ours, theirs = HostSyncBatchNorm(4), nn.BatchNorm2d(4)
    x = torch.randn(8, 4, 3, 3)
    assert torch.equal(ours(x), theirs(x))
    with pytest.raises(ValueError, match="N, C, H, W"):
        ours(torch.randn(8, 4))


def _failing(group: Group) -> list[str]:
    said = []
    for broken in ((), (1,), (0, 1), (0,)):
        try:
            with group.together():
                if group.rank in broken:
                    raise ValueError(f"rank {group.rank} of {broken}")
            said.append("fine")
        except (ValueError, OtherProcessFailed) as error:
            said.append(type(error).__name__)
    try:
        said.append(group.from_first(lambda: f"made on {group.rank}"))
        group.from_first(lambda: 1 / 0)
    except (ZeroDivisionError, OtherProcessFailed) as error:
        said.append(type(error).__name__)
    said.append(str(group.any_of([group.rank == 1, False, True])))
    return said


def test_a_failure_on_one_process_stops_all_of_them_and_is_told_once(tmp_path: Path) -> None:
    first, second = on_processes(_failing, tmp_path)
    assert first == [
        "fine",
        "OtherProcessFailed",
        "ValueError",
        "ValueError",
        "made on 0",
        "ZeroDivisionError",
        "[True, False, True]",
    ]
    assert second == [
        "fine",
        "ValueError",
        "OtherProcessFailed",
        "OtherProcessFailed",
        "made on 0",
        "OtherProcessFailed",
        "[True, False, True]",
    ]


def test_a_group_of_one_needs_no_connection() -> None:
    group = Group()
    assert group.gather(3) == [3] and group.any_of([True, False]) == [True, False] and not group.any(False)
    assert group.from_first(lambda: 7) == 7
    with pytest.raises(ValueError, match="own"), group.together():
        raise ValueError("own")


def test_the_time_limit_is_read_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _timeout().total_seconds() == 1800
    monkeypatch.setenv("TRAIN_DISTRIBUTED_TIMEOUT", "45")
    assert _timeout().total_seconds() == 45
    for text in ("soon", "-1", "nan", "inf"):
        monkeypatch.setenv("TRAIN_DISTRIBUTED_TIMEOUT", text)
        with pytest.raises(GroupError, match="TRAIN_DISTRIBUTED_TIMEOUT"):
            _timeout()


def test_a_lost_connection_is_told_from_other_errors() -> None:
    assert is_lost(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"))
    assert is_lost(dist.DistNetworkError("The client socket has timed out"))
    assert not is_lost(RuntimeError("shape mismatch")) and not is_lost(ValueError("gloo"))


# --- whole runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with zygote(tmp_path_factory.mktemp("runs")) as made:
        yield made


@pytest.fixture
def noise(quick_config: Config) -> Config:
    """Random images: no equal neighbours, between which rounding could decide in max-pooling; and rates so low that
    rounding does not grow. Not channels-last, where torch's batch norm takes the variance in one pass: that alone moves
    the first loss by 1e-5 from its value in float64, against 2e-8 for contiguous images and for HostSyncBatchNorm."""
    config = quick_config
    config.data.name, config.data.synthetic_count, config.data.backend = "synthetic", 640, "torch"
    config.data.synthetic_classes = 4
    config.augment.flip = True
    config.net.width = 4
    config.train.seed = 3  # one with which no two values are so near that rounding decides all the same
    config.train.batch_size, config.train.eval_batch_size, config.train.epochs = 64, 50, 1
    config.train.ema_decay, config.train.channels_last = 0.9, "off"
    config.schedule.lr_max, config.schedule.lr_min, config.schedule.peak_epoch = 0.002, 0.0004, 0.5
    config.run.checkpoint_every, config.run.analyse = 3, False
    return config


def written(config: Config, folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(to_yaml(config))
    return folder / "recipe.yaml"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def together(
    runs: Zygote, *words: str | Path, before: dict[int, str] | None = None, size: int = 2, **env: str
) -> list[Job]:
    """The processes that torchrun would start, by rank; `before` is Python code that one of them runs first."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **env}
    return [
        runs.start(
            *words, before=(before or {}).get(rank, ""), env={"RANK": str(rank), "LOCAL_RANK": str(rank), **common}
        )
        for rank in range(size)
    ]


def at_step(number: int, action: str) -> str:
    """Code that makes a process do something when its step of that number (from 1) begins."""
    return f"""
import os, signal, time, torch, train.trainer as t
original, steps = t.Trainer.train_one, 0
def counted(self, *arguments):
    global steps
    steps += 1
    if steps == {number}:
        {action}
    return original(self, *arguments)
t.Trainer.train_one = counted
"""


def ended(jobs: list[Job], timeout: float = 60) -> list[int]:
    end = time.monotonic() + timeout
    return [job.wait(max(end - time.monotonic(), 1)) for job in jobs]


def compared(one: Path, two: Path) -> tuple[list[float], list[float]]:
    """The losses of every step but the last (previous.pt is saved before it), the epoch's means behind them."""
    found = []
    for folder in (one, two):
        metrics = read_metrics(folder / "metrics.jsonl")[0]
        steps = load_checkpoint(folder / "previous.pt")["step_losses"]
        found.append([*steps, metrics["train_loss"], metrics["test_loss"], metrics["ema_test_loss"]])
    assert len(found[0]) == 9 + 3
    return found[0], found[1]


def test_two_processes_with_sync_bn_give_the_losses_of_one(runs: Zygote, noise: Config, tmp_path: Path) -> None:
    noise.train.sync_bn = True
    recipe = written(noise, tmp_path)
    jobs = [runs.start("--config", recipe, f"run.dir={tmp_path / 'one'}")]
    jobs += together(runs, "--config", recipe, f"run.dir={tmp_path / 'two'}")
    assert ended(jobs) == [0, 0, 0], jobs[1].stderr
    assert jobs[2].stdout == "" and jobs[1].stdout.count("epoch 1/1: lr") == 1  # the first process alone speaks
    one, two = compared(tmp_path / "one", tmp_path / "two")
    print(f"largest difference {max(abs(a - b) for a, b in zip(one, two, strict=True)):.1e}")
    assert two == pytest.approx(one, abs=1e-5)
    whole, parts = (load_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert parts["test_accuracy"] == whole["test_accuracy"]
    assert parts["metrics"][0]["train_accuracy"] == whole["metrics"][0]["train_accuracy"]
    for part in ("model", "ema"):
        assert whole[part].keys() == parts[part].keys()
        for name, value in whole[part].items():
            torch.testing.assert_close(parts[part][name], value, rtol=1e-3, atol=1e-5)


def test_two_processes_without_sync_bn_equal_batch_norm_over_each_half(
    noise: Config, runs: Zygote, tmp_path: Path
) -> None:
    """The reference: one process, plain torch, whose loss is the mean over the two halves of each batch."""
    noise.train.ema_decay = 0.0
    recipe = written(noise, tmp_path)
    jobs = together(runs, "--config", recipe, f"run.dir={tmp_path / 'two'}")
    assert ended(jobs) == [0, 0], jobs[0].stderr
    dataset = load("synthetic", "unused", synthetic_count=640, synthetic_classes=4)
    seed_everything(noise.train.seed)
    trainer = Trainer(
        noise, dataset, prepare(device="cpu", compile="off", channels_last="off"), BackendChoice("torch", "test")
    )
    rates = OneCycle(0.002, 0.0004, 5.0, 10)
    losses, running = [], torch.zeros(4)
    for step, (images, labels) in enumerate(trainer.train_loader.epoch(0)):
        statistics = []
        total = torch.zeros(())
        norm = trainer.net.prep[1]
        before = norm.running_mean.clone()
        for half in range(2):
            norm.running_mean = before.clone()
            total = total + trainer.train_step(images[half::2], labels[half::2])[0] / 2
            statistics.append(norm.running_mean)
        norm.running_mean = sum(statistics) / 2
        losses.append(total.item())
        set_learning_rate(trainer.optimizer, rates(step))
        trainer.optimizer.zero_grad()
        total.backward()
        trainer.optimizer.step()
        running = norm.running_mean
    state = load_checkpoint(tmp_path / "two" / "previous.pt")
    assert state["step_losses"] == pytest.approx(losses[:9], abs=1e-5)
    last = load_checkpoint(tmp_path / "two" / "last.pt")
    torch.testing.assert_close(last["model"]["prep.1.running_mean"], running, rtol=1e-3, atol=1e-5)
    # the figures are those of the checkpoint, not of each process's own statistics
    trainer.net.load_state_dict(last["model"])
    print(f"largest difference {max(abs(a - b) for a, b in zip(state['step_losses'], losses, strict=False)):.1e}")
    loader = EvalLoader(dataset.test, batch_size=50, device=torch.device("cpu"), backend="torch")
    score = evaluate(EvalStep(trainer.net, dataset.mean, dataset.std), loader).plain
    assert (score.count, score.accuracy) == (128, last["test_accuracy"])
    assert last["metrics"][0]["test_loss"] == pytest.approx(score.loss, abs=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all_and_the_run_resumes_to_the_same_bits(
    runs: Zygote, noise: Config, tmp_path: Path, rank: int
) -> None:
    recipe = written(noise, tmp_path)
    words = ["--config", recipe, "run.checkpoint_every=epoch"]
    stop = {rank: at_step(5, "signal.raise_signal(signal.SIGTERM)")}
    jobs = together(runs, *words, f"run.dir={tmp_path / 'parts'}", before=stop)
    assert ended(jobs) == [143, 143], jobs[0].stderr
    assert load_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 5
    again = together(runs, *words, f"run.dir={tmp_path / 'parts'}", "--resume")
    whole = together(runs, *words, f"run.dir={tmp_path / 'whole'}")
    assert ended([*again, *whole]) == [0, 0, 0, 0], again[0].stderr
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("parts", "whole"))
    for name, value in b["model"].items():
        if "running" in name:  # brought together once more, at the interruption
            torch.testing.assert_close(a["model"][name], value)
        else:
            assert torch.equal(a["model"][name], value), name
    assert a["metrics"][0]["train_loss"] == b["metrics"][0]["train_loss"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_and_leaves_a_good_checkpoint(
    runs: Zygote, noise: Config, tmp_path: Path, rank: int
) -> None:
    recipe = written(noise, tmp_path)
    kill = {rank: at_step(8, "os.kill(os.getpid(), signal.SIGKILL)")}
    jobs = together(runs, "--config", recipe, f"run.dir={tmp_path / 'run'}", before=kill)
    codes = ended(jobs, timeout=60)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    error = jobs[1 - rank].stderr.strip().splitlines()
    assert error[-1].startswith(f"error: process {1 - rank} lost the others") and "Traceback" not in "".join(error)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 6
    jobs = together(runs, "--config", recipe, f"run.dir={tmp_path / 'run'}", "--resume")
    assert ended(jobs) == [0, 0], jobs[0].stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_no_number_on_one_process_is_told_once_and_ends_all(
    runs: Zygote, noise: Config, tmp_path: Path, rank: int
) -> None:
    recipe = written(noise, tmp_path)
    nan = at_step(5, "loss, correct = original(self, *arguments); return loss * torch.nan, correct")
    jobs = together(runs, "--config", recipe, f"run.dir={tmp_path / 'run'}", before={rank: nan})
    assert ended(jobs) == [3, 3]
    assert "epoch 1, step 4" in jobs[0].stderr and "training images" in jobs[0].stderr
    assert jobs[1].stderr == ""
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3


def test_what_one_process_cannot_do_is_one_error_and_no_wait(runs: Zygote, noise: Config, tmp_path: Path) -> None:
    recipe = written(noise, tmp_path)
    run = f"run.dir={tmp_path / 'run'}"
    no_backend = "import dali_pipeline.loader as l, train.fit as f\n"
    no_backend += "def no(*a): raise l.BackendError('no pipeline here')\nf.choose_backend = no"
    no_save = "import train.loop as l\ndef no(*a): raise l.NonFiniteLoss(0, 0, 1.0)\nl.Run._write = no"
    faults: list[tuple[list[str], dict[int, str], list[int], str]] = [
        (["data.name=cifar10", "data.download=false", f"data.root={tmp_path / 'none'}"], {}, [2, 1], "data.root="),
        (["train.batch_size=63"], {}, [2, 1], "does not divide by the 2 processes"),
        (["run.dir=/proc/run"], {}, [2, 1], "cannot be written"),
        (["--resume"], {}, [2, 1], "nothing to resume"),
        ([], {1: no_backend}, [1, 2], "no pipeline here"),
        ([], {0: no_save}, [3, 1], "loss 1.0"),
    ]  # fmt: skip
    for words, before, codes, text in faults:
        if not any(word.startswith("run.dir=") for word in words):
            words = [*words, run]
        jobs = together(runs, "--config", recipe, *words, before=before)
        assert ended(jobs, timeout=30) == codes, [job.stderr for job in jobs]
        errors = [job.stderr.strip() for job in jobs]
        assert [bool(error) for error in errors] == [code != 1 for code in codes]
        assert text in errors[codes.index(max(codes))]


def test_a_bad_recipe_is_told_by_one_process_of_a_machine(runs: Zygote, noise: Config, tmp_path: Path) -> None:
    jobs = together(runs, "--config", written(noise, tmp_path), "train.epochs=none")
    assert ended(jobs) == [2, 2]
    assert "train.epochs" in jobs[0].stderr and jobs[1].stderr == ""


def test_the_others_wait_no_longer_than_the_limit(runs: Zygote, noise: Config, tmp_path: Path) -> None:
    slow = {0: "import time, train.fit as f\no = f.Setup._load\nf.Setup._load = lambda *a, **k: time.sleep(60)"}
    jobs = together(
        runs,
        "--config",
        written(noise, tmp_path),
        f"run.dir={tmp_path / 'run'}",
        before=slow,
        TRAIN_DISTRIBUTED_TIMEOUT="3",
    )
    assert jobs[1].wait(timeout=30) == 1
    assert "lost the others" in jobs[1].stderr
    jobs[0].kill(signal.SIGKILL)
    jobs[0].wait()


@pytest.mark.slow
def test_a_compiler_that_fails_on_one_process_is_off_on_all(runs: Zygote, noise: Config, tmp_path: Path) -> None:
    one = "import torch, train.runtime as r, torch._dynamo.exc as e\nr._compile = lambda *a: ('default', 'g++ found')\n"
    fail = """
def compile(self, **_):
    def call(*_, **__): raise e.BackendCompilerFailed(lambda: None, RuntimeError("g++ crashed"), None)
    self._compiled_call_impl = call
torch.nn.Module.compile = compile
"""
    fine = "torch.nn.Module.compile = lambda self, **_: None\n"
    jobs = together(
        runs,
        *("--config", written(noise, tmp_path), f"run.dir={tmp_path / 'run'}", "train.compile=auto"),
        before={0: one + fine, 1: one + fail},
    )
    assert ended(jobs) == [0, 0], jobs[0].stderr
    assert "WARNING: compile: off (torch.compile failed" in jobs[0].stdout


# --- torchrun itself


@pytest.mark.slow
def test_torchrun_passes_sigterm_on_and_resumes(noise: Config, tmp_path: Path) -> None:
    noise.train.epochs, noise.data.synthetic_count = 10, 1280
    recipe = written(noise, tmp_path)

    def torchrun(*words: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--master-port",
            str(free_port()),
        ]
        return subprocess.Popen(
            [*command, "-m", "train", "--config", str(recipe), f"run.dir={tmp_path / 'run'}", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    metrics = tmp_path / "run" / "metrics.jsonl"
    first = torchrun()
    end = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert time.monotonic() < end and first.poll() is None
        time.sleep(0.05)
    begun = time.monotonic()
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=60)
    assert first.returncode != 0 and time.monotonic() - begun < 60
    assert "SIGTERM: stopped after a whole step" in out, err
    done = load_checkpoint(tmp_path / "run" / "last.pt")["epoch"]
    assert 1 <= done < 10
    second = torchrun("--resume")
    out, err = second.communicate(timeout=240)
    assert second.returncode == 0, err
    assert out.count("epoch 10/10: lr") == 1
    assert len(read_metrics(metrics)) == 10
