"""Training on a CUDA device: no synchronisation, the CPU's results, fp16 with its scaler, CUDA graphs, determinism."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from options import EVERYTHING
from torch import Tensor
from training import Lines, assert_equal_weights, make_trainer, weights
from whole_runs import Arm, equal

import analysis
from train.config import Config, changed
from train.disk.checkpoint import load_checkpoint
from train.disk.folder import read_metrics
from train.failpoints import disarm
from train.machine.process import process_as_found
from train.machine.signals import Interrupted
from train.run import fit
from train.step.meter import NonFiniteLoss, StepMeter
from train.step.schedule import OneCycle
from train.step.trainer import Trainer

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda_config(quick_config: Config) -> Config:
    return changed(quick_config, {"train.device": "cuda", "train.precision": "bf16", "net.width": 8, "train.epochs": 4})


@pytest.mark.parametrize("backend", ["dali", "torch"])
@pytest.mark.parametrize("compile", ["off", "default"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_step_waits_for_the_device(cuda_config: Config, backend: str, compile: str, precision: str) -> None:
    asked = {"data.backend": backend, "train.compile": compile, "train.precision": precision, "train.ema_decay": 0.9}
    trainer = make_trainer(changed(cuda_config, asked))
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
    asked = {"train.compile": mode, "train.precision": precision, "train.tta": True, "train.ema_decay": 0.9}
    fit(changed(cuda_config, asked), tmp_path / "run", log=Lines())
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert metrics[-1]["train_loss"] < 0.6 * metrics[0]["train_loss"]
    assert metrics[-1]["test_accuracy"] > 60


@pytest.mark.parametrize("mode", ["off", "default", "reduce-overhead"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_learns_with_every_option(cuda_config: Config, tmp_path: Path, mode: str, precision: str) -> None:
    asked = {**EVERYTHING, "augment.flip": False, "train.compile": mode, "train.precision": precision}
    fit(changed(cuda_config, asked), tmp_path / "run", log=Lines())
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert metrics[-1]["train_loss"] < 0.6 * metrics[0]["train_loss"]
    assert metrics[-1]["test_accuracy"] > 60


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_what_was_captured_measures_the_test_set_of_both_checkpoints_at_the_end(
    cuda_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    original, right = Trainer.evaluate, iter((4, 3, 2, 1))

    def falling(self: Trainer, *rest: Any) -> Any:
        correct = next(right)
        return {m: replace(score, correct=correct) for m, score in original(self, *rest).items()}

    monkeypatch.setattr(Trainer, "evaluate", falling)
    asked = {"train.compile": mode, "data.validation": 200, "train.tta": True, "train.ema_decay": 0.9}
    summary = fit(changed(cuda_config, asked), tmp_path / "run", log=Lines())
    assert summary["best_epoch"] == 1
    for name in ("best", "last"):
        network = analysis.load(tmp_path / "run", checkpoint=name, device="cuda")
        again = network.evaluate()  # uncompiled
        some = 100 * 5 / len(network.dataset.test)  # images that rounding may turn over
        assert summary["test"][f"{name}.pt"]["accuracy"] == pytest.approx(again["test"], abs=some)
    assert summary["last_ema_test_tta_accuracy"] == pytest.approx(again["ema_test_tta"], abs=some)


@pytest.fixture
def without_tf32() -> Iterator[Callable[[], None]]:
    """Has products in fp32 computed in fp32, until a trainer is made or starts over."""

    def exactly() -> None:
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")

    with process_as_found():
        yield exactly


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "every option"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_captured_steps_go_where_single_ones_go(
    cuda_config: Config, precision: str, options: dict[str, Any], without_tf32: Callable[[], None]
) -> None:
    """From the same weights over the same batches at changing rates; then again from a state that was loaded, and anew."""
    bound = 0.02 if precision == "fp32" and not options else 0.2  # Muon's products are in bf16
    asked = {**options, "train.precision": precision, "train.compile": "off"}
    single, captured = (make_trainer(changed(cuda_config, {**asked, "train.step_graph": how})) for how in ("off", "on"))
    without_tf32()
    for trainer in (single, captured):
        trainer.warm_up()
    assert single.captured is None and captured.captured is not None
    rates = (0.01, 0.05, 0.1, 0.02, 0.0)

    def go(trainer: Trainer) -> tuple[list[float], Tensor, Tensor]:
        """The losses, the weights, and how far they went."""
        before = flat(trainer)
        trainer.step.train()
        batches = zip(trainer.train_loader.epoch(0), rates, strict=False)
        losses = [float(trainer.train_one(images, labels, rate)[0]) for (images, labels), rate in batches]
        return losses, flat(trainer), (flat(trainer) - before).norm()

    def flat(trainer: Trainer) -> Tensor:
        return torch.cat([p.detach().flatten() for p in trainer.net.parameters()])

    for again in (None, "loaded", "anew"):
        if again == "loaded":
            captured.load_state(copy.deepcopy(single.state()))
        if again == "anew":
            for trainer in (single, captured):
                trainer.start_over(7)
            without_tf32()
        (losses, weights, way), (theirs, others, _) = go(single), go(captured)
        assert theirs == pytest.approx(losses, rel=bound), again
        assert way > 0 and (weights - others).norm() < bound * way, again
    for trainer in (single, captured):
        trainer.close()


def test_two_graphs_are_compiled_and_none_after_the_warm_up(cuda_config: Config, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    trainer = make_trainer(changed(cuda_config, {"train.compile": "default"}))
    trainer.warm_up()
    before = counters["stats"]["unique_graphs"]
    schedule = OneCycle(0.05, 0.001, 10, trainer.total_steps)
    for epoch in range(2):
        trainer.train_epoch(epoch, schedule, StepMeter(epoch, trainer.steps_per_epoch, trainer.runtime.device))
        trainer.evaluate()
    assert counters["stats"]["unique_graphs"] == before
    trainer.close()


def test_fp32_first_epoch_follows_the_cpu(cuda_config: Config, tmp_path: Path) -> None:
    slow = {"schedule.lr_max": 0.005, "schedule.lr_min": 0.001, "schedule.peak_epoch": 0.5}
    exact = {"train.precision": "fp32", "train.deterministic": True, "train.epochs": 1}
    try:
        for device in ("cpu", "cuda"):
            fit(changed(cuda_config, {**slow, **exact, "train.device": device}), tmp_path / device, log=Lines())
    finally:
        torch.use_deterministic_algorithms(False)
    cpu, cuda = (read_metrics(tmp_path / device / "metrics.jsonl")[0] for device in ("cpu", "cuda"))
    assert cuda["train_loss"] == pytest.approx(cpu["train_loss"], rel=2e-2)


def test_deterministic_mode_gives_the_same_bits_twice(cuda_config: Config, tmp_path: Path) -> None:
    config = changed(cuda_config, {"train.deterministic": True})
    try:
        for name in ("a", "b"):
            fit(config, tmp_path / name, log=Lines())
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal_weights(weights(tmp_path / "a" / "last.pt"), weights(tmp_path / "b" / "last.pt"))


@pytest.mark.parametrize("mode", ["off", "default"])
def test_a_deterministic_run_that_is_interrupted_ends_with_the_bits_of_the_whole_one(
    cuda_config: Config, tmp_path: Path, arm: Arm, mode: str
) -> None:
    config = changed(cuda_config, {"train.deterministic": True, "train.compile": mode, "train.ema_decay": 0.9})
    try:
        fit(config, tmp_path / "whole", log=Lines())
        arm("step", lambda count: signal.raise_signal(signal.SIGINT) if count == 15 else None)
        with pytest.raises(Interrupted):
            fit(config, tmp_path / "parts", log=Lines())
        disarm()
        assert load_checkpoint(tmp_path / "parts" / "last.pt")["step"] > 0  # in the middle of an epoch
        fit(config, tmp_path / "parts", log=Lines(), resume=True)
    finally:
        torch.use_deterministic_algorithms(False)
    whole, parts = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    for part in ("model", "ema", "optimizer"):
        assert equal(whole[part], parts[part])


def test_a_run_made_on_the_gpu_loads_on_the_cpu(cuda_config: Config, tmp_path: Path) -> None:
    fit(cuda_config, tmp_path / "run", log=Lines())
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(value.device.type == "cpu" for value in state["model"].values())


def test_non_finite_loss_is_noticed_by_the_asynchronous_meter() -> None:
    device = torch.device("cuda")
    meter = StepMeter(0, 8, device, poll_seconds=0.0)
    for step in range(8):
        meter.record(
            step, torch.tensor(float("nan") if step == 5 else 1.0, device=device), torch.tensor(1, device=device)
        )
    with pytest.raises(NonFiniteLoss) as caught:
        meter.finish(8)
    assert caught.value.step == 5
