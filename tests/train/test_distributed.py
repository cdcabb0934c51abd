"""Several processes under torchrun, over gloo: the single-process run's losses, one writer, and nobody left waiting."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torch.distributed as dist
from float64 import train_in_float64
from options import EVERYTHING
from places import ROOT
from torch import Tensor, nn
from torch.nn import functional as F
from training import QUICK, assert_same
from whole_runs import eventually, one_line
from zygote import Job, Zygote

import analysis
from dali_pipeline.backend import BackendChoice, choose_backend
from dali_pipeline.loader import EvalLoader
from dali_pipeline.sources.synthetic import random_dataset
from train.config import Config, changed, to_yaml
from train.disk.checkpoint import load_checkpoint
from train.disk.folder import read_metrics
from train.machine.distributed import (
    STEP_SECONDS,
    STEP_VARIABLE,
    Group,
    OtherProcessFailed,
    is_lost,
    time_limit,
)
from train.machine.place import GroupError
from train.machine.runtime import prepare, seed_everything
from train.step.evaluation import evaluate
from train.step.meter import StepMeter
from train.step.schedule import OneCycle
from train.step.steps import EvalStep
from train.step.sync_bn import HostSyncBatchNorm, synchronise_batch_norm
from train.step.trainer import Trainer

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or not hasattr(os, "fork"), reason="needs gloo and fork()"
)


HOST = socket.gethostname()

# --- in forked processes


def _forked(rank: int, work: Any, store: Path, world_size: int, out: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        group = Group(rank, world_size, rank)
        torch.save(work(group), f"{out}.{rank}")
        group.gather(None)  # an exchange that does not hold up the closing, as others may: see Group
    finally:
        dist.destroy_process_group()


def on_processes(runs: Zygote, work: Any, folder: Path, world_size: int = 2) -> list[Any]:
    """What `work(group)` gives on each of the processes, which are forked for it."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    call = functools.partial(_forked, work=work, store=folder / "store", world_size=world_size, out=str(folder / "out"))
    (folder / "work").write_bytes(cloudpickle.dumps(call))
    load = f"import pickle; call = pickle.load(open({str(folder / 'work')!r}, 'rb'))"
    jobs = [runs.start(before=f"{load}; call({rank}); raise SystemExit") for rank in range(world_size)]
    assert ended(jobs, timeout=120) == [0] * world_size, [job.stderr for job in jobs]
    return [torch.load(f"{folder / 'out'}.{rank}", weights_only=False) for rank in range(world_size)]


def numpy_batch_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
    """Batch norm over the whole batch in float64, first in training and then in evaluation, and its gradients for dy."""
    count, axes, shape = x.size // x.shape[1], (0, 2, 3), (1, -1, 1, 1)
    x, weight, bias, dy = (values.astype(np.float64) for values in (x, weight, bias, dy))
    mean, variance = x.mean(axes), x.var(axes)
    normalised = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + 1e-5)
    found = {"weight.grad": (dy * normalised).sum(axes), "bias.grad": dy.sum(axes), "deviation": np.sqrt(variance)}
    found["y"] = normalised * weight.reshape(shape) + bias.reshape(shape)
    inner = dy - (found["bias.grad"].reshape(shape) + normalised * found["weight.grad"].reshape(shape)) / count
    found["dx"] = inner * (weight / np.sqrt(variance + 1e-5)).reshape(shape)
    found["running_mean"] = 0.1 * mean
    found["running_var"] = 0.9 + 0.1 * variance * count / (count - 1)
    scale = weight / np.sqrt(found["running_var"] + 1e-5)
    found["eval"] = (x - found["running_mean"].reshape(shape)) * scale.reshape(shape) + bias.reshape(shape)
    return found


def batch_norm_inputs(dtype: torch.dtype, offset: float) -> tuple[Tensor, nn.BatchNorm2d, Tensor]:
    """A batch whose channels lie around `offset`, the plain layer, and the gradient of its output. The layer is float32
    for half precision, as under autocast."""
    norm = nn.BatchNorm2d(4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = offset + 2 * torch.randn(8, 4, 3, 3, dtype=torch.float64)
    return x.to(dtype), norm.double() if dtype == torch.float64 else norm, torch.randn(8, 4, 3, 3).to(dtype)


def on_two(runs: Zygote, x: Tensor, norm: nn.BatchNorm2d, dy: Tensor, folder: Path) -> list[dict[str, Tensor]]:
    """What each of two processes finds for every second image of the batch."""

    def work(group: Group) -> dict[str, Tensor]:
        net = synchronise_batch_norm(nn.Sequential(nn.Sequential(norm)), torch.device("cpu"))
        share = x[group.rank :: group.world_size].clone().requires_grad_()
        y = net(share)
        y.backward(dy[group.rank :: group.world_size])
        assert share.grad is not None
        found = {"y": y.detach(), "dx": share.grad}
        for name, p in net.named_parameters():
            assert p.grad is not None
            dist.all_reduce(p.grad)
            found[name.removeprefix("0.0.") + ".grad"] = p.grad
        found |= {name.removeprefix("0.0."): value for name, value in net.state_dict().items()}
        net.eval()
        return found | {"eval": net(x).detach()}

    return on_processes(runs, work, folder)


def test_batch_norm_over_two_processes_equals_numpys_over_the_whole_batch(runs: Zygote, tmp_path: Path) -> None:
    x, norm, dy = batch_norm_inputs(torch.float64, 5)
    expected = numpy_batch_norm(*(t.detach().numpy() for t in (x, norm.weight, norm.bias, dy)))
    for rank, found in enumerate(on_two(runs, x, norm, dy, tmp_path)):
        assert found.keys() == norm.state_dict().keys() | expected.keys() - {"deviation"}
        assert found["num_batches_tracked"] == 0  # the network counts
        for name in expected.keys() - {"deviation"}:
            part = slice(rank, None, 2) if name in ("y", "dx") else slice(None)
            assert found[name].dtype == torch.float64
            np.testing.assert_allclose(found[name].numpy(), expected[name][part], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "offset"), [(torch.float64, 1e8), (torch.float32, 1e4), (torch.bfloat16, 5), (torch.float16, 5)]
)
def test_batch_norm_over_two_processes_rounds_no_more_than_its_sums_must(
    runs: Zygote, dtype: torch.dtype, offset: float, tmp_path: Path
) -> None:
    """The mean of n values around `offset` may round by n units of the largest, and every value is normalised around it.
    A variance from the sum of the squares would round by offset squared; half precision counts in float32."""
    x, norm, dy = batch_norm_inputs(dtype, offset)
    expected = numpy_batch_norm(*(t.detach().double().numpy() for t in (x, norm.weight, norm.bias, dy)))
    count = x.numel() // x.shape[1]
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    weight, bias = (p.detach().abs().max().item() for p in (norm.weight, norm.bias))
    largest = x.abs().max().item() / expected["deviation"].min() * weight
    bound = (count + 10) * unit * (largest + np.abs(expected["y"]).max() + bias)
    for rank, found in enumerate(on_two(runs, x, norm, dy, tmp_path)):
        y = expected["y"][rank::2]
        assert found["y"].dtype == dtype
        own = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0  # the result is rounded once more
        print(f"largest {np.abs(found['y'].double().numpy() - y).max():.1e}, bound {bound:.1e}")
        np.testing.assert_allclose(found["y"].double().numpy(), y, rtol=own, atol=bound)


def test_with_sync_bn_the_state_counts_the_steps(runs: Zygote, quick_config: Config, tmp_path: Path) -> None:
    noise = {"data.name": "synthetic", "data.synthetic_count": 64, "train.batch_size": 16, "train.eval_batch_size": 16}
    config = changed(quick_config, {**noise, "data.backend": "torch", "train.sync_bn": True, "train.ema_decay": 0.9})

    def work(group: Group) -> dict[str, Any]:
        data = random_dataset(32, 10, 64)
        seed_everything(0)
        trainer = Trainer(config, data, prepare(device="cpu", compile="off"), BackendChoice("torch", "test"), group)
        assert sum(isinstance(part, HostSyncBatchNorm) for part in trainer.net.modules()) == 8
        trainer.train_epoch(0, OneCycle(0.1, 0.01, 5, 4), StepMeter(0, 4, torch.device("cpu")))
        state = trainer.state()
        trainer.close()
        return state

    for state in on_processes(runs, work, tmp_path):
        for part in ("model", "ema"):
            counters = [value for name, value in state[part].items() if name.endswith("num_batches_tracked")]
            assert len(counters) == 8 and all(counter == 4 for counter in counters)


def test_every_option_leaves_two_processes_with_the_same_weights(
    runs: Zygote, quick_config: Config, tmp_path: Path
) -> None:
    noise = {"data.name": "synthetic", "data.synthetic_count": 64, "train.batch_size": 16, "train.eval_batch_size": 16}
    config = changed(quick_config, {**noise, **EVERYTHING, "data.backend": "torch", "train.sync_bn": True})

    def work(group: Group) -> dict[str, Any]:
        data = random_dataset(32, 10, 64)
        seed_everything(0)
        trainer = Trainer(config, data, prepare(device="cpu", compile="off"), BackendChoice("torch", "test"), group)
        trainer.train_epoch(0, OneCycle(0.1, 0.01, 5, 4), StepMeter(0, 4, torch.device("cpu")))
        state = trainer.state()
        trainer.close()
        return state

    one, other = on_processes(runs, work, tmp_path)
    assert_same(one, other)
    scales = [value for name, value in one["model"].items() if name.endswith((".1.weight", ".2.weight"))]
    assert len(scales) == 8 and all(torch.equal(scale, torch.ones_like(scale)) for scale in scales)


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


def test_a_failure_on_one_process_stops_all_of_them_and_is_told_once(runs: Zygote, tmp_path: Path) -> None:
    first, second = on_processes(runs, _failing, tmp_path)
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
    monkeypatch.delenv(STEP_VARIABLE, raising=False)
    assert time_limit(STEP_VARIABLE, STEP_SECONDS).total_seconds() == 60
    monkeypatch.setenv(STEP_VARIABLE, "45")
    assert time_limit(STEP_VARIABLE, STEP_SECONDS).total_seconds() == 45
    for text in ("soon", "-1", "nan", "inf"):
        monkeypatch.setenv(STEP_VARIABLE, text)
        with pytest.raises(GroupError, match=f"{STEP_VARIABLE}={text}"):
            time_limit(STEP_VARIABLE, STEP_SECONDS)
    monkeypatch.setenv(STEP_VARIABLE, "4")
    assert time_limit(STEP_VARIABLE, STEP_SECONDS, least=4).total_seconds() == 4
    monkeypatch.setenv(STEP_VARIABLE, "3.9")
    with pytest.raises(GroupError, match=f"{STEP_VARIABLE}=3.9: expected a number of seconds of at least 4"):
        time_limit(STEP_VARIABLE, STEP_SECONDS, least=4)


def test_a_time_limit_of_steps_within_which_beats_may_be_missed_is_refused(
    runs: Zygote, noise: Config, tmp_path: Path
) -> None:
    """A beat a second, read once a second, may be two seconds old, and a process is lost after half the limit."""
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    limits = {STEP_VARIABLE: "1", "TRAIN_PHASE_TIMEOUT": "1"}
    code, out, err = runs.run("--config", written(noise, tmp_path), env=variables | limits)
    assert (code, out) == (2, "")
    assert one_line(err) == f"error: {STEP_VARIABLE}=1: expected a number of seconds of at least 4"


def test_a_lost_connection_is_told_from_other_errors() -> None:
    assert is_lost(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"))
    assert is_lost(dist.DistNetworkError("The client socket has timed out"))
    assert not is_lost(RuntimeError("shape mismatch")) and not is_lost(ValueError("gloo"))


# --- whole runs


@pytest.fixture(scope="module")
def noise() -> Config:
    """Ten steps on random images."""
    return changed(
        Config(),
        QUICK
        | {
            "data.name": "synthetic",
            "data.synthetic_count": 640,
            "data.synthetic_classes": 4,
            "data.backend": "torch",
            "augment.flip": True,
            "net.width": 4,
            "train.batch_size": 64,
            "train.eval_batch_size": 50,
            "train.epochs": 1,
            "train.ema_decay": 0.9,
            "schedule.lr_max": 0.002,
            "schedule.lr_min": 0.0004,
            "schedule.peak_epoch": 0.5,
            "run.checkpoint_every": 3,
        },
    )


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


def at(place: str, action: str, number: int = 1) -> str:
    """Code that makes a process do something at its pass of that number (from 1) of a named place."""
    return f"""
import os, signal, time, torch
from train.failpoints import arm

def act(count):
    if count == {number}:
        {action}

arm({place!r}, act)
"""


def ended(jobs: list[Job], timeout: float = 60) -> list[int]:
    end = time.monotonic() + timeout
    return [job.wait(max(end - time.monotonic(), 1)) for job in jobs]


# Rounding may turn the decision of a max-pooling or a ReLU, and the runs part: in float32 by up to 5e-3 in the losses of
# ten steps at a rate of 0.002. In float64 it grows from 1e-16 to 1e-14; an epoch here takes some 1e7 decisions between
# values of about 1, so it turns one with a probability of about 1e-7, whatever the seed.
IN_FLOAT64 = "from float64 import train_in_float64; train_in_float64()"
LOSS = {"rel": 2 * torch.finfo(torch.float32).eps}  # kept in float32: each half is rounded, and so is their mean
WEIGHT = {"rtol": 1e-9, "atol": 1e-9}


def losses_of(folder: Path) -> list[float]:
    """Of every step but the last: previous.pt is saved before it."""
    losses = load_checkpoint(folder / "previous.pt")["step_losses"]
    assert len(losses) == 9
    return list(losses)


def test_two_processes_with_sync_bn_train_as_one_does_in_float64(runs: Zygote, noise: Config, tmp_path: Path) -> None:
    recipe = written(changed(noise, {"train.sync_bn": True}), tmp_path)
    jobs = [runs.start("--config", recipe, f"run.dir={tmp_path / 'one'}", before=IN_FLOAT64)]
    jobs += together(
        runs, "--config", recipe, f"run.dir={tmp_path / 'two'}", before=dict.fromkeys(range(2), IN_FLOAT64)
    )
    assert ended(jobs) == [0, 0, 0], jobs[1].stderr
    # the first process alone speaks; torch 2.8 lets gloo write to stdout
    assert all(line.startswith("[Gloo]") for line in jobs[2].stdout.splitlines())
    assert jobs[1].stdout.count("epoch 1/1: lr") == 1
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), **LOSS)
    whole, parts = (load_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    for name in ("train_loss", "test_loss", "ema_test_loss"):
        assert parts["metrics"][0][name] == pytest.approx(whole["metrics"][0][name], **LOSS)
    for name in ("train_accuracy", "test_accuracy", "ema_test_accuracy"):
        assert parts["metrics"][0][name] == whole["metrics"][0][name]
    for part in ("model", "ema"):
        assert whole[part].keys() == parts[part].keys()
        for name, value in whole[part].items():
            assert value.dtype in (torch.float64, torch.int64)
            torch.testing.assert_close(parts[part][name], value, **WEIGHT)


def test_one_process_then_two_then_one_train_as_one_does_throughout_in_float64(
    runs: Zygote, noise: Config, tmp_path: Path
) -> None:
    recipe = written(changed(noise, {"train.sync_bn": True, "run.checkpoint_every": 1}), tmp_path)

    def stopped_after(steps: int) -> str:
        return IN_FLOAT64 + at("step", "signal.raise_signal(signal.SIGTERM)", steps)

    whole = runs.start("--config", recipe, f"run.dir={tmp_path / 'whole'}", before=IN_FLOAT64)
    parts = ("--config", recipe, f"run.dir={tmp_path / 'parts'}")
    assert ended([runs.start(*parts, before=stopped_after(3))]) == [143]
    two = together(runs, *parts, "--resume", before={0: stopped_after(4), 1: IN_FLOAT64})
    assert ended(two) == [143, 143], two[0].stderr
    assert "processes 1 -> 2" in two[0].stdout
    assert load_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 3 + 4
    last = runs.start(*parts, "--resume", before=IN_FLOAT64)
    assert ended([whole, last]) == [0, 0], last.stderr
    (a,), (b,) = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "whole"), **LOSS)
    for name in ("train_loss", "test_loss", "ema_test_loss"):
        assert b[name] == pytest.approx(a[name], **LOSS)
    for name in ("lr", "train_accuracy", "test_accuracy", "ema_test_accuracy"):
        assert b[name] == a[name]
    model, expected = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("parts", "whole"))
    for name, value in expected.items():
        torch.testing.assert_close(model[name], value, **WEIGHT)


def test_in_float32_two_processes_with_sync_bn_round_the_first_loss_as_one_does(
    runs: Zygote, noise: Config, tmp_path: Path
) -> None:
    """The first loss is a continuous function of weights that are the same; the later ones are not."""
    config = changed(
        noise, {"train.sync_bn": True, "train.channels_last": "off"}
    )  # contiguous, torch's own batch norm rounds least
    dataset = random_dataset(classes=4, count=640)

    def begun(group: Group) -> tuple[Trainer, Tensor, Tensor]:
        seed_everything(config.train.seed)
        runtime = prepare(device="cpu", precision="fp32", compile="off", channels_last="off")
        trainer = Trainer(config, dataset, runtime, BackendChoice("torch", "test"), group)
        return trainer, *next(trainer.train_loader.epoch(0))

    def loss_of_share(group: Group) -> Any:
        trainer, images, labels = begun(group)
        return trainer.step(images, labels)[0].item()

    two = sum(on_processes(runs, loss_of_share, tmp_path)) / 2
    with torch.no_grad():
        trainer, images, labels = begun(Group())
        logits = trainer.train_step.logits(images)
        mean, std = (
            torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (dataset.mean, dataset.std)
        )
        exact = trainer.net.double()((images - mean) / std)
    # an image's cross-entropy moves at most twice as far as its logits; sums in another order may round twice as much
    bound = 2 * 2 * (logits - exact).abs().amax(1).mean().item()
    difference = abs(two - float(F.cross_entropy(exact, labels)))
    print(f"difference {difference:.1e}, bound {bound:.1e}")
    assert difference <= bound < 1e-4


def test_two_processes_without_sync_bn_equal_batch_norm_over_each_half(
    noise: Config, runs: Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference: one process, plain torch, whose loss is the mean over the two halves of each batch. In float64."""
    noise = changed(noise, {"train.ema_decay": 0.0})
    recipe = written(noise, tmp_path)
    jobs = together(runs, "--config", recipe, f"run.dir={tmp_path / 'two'}", before=dict.fromkeys(range(2), IN_FLOAT64))
    assert ended(jobs) == [0, 0], jobs[0].stderr
    train_in_float64(monkeypatch.setattr)
    dataset = random_dataset(classes=4, count=640)
    seed_everything(noise.train.seed)
    trainer = Trainer(noise, dataset, prepare(device="cpu", compile="off"), BackendChoice("torch", "test"))
    rates = OneCycle(0.002, 0.0004, 5.0, 10)
    losses = []
    norm = trainer.net.prep[1]
    for step, (images, labels) in enumerate(trainer.train_loader.epoch(0)):
        statistics = []
        total = torch.zeros((), dtype=torch.float64)
        before = norm.running_mean.clone()
        for half in range(2):
            norm.running_mean = before.clone()
            total = total + trainer.train_step(images[half::2], labels[half::2])[0] / 2
            statistics.append(norm.running_mean)
        norm.running_mean = sum(statistics) / 2
        losses.append(total.item())
        trainer.optimizers.set_rate(rates(step))
        trainer.optimizers.zero_grad()
        total.backward()
        trainer.optimizers.step(trainer.scaler)
    assert losses_of(tmp_path / "two") == pytest.approx(losses[:9], **LOSS)
    last = load_checkpoint(tmp_path / "two" / "last.pt")
    torch.testing.assert_close(last["model"]["prep.1.running_mean"], norm.running_mean, **WEIGHT)
    for name, p in trainer.net.named_parameters():
        torch.testing.assert_close(last["model"][name], p.detach(), **WEIGHT)
    # the figures are those of the checkpoint, not of each process's own statistics
    trainer.net.load_state_dict(last["model"])
    loader = EvalLoader(dataset.test, batch_size=50, device=torch.device("cpu"), backend="torch")
    (score,) = evaluate(EvalStep(trainer.net, dataset.mean, dataset.std), loader).scores
    assert (score.count, score.accuracy) == (128, last["test_accuracy"])
    assert last["metrics"][0]["test_loss"] == pytest.approx(score.loss, rel=1e-9)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all_and_the_run_resumes_to_the_same_bits(
    runs: Zygote, noise: Config, tmp_path: Path, rank: int
) -> None:
    recipe = written(noise, tmp_path)
    words = ["--config", recipe, "run.checkpoint_every=epoch"]
    stop = {rank: at("step", "signal.raise_signal(signal.SIGTERM)", 5)}
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


def test_what_torchrun_restarts_takes_no_earlier_run_for_its_own(runs: Zygote, noise: Config, tmp_path: Path) -> None:
    """Its first start may have failed before it wrote anything: what lies there then is somebody else's."""
    recipe, restart = written(noise, tmp_path), {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}
    here = f"import os; os.chdir({str(tmp_path)!r})"
    earlier = tmp_path / "runs" / recipe.stem
    # a torchrun has another process as its parent, or another id
    code, _, err = runs.run("--config", recipe, before=here, env=restart | {"TORCHELASTIC_RUN_ID": "earlier"})
    assert code == 0, err
    before = (earlier / "last.pt").read_bytes()
    code, out, err = runs.run("--config", recipe, f"run.dir={earlier}", before=here, env=restart)
    assert code == 2 and "already holds a run" in one_line(err) and (earlier / "last.pt").read_bytes() == before
    code, out, err = runs.run("--config", recipe, before=here, env=restart)
    assert code == 0 and "resumed" not in out and (earlier / "last.pt").read_bytes() == before, err
    assert (tmp_path / "runs" / f"{recipe.stem}-2" / "summary.json").exists()
    code, out, err = runs.run("--config", recipe, f"run.dir={earlier}", "--overwrite", before=here, env=restart)
    assert code == 0 and "resumed" not in out and "epoch 1/1: lr" in out, err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_no_number_on_one_process_is_told_once_and_ends_all(
    runs: Zygote, noise: Config, tmp_path: Path, rank: int
) -> None:
    recipe = written(noise, tmp_path)
    function = "torch.nn.functional.cross_entropy"
    nan = at("step", f"whole = {function}; {function} = lambda *a, **k: whole(*a, **k) * torch.nan", 5)
    jobs = together(runs, "--config", recipe, f"run.dir={tmp_path / 'run'}", before={rank: nan})
    assert ended(jobs) == [3, 3]
    assert "epoch 1, step 4" in jobs[0].stderr and "training images" in jobs[0].stderr
    assert jobs[1].stderr == ""
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3


def test_data_that_dali_cannot_take_on_one_process_go_through_torch_on_all(
    runs: Zygote, noise: Config, tmp_path: Path
) -> None:
    if choose_backend("auto", torch.device("cpu")).name != "dali":
        pytest.skip("needs DALI")
    recipe = written(changed(noise, {"data.backend": "auto"}), tmp_path)
    refuse = (
        "import dali_pipeline.loader as l\nfrom dali_pipeline.dali_graph import Unsupported\n"
        "def no(*a, **k): raise Unsupported('too large here')\nl.GRAPHS['dali'] = no"
    )
    for rank in (0, 1):
        run = tmp_path / f"run-{rank}"
        jobs = together(runs, "--config", recipe, f"run.dir={run}", before={rank: refuse})
        assert ended(jobs, timeout=60) == [0, 0], jobs[0].stderr
        assert "WARNING: pipeline: torch (torch on cpu: too large here)" in jobs[0].stdout
        assert json.loads((run / "environment.json").read_text())["backend"] == "torch"


def test_what_one_process_cannot_do_is_one_error_and_no_wait(runs: Zygote, noise: Config, tmp_path: Path) -> None:
    recipe = written(noise, tmp_path)
    run = f"run.dir={tmp_path / 'run'}"
    no_backend = at("machine", "from dali_pipeline.backend import BackendError; raise BackendError('no pipeline here')")
    no_save = at("save", "from train.step.meter import NonFiniteLoss; raise NonFiniteLoss(0, 0, 1.0)")
    recipe.with_name("cifar.yaml").write_text("train: {device: cpu}\n")  # no key of another data set stands in it
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
        config = recipe.with_name("cifar.yaml") if "data.name=cifar10" in words else recipe
        jobs = together(runs, "--config", config, *words, before=before)
        assert ended(jobs, timeout=30) == codes, [job.stderr for job in jobs]
        errors = [job.stderr.strip() for job in jobs]
        assert [bool(error) for error in errors] == [code != 1 for code in codes]
        assert text in errors[codes.index(max(codes))]


WILD = ("schedule.find_start=1e3", "schedule.find_end=1e6")
FOUND = """
import train.run
from train.step.range_test import Suggestion
train.run.suggest = lambda test: Suggestion(0.01, 0.001, 0.005)
"""
FULL = """
import errno
from train.disk.folder import RunFolder
write = RunFolder.write_json

def full(self, name, content):
    if name == "summary.json":
        raise OSError(errno.ENOSPC, "No space left on device", name)
    write(self, name, content)

RunFolder.write_json = full
"""


@pytest.mark.parametrize(
    ("words", "before", "codes", "text"),
    [
        (WILD, "", [2, 1], "the range test diverged after"),
        (("schedule.lr_min=0.5",), FOUND, [2, 1], "schedule.lr_min: 0.5 is above the lr_max found, 0.01"),
        (("schedule.lr_max=0.002",), FULL, [1, 1], "summary.json: No space left on device"),
    ],
)
def test_what_a_range_test_or_the_end_of_a_run_meets_is_told_once(
    runs: Zygote, noise: Config, tmp_path: Path, words: tuple[str, ...], before: str, codes: list[int], text: str
) -> None:
    searching = written(changed(noise, {"schedule.lr_max": "find", "schedule.find_steps": 20}), tmp_path)
    run = f"run.dir={tmp_path / 'run'}"
    jobs = together(runs, "--config", searching, run, *words, before=dict.fromkeys(range(2), before))
    assert ended(jobs) == codes, [job.stderr for job in jobs]
    assert text in one_line(jobs[0].stderr) and jobs[1].stderr == ""


def test_a_bad_recipe_is_told_by_one_process_of_a_machine(runs: Zygote, noise: Config, tmp_path: Path) -> None:
    jobs = together(runs, "--config", written(noise, tmp_path), "train.epochs=none")
    assert ended(jobs) == [2, 2]
    assert "train.epochs" in jobs[0].stderr and jobs[1].stderr == ""


def test_processes_of_different_recipes_options_or_data_are_refused_with_what_differs(
    runs: Zygote, noise: Config, tmp_path: Path
) -> None:
    recipe = written(noise, tmp_path)
    run = f"run.dir={tmp_path / 'run'}"
    source = at("machine", "pass") + "import train.agreement as a; a.versions = lambda: {'torch': '1.0'}\n"
    data = """
import dali_pipeline.sources as sources
load = sources.load

def other(*arguments, **options):
    dataset = load(*arguments, **options)
    dataset.train.pixels[0] ^= 1
    return dataset

sources.load = other
"""
    cases: list[tuple[list[str], str, list[str]]] = [
        (
            ["optim.momentum=0.5", "train.seed=3"],
            "",
            ["optim.momentum: 0.9 for process 0", "0.5 for process 1", "train.seed"],
        ),
        (["run.checkpoint_every=4"], "", ["run.checkpoint_every: 3 for process 0"]),
        (["--resume"], "", ["--resume: False for process 0"]),
        ([], source, ["the version of torch", "1.0 for process 1"]),
        ([], data, ["have read different data", "the train split: 640 images, SHA-256"]),
    ]
    for words, before, expected in cases:
        port = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        jobs = [
            runs.start(
                "--config", recipe, run, *more, before=code, env={**port, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank, more, code in ((0, [], ""), (1, words, before))
        ]
        assert ended(jobs) == [2, 2], [job.stderr for job in jobs]
        line = one_line(jobs[0].stderr)
        assert all(text in line for text in expected) and f"process 1 on {HOST}" in line, line
        assert jobs[1].stderr == ""
        assert not (tmp_path / "run" / "last.pt").exists()


# The session's look at a machine alone, on which `found` says what there is; what it says and has chosen goes to standard output.
LOOK = """
import sys
from train.config import load_config
from train.errors import explained
from train.screen.log import Log
from train.session import Session

with explained(Log(), out_of_memory="") as outcome:
    with Session(load_config(sys.argv[1], sys.argv[2:])) as session:
        print("chosen:", session.runtime.precision, session.runtime.compile_mode)
if outcome.code:
    sys.exit(outcome.code)
"""


def machine(device: str, precision: str) -> str:
    """Code for a process on such a device, whose own precision is that one. Nothing is computed on it."""
    return f"""
import torch, train.session as session
from dataclasses import replace
prepare = session.prepare

def found(*, precision, **asked):
    chosen = {precision!r} if precision == "auto" else precision
    runtime = replace(prepare(precision="fp32", **asked), device=torch.device({device!r}), precision=chosen)
    return runtime.saying(f"precision: {{chosen}} (found)")

session.prepare = found
"""


def looked(runs: Zygote, config: Config, folder: Path, *before: str) -> list[Job]:
    """Processes on such machines, which look at them and end."""
    (folder / "look.py").write_text(LOOK)
    env = {"WORLD_SIZE": str(len(before)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        runs.start(
            written(config, folder),
            script=folder / "look.py",
            before=code,
            env={"RANK": str(rank), "LOCAL_RANK": str(rank), **env},
        )
        for rank, code in enumerate(before)
    ]


def chosen(jobs: list[Job]) -> list[str]:
    assert ended(jobs) == [0] * len(jobs), [job.stderr for job in jobs]
    return [job.stdout.strip().splitlines()[-1].removeprefix("chosen: ") for job in jobs]


@pytest.mark.parametrize(
    ("device", "precisions", "common", "unit"),
    [
        ("cuda", ("bf16", "fp16"), "fp16", "GPU"),
        ("cuda", ("bf16", "bf16"), "bf16", None),
        ("cpu", ("bf16", "fp32"), "fp32", "CPU"),
    ],
)
def test_all_processes_take_the_precision_that_each_of_them_can(
    runs: Zygote, noise: Config, tmp_path: Path, device: str, precisions: tuple[str, ...], common: str, unit: str | None
) -> None:
    config = changed(noise, {"train.precision": "auto", "train.device": "auto"})
    jobs = looked(runs, config, tmp_path, *(machine(device, precision) for precision in precisions))
    assert chosen(jobs) == [f"{common} None"] * 2
    said = f"precision: {common} (another process's {unit} does not compute bf16)"
    assert (said in jobs[0].stdout) == (unit is not None)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("without", [0, 1])
def test_where_one_process_has_no_compiler_none_compiles_and_the_cause_is_named(
    runs: Zygote, noise: Config, tmp_path: Path, device: str, without: int
) -> None:
    def compiling(rank: int) -> str:
        answer = (False, "no g++ here") if rank == without else (True, "g++ found")
        return f"import train.machine.runtime as r; r.find_compiler = lambda device: {answer}\n" + machine(
            device, "fp32"
        )

    config = changed(noise, {"train.compile": "auto", "train.device": "auto"})
    jobs = looked(runs, config, tmp_path, compiling(0), compiling(1))
    assert chosen(jobs) == ["fp32 None"] * 2
    who = f"process 1 on {HOST}: " if without else ""
    *_, last = (line for line in jobs[0].stdout.splitlines() if "compile: " in line)
    assert last == f"WARNING: compile: off ({who}no g++ here; training runs uncompiled, slower)"


def test_processes_on_different_devices_are_refused(runs: Zygote, noise: Config, tmp_path: Path) -> None:
    config = changed(noise, {"train.device": "auto"})
    jobs = looked(runs, config, tmp_path, machine("cuda", "fp32"), machine("cpu", "fp32"))
    assert ended(jobs) == [2, 2], [job.stderr for job in jobs]
    line = one_line(jobs[0].stderr)
    assert f"train.device=auto: cuda for process 0 on {HOST}, cpu for process 1 on {HOST}" in line
    assert jobs[1].stderr == ""


def test_processes_may_differ_in_where_their_data_lie_and_what_the_first_one_alone_writes(
    runs: Zygote, noise: Config, tmp_path: Path
) -> None:
    recipe, port = written(noise, tmp_path), str(free_port())
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    jobs = [
        runs.start(
            *("--config", recipe, f"run.dir={tmp_path / str(rank)}", f"data.root={tmp_path / str(rank)}"),
            env={**env, "RANK": str(rank), "LOCAL_RANK": "0"},  # as on two machines
        )
        for rank in range(2)
    ]
    assert ended(jobs) == [0, 0], [job.stderr for job in jobs]
    assert (tmp_path / "0" / "last.pt").exists() and not (tmp_path / "1").exists()


def test_a_name_that_does_not_resolve_is_told_at_once(runs: Zygote, noise: Config, tmp_path: Path) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"}
    code, out, err = runs.run("--config", written(noise, tmp_path), f"run.dir={tmp_path / 'run'}", env=variables)
    assert (code, out) == (2, "")
    assert one_line(err).startswith(f"error: MASTER_ADDR=nowhere.invalid: process 1 on {HOST} cannot resolve the name")


@pytest.mark.slow
@pytest.mark.parametrize("sync_bn", ["false", "true"])
def test_a_compiler_that_fails_on_one_process_is_off_on_all(
    runs: Zygote, noise: Config, tmp_path: Path, sync_bn: str
) -> None:
    """Also where that takes longer than the limit of steps, and a layer in the step adds up over the processes."""
    one = "import time, torch, train.machine.runtime as r, torch._dynamo.exc as e\n"
    one += "r.find_compiler = lambda device: (True, 'g++ found')\n"
    one += "import train.machine.weighing as w; w.COLD_SECONDS = 0.0\n"  # it pays, for so few steps too
    one += "torch.compile = lambda function, **_: function\n"  # the pipeline's
    fail = """
def compile(self, **_):
    def call(*_, **__):
        time.sleep(5)
        raise e.BackendCompilerFailed(lambda: None, RuntimeError("g++ crashed"), None)
    self._compiled_call_impl = call
torch.nn.Module.compile = compile
"""
    fine = "torch.nn.Module.compile = lambda self, **_: None\n"
    jobs = together(
        runs,
        *("--config", written(noise, tmp_path), f"run.dir={tmp_path / 'run'}", "train.compile=auto"),
        f"train.sync_bn={sync_bn}",
        before={0: one + fine, 1: one + fail},
        XDG_CACHE_HOME=str(tmp_path),
        **{STEP_VARIABLE: "4"},
    )
    assert ended(jobs) == [0, 0], jobs[0].stderr
    assert "WARNING: compile: off (torch.compile failed" in jobs[0].stdout


def test_with_sync_bn_processes_whose_clocks_ask_for_other_numbers_of_steps_weigh_without_waiting(
    runs: Zygote, noise: Config, tmp_path: Path
) -> None:
    """A first step that takes a second is enough for one of them; the other one takes five."""
    found = "import train.machine.runtime as r; r.find_compiler = lambda device: (True, 'g++ found')\n"
    slow = at("step", "end = time.thread_time() + 1.1\n        while time.thread_time() < end: pass")
    jobs = together(
        runs,
        *("--config", written(noise, tmp_path), f"run.dir={tmp_path / 'run'}", "train.compile=auto"),
        "train.sync_bn=true",
        before={0: found, 1: found + slow},
        XDG_CACHE_HOME=str(tmp_path),
        **{STEP_VARIABLE: "4"},
    )
    assert ended(jobs) == [0, 0], jobs[0].stderr + jobs[1].stderr
    assert "compile: off (weighed: " in jobs[0].stdout


@pytest.mark.slow
def test_what_processes_have_compiled_each_by_itself_exchanges_afterwards_and_is_compiled_once(
    runs: Zygote, noise: Config, tmp_path: Path
) -> None:
    config = changed(noise, {"train.sync_bn": True, "train.ema_decay": 0.0})

    def graphs() -> int:
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"])

    def work(group: Group) -> tuple[int, int, dict[str, list[Any]]]:
        compile = torch.compile
        torch.compile = lambda function, **_: compile(function, backend="eager", dynamic=False)
        found: dict[str, list[Any]] = {}
        for mode in (None, "default"):
            runtime = replace(prepare(device="cpu", precision="fp32", compile="off"), compile_mode=mode)
            seed_everything(0)
            data = random_dataset(classes=4, count=640)
            trainer = Trainer(config, data, runtime, BackendChoice("torch", "test"), group)
            if mode is not None:
                if group.rank == 0:  # the first one compiles alone: an exchange would wait for the other
                    trainer.warm_up()
                group.gather(None)
                if group.rank == 1:
                    trainer.warm_up()
            compiled = graphs()
            trainer.step.train()
            batches = trainer.train_loader.epoch(0)
            losses = [trainer.train_one(*next(batches), 0.01)[0].item() for _ in range(2)]
            found[str(mode)] = [losses, {name: b.clone() for name, b in trainer.net.named_buffers()}]
            trainer.close()
        return compiled, graphs(), found

    one, other = on_processes(runs, work, tmp_path)
    for before, after, found in (one, other):
        assert 0 < before == after
        assert_same(found["default"], found["None"])
    assert_same(one[2]["default"][1], other[2]["default"][1])


@pytest.mark.parametrize("deterministic", ["false", "true"])
@pytest.mark.parametrize(("first", "second", "compiles"), [(1e-9, 1e9, False), (1e9, 1e-9, True)])
def test_all_processes_compile_or_none_as_the_first_one_weighs(
    runs: Zygote, noise: Config, tmp_path: Path, first: float, second: float, compiles: bool, deterministic: str
) -> None:
    def seeing(seconds: float) -> str:
        """Code for a process whose compiler does nothing but say so, and whose steps take so long, or would."""
        return f"""
import torch, train.machine.runtime as r, train.machine.weighing as w
w.EAGER_FLOPS_PER_SECOND = {1e12 / seconds}
from train.step.trainer import Trainer
r.find_compiler = lambda device: (True, "g++ found")
torch.nn.Module.compile = lambda self, **_: print("compiling", type(self).__name__, flush=True)
torch.compile = lambda function, **_: function
Trainer.step_seconds = lambda self: {seconds}
"""

    jobs = together(
        runs,
        *("--config", written(noise, tmp_path), f"run.dir={tmp_path / 'run'}", "train.compile=auto"),
        f"train.deterministic={deterministic}",
        before={0: seeing(first), 1: seeing(second)},
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert ended(jobs) == [0, 0], jobs[0].stderr + jobs[1].stderr
    assert ["compiling TrainStep" in job.stdout for job in jobs] == [compiles, compiles]
    assert load_checkpoint(tmp_path / "run" / "last.pt")["machine"]["compile"] == ("default" if compiles else "off")


def test_two_processes_measure_the_test_set_by_both_checkpoints_as_one_would(
    runs: Zygote, noise: Config, tmp_path: Path
) -> None:
    falling = """
from dataclasses import replace
from train.step.trainer import Trainer
evaluate, right = Trainer.evaluate, iter((2, 1))

def falling(self, *rest):
    correct = next(right)
    return {measure: replace(score, correct=correct) for measure, score in evaluate(self, *rest).items()}

Trainer.evaluate = falling
"""
    words = ("data.validation=100", "train.epochs=2", f"run.dir={tmp_path / 'run'}")
    jobs = together(runs, "--config", written(noise, tmp_path), *words, before={0: falling, 1: falling})
    assert ended(jobs) == [0, 0], jobs[0].stderr + jobs[1].stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best_epoch"] == 1 and summary["chosen_on"] == "validation"
    for name in ("best", "last"):
        network = analysis.load(tmp_path / "run", checkpoint=name)
        test = network.dataset.test
        by_one = 100 * float(np.mean(network.predict(test.images).labels == test.labels))
        one_image = 100 / len(test)
        assert summary["test"][f"{name}.pt"]["accuracy"] == pytest.approx(by_one, abs=1.01 * one_image)


# --- what is waited for: such a wait takes seconds, so all of them run side by side

NOW = 'print("now", flush=True); '
LATE = NOW + "time.sleep(60)"
STOPPED = NOW + "os.kill(os.getpid(), signal.SIGSTOP)"
KILLED = NOW + "os.kill(os.getpid(), signal.SIGKILL)"
UNDER_TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


@dataclass(frozen=True)
class Fault:
    """What befalls the process of that rank: Python code that it runs first; the words and variables of both."""

    rank: int
    code: str
    words: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


FAULTS = {
    **{
        f"stopped in {place}, {rank}": Fault(
            rank, at(place, STOPPED, number), variables={"TRAIN_DISTRIBUTED_TIMEOUT": "12"}
        )
        for place, number in (("load", 1), ("step", 4))
        for rank in (0, 1)
    },
    "late in load": Fault(0, at("load", LATE), variables={"TRAIN_PHASE_TIMEOUT": "3"}),
    "late in step": Fault(0, at("step", LATE), variables={"TRAIN_DISTRIBUTED_TIMEOUT": "4"}),
    **{f"killed, {rank}": Fault(rank, at("step", KILLED, 8)) for rank in (0, 1)},
    **{
        " ".join(["killed under torchrun", *words]): Fault(
            1, at("step", KILLED, 8), words, UNDER_TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "0"}
        )
        for words in ((), ("--overwrite",))
    },
}


@dataclass(frozen=True)
class Faulty:
    """Two processes, by rank, to one of which that has happened; what they were started with, and the folder of their run."""

    jobs: list[Job]
    words: tuple[str | Path, ...]
    run: Path


@pytest.fixture(scope="module")
def faulty(runs: Zygote, noise: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Faulty]]:
    """By the names of FAULTS. Each pair starts when the one before it has come to its fault, so that no start is slow."""
    started: dict[str, Faulty] = {}
    try:
        for name, fault in FAULTS.items():
            folder = tmp_path_factory.mktemp("faulty")
            words = ("--config", written(noise, folder), f"run.dir={folder / 'run'}", *fault.words)
            jobs = together(runs, *words, before={fault.rank: fault.code}, **fault.variables)
            started[name] = Faulty(jobs, words, folder / "run")
            jobs[fault.rank].until("now")
        yield started
    finally:
        for name, pair in started.items():
            if not name.startswith("killed"):
                pair.jobs[FAULTS[name].rank].kill(signal.SIGKILL)
                pair.jobs[FAULTS[name].rank].wait()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_and_leaves_a_good_checkpoint(
    runs: Zygote, faulty: dict[str, Faulty], rank: int
) -> None:
    pair = faulty[f"killed, {rank}"]
    codes = ended(pair.jobs, timeout=60)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    error = pair.jobs[1 - rank].stderr.strip().splitlines()
    lost = f"process {rank} on {HOST} (silent" if rank else "the store at 127.0.0.1"  # which process 0 held
    assert error[-1].startswith(f"error: process {1 - rank} on {HOST} lost {lost}"), error
    assert "while training" in error[-1] and "Traceback" not in "".join(error)
    assert load_checkpoint(pair.run / "last.pt")["step"] == 6
    jobs = together(runs, *pair.words, "--resume")
    assert ended(jobs) == [0, 0], jobs[0].stderr


@pytest.mark.parametrize("more", ["", " --overwrite"])
def test_what_torchrun_restarts_goes_on_where_it_ended(runs: Zygote, faulty: dict[str, Faulty], more: str) -> None:
    pair = faulty[f"killed under torchrun{more}"]
    assert ended(pair.jobs) == [1, -signal.SIGKILL]
    jobs = together(runs, *pair.words, **UNDER_TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1"})
    assert ended(jobs) == [0, 0], jobs[0].stderr
    assert f"resumed from {pair.run} at epoch 0, step 6" in jobs[0].stdout


@pytest.mark.parametrize("place", ["load", "step"])
def test_the_others_wait_for_one_that_is_late_no_longer_than_the_limit(faulty: dict[str, Faulty], place: str) -> None:
    """It is late and not lost: its threads go on. In a phase the longer limit counts, elsewhere that of steps."""
    other = faulty[f"late in {place}"].jobs[1]
    assert other.wait(timeout=50) == 1
    doing = "loading the data" if place == "load" else "training"
    assert f"there are still process 0 on {HOST} {doing} while {doing}" in other.stderr


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", ["load", "step"])
def test_a_process_that_stands_still_is_lost_to_the_others_whatever_they_wait_in(
    faulty: dict[str, Faulty], place: str, rank: int
) -> None:
    """Stopped, it keeps its connections, as a machine does that a cut link has taken away."""
    other = faulty[f"stopped in {place}, {rank}"].jobs[1 - rank]
    assert other.wait(timeout=60) == 1
    lost = f"process {rank} on {HOST} (silent for" if rank else "the store at 127.0.0.1"
    line = other.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: process {1 - rank} on {HOST} lost {lost}"), other.stderr
    assert f"while {'loading the data' if place == 'load' else 'training'}" in line


def test_a_process_that_never_comes_is_waited_for_no_longer_than_the_limit(
    runs: Zygote, noise: Config, tmp_path: Path
) -> None:
    port = str(free_port())
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = ("--config", written(noise, tmp_path), f"run.dir={tmp_path / 'run'}")
    code, _, err = runs.run(*words, env={**variables, "TRAIN_PHASE_TIMEOUT": "1"})
    line = err.strip().splitlines()[-1]
    assert code == 2 and f"MASTER_PORT={port}: process 0 on {HOST} has not come together" in line, err


# --- torchrun itself


# each step after the first twenty, an epoch, takes a second
SLOWLY = """
import sys, time
from train.__main__ import main
from train.failpoints import arm

arm("step", lambda count: time.sleep(1 if count > 20 else 0))
sys.exit(main())
"""


def torchrun(script: Path, *words: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", str(free_port())]
    return subprocess.Popen(
        [*command, script, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


@pytest.mark.slow
def test_what_a_killed_torchrun_leaves_behind_saves_and_ends_and_the_next_one_resumes_and_passes_sigterm_on(
    runs: Zygote, noise: Config, tmp_path: Path
) -> None:
    more = {"train.epochs": 10, "data.synthetic_count": 1280, "run.checkpoint_every": "epoch"}
    run, script = tmp_path / "run", tmp_path / "slowly.py"
    script.write_text(SLOWLY)
    words = ("--config", written(changed(noise, more), tmp_path), f"run.dir={run}")

    def epochs() -> int:
        metrics = run / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    killed = torchrun(script, *words)
    eventually(lambda: epochs() > 0, 120)
    killed.kill()
    out, err = killed.communicate(timeout=60)  # ends when its processes, which hold its streams, have ended
    assert "torchrun, which started this process, is gone" in err
    assert "SIGTERM: stopped after a whole step" in out, err
    before = load_checkpoint(run / "last.pt")
    assert before["epoch"] == 1

    first = torchrun(script, *words, "--resume")
    eventually(lambda: epochs() > 1, 120)
    begun = time.monotonic()
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=60)
    assert first.returncode != 0 and time.monotonic() - begun < 60
    assert f"resumed from {run} at epoch 1, step {before['step']}" in out, err
    assert "SIGTERM: stopped after a whole step" in out, err
    assert load_checkpoint(run / "last.pt")["epoch"] == 2

    jobs = together(runs, *words, "--resume")
    assert ended(jobs) == [0, 0], jobs[0].stderr
    assert jobs[0].stdout.count("epoch 10/10: lr") == 1
    assert len(read_metrics(run / "metrics.jsonl")) == 10
