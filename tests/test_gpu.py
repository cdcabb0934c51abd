"""Training on a CUDA device: no synchronisation, the CPU's results, fp16 with its scaler, CUDA graphs, determinism."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_fit import Lines, assert_equal_weights, weights

from dali_pipeline.datasets import load
from dali_pipeline.loader import choose_backend
from train.checkpoint import load_checkpoint
from train.config import Config
from train.fit import fit
from train.optim import OneCycle
from train.progress import StepMeter
from train.record import read_metrics
from train.runtime import prepare
from train.trainer import Trainer

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda_config(quick_config: Config) -> Config:
    quick_config.train.device = "cuda"
    quick_config.train.precision = "bf16"
    quick_config.net.width = 8
    quick_config.train.epochs = 4
    return quick_config


def make_trainer(config: Config) -> Trainer:
    torch.manual_seed(0)
    train = config.train
    runtime = prepare(device=train.device, precision=train.precision, compile=train.compile)
    backend = choose_backend(config.data.backend, runtime.device)
    return Trainer(config, load("digits", Path("unused")), runtime, backend)


@pytest.mark.parametrize("backend", ["dali", "torch"])
@pytest.mark.parametrize("compile", ["off", "default"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_step_waits_for_the_device(cuda_config: Config, backend: str, compile: str, precision: str) -> None:
    cuda_config.data.backend, cuda_config.train.compile = backend, compile  # type: ignore[assignment]
    cuda_config.train.precision, cuda_config.train.ema_decay = precision, 0.9  # type: ignore[assignment]
    trainer = make_trainer(cuda_config)
    trainer.warm_up()
    schedule = OneCycle(0.05, 0.001, 10, trainer.total_steps)
    meters = [StepMeter(epoch, trainer.steps_per_epoch, trainer.runtime.device) for epoch in range(2)]
    trainer.train_epoch(0, schedule, meters[0])  # the first update of the average copies
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        trainer.train_epoch(1, schedule, meters[1], after_step=lambda done: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    meters[1].finish(trainer.steps_per_epoch)
    assert meters[1].means(cuda_config.train.batch_size)[0] < 2.5
    trainer.close()


def test_batches_reach_the_network_channels_last(cuda_config: Config) -> None:
    trainer = make_trainer(cuda_config)
    images, labels = next(trainer.train_loader.epoch(0))
    assert images.is_cuda and labels.is_cuda and images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    seen = []
    for layer in (trainer.net.layer1, trainer.net.layer3):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    trainer.train_one(images, labels, 0.0)
    assert seen and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert trainer.net.layer3[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    trainer.close()


@pytest.mark.parametrize("mode", ["off", "default", "reduce-overhead"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_learns_in_every_precision_and_mode(
    cuda_config: Config, tmp_path: Path, mode: str, precision: str
) -> None:
    cuda_config.train.compile, cuda_config.train.precision = mode, precision  # type: ignore[assignment]
    cuda_config.train.tta, cuda_config.train.ema_decay = True, 0.9
    fit(cuda_config, tmp_path / "run", log=Lines())
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert metrics[-1]["train_loss"] < 0.6 * metrics[0]["train_loss"]
    assert metrics[-1]["test_accuracy"] > 60


def test_two_graphs_are_compiled_and_none_after_the_warm_up(cuda_config: Config, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    cuda_config.train.compile = "default"
    trainer = make_trainer(cuda_config)
    trainer.warm_up()
    before = counters["stats"]["unique_graphs"]
    schedule = OneCycle(0.05, 0.001, 10, trainer.total_steps)
    for epoch in range(2):
        trainer.train_epoch(epoch, schedule, StepMeter(epoch, trainer.steps_per_epoch, trainer.runtime.device))
        trainer.evaluate()
    assert counters["stats"]["unique_graphs"] == before
    trainer.close()


def test_fp32_first_epoch_follows_the_cpu(cuda_config: Config, tmp_path: Path) -> None:
    cuda_config.train.precision, cuda_config.train.deterministic, cuda_config.train.epochs = "fp32", True, 1
    cuda_config.schedule.lr_max, cuda_config.schedule.lr_min, cuda_config.schedule.peak_epoch = 0.005, 0.001, 0.5
    try:
        for device in ("cpu", "cuda"):
            config = copy.deepcopy(cuda_config)
            config.train.device = device  # type: ignore[assignment]
            fit(config, tmp_path / device, log=Lines())
    finally:
        torch.use_deterministic_algorithms(False)
    cpu, cuda = (read_metrics(tmp_path / device / "metrics.jsonl")[0] for device in ("cpu", "cuda"))
    assert cuda["train_loss"] == pytest.approx(cpu["train_loss"], rel=2e-2)


def test_deterministic_mode_gives_the_same_bits_twice(cuda_config: Config, tmp_path: Path) -> None:
    cuda_config.train.deterministic = True
    try:
        for name in ("a", "b"):
            fit(copy.deepcopy(cuda_config), tmp_path / name, log=Lines())
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal_weights(weights(tmp_path / "a" / "last.pt"), weights(tmp_path / "b" / "last.pt"))


def test_a_run_made_on_the_gpu_loads_on_the_cpu(cuda_config: Config, tmp_path: Path) -> None:
    fit(cuda_config, tmp_path / "run", log=Lines())
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(value.device.type == "cpu" for value in state["model"].values())


def test_non_finite_loss_is_noticed_by_the_asynchronous_meter() -> None:
    from train.progress import NonFiniteLoss

    device = torch.device("cuda")
    meter = StepMeter(0, 8, device, poll_seconds=0.0)
    for step in range(8):
        meter.record(
            step, torch.tensor(float("nan") if step == 5 else 1.0, device=device), torch.tensor(1, device=device)
        )
    with pytest.raises(NonFiniteLoss) as caught:
        meter.finish(8)
    assert caught.value.step == 5
