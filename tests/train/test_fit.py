"""Whole runs on the digits: what is written, what is printed, and that nothing is lost or changed on the way."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from places import ROOT
from torch import Tensor
from training import Lines, assert_equal_weights, make_trainer, needs_compiler, traced_only, weights
from whole_runs import Arm, Stop, Trained, equal, one_line, stop_before
from zygote import Zygote

from dali_pipeline import dali_graph, sources
from dali_pipeline.backend import BackendChoice, BackendError
from dali_pipeline.loader import EvalLoader
from train.config import Config, ConfigError, changed, load_config, to_dict, to_yaml
from train.disk.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from train.disk.folder import RunFolder, RunFolderError, default_run_dir, read_metrics
from train.disk.resume import differences
from train.failpoints import disarm
from train.machine import runtime
from train.machine.runtime import RuntimeUnavailable, prepare
from train.run import find_rates_only, fit
from train.screen.notice import long_run_advice
from train.screen.progress import duration
from train.session import Session
from train.step.evaluation import evaluate
from train.step.meter import NonFiniteLoss, StepMeter
from train.step.range_test import RangeTestError
from train.step.schedule import OneCycle
from train.step.steps import EvalStep
from train.step.trainer import Trainer

FIND = {"schedule.lr_max": "find", "schedule.lr_min": "find"}
TORCH = BackendChoice("torch", "test")


def test_a_run_writes_its_folder_and_says_what_happened(quick_config: Config, tmp_path: Path) -> None:
    log = Lines()
    summary = fit(quick_config, tmp_path / "run", log=log)
    run = tmp_path / "run"
    names = {p.name for p in run.iterdir()} - {".lock"}
    assert names == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "last.pt",
        "best.pt",
        "previous.pt",
    }
    metrics = read_metrics(run / "metrics.jsonl")
    assert [m["epoch"] for m in metrics] == [1, 2]
    for m in metrics:
        assert {
            "lr",
            "train_loss",
            "train_accuracy",
            "test_loss",
            "test_accuracy",
            "seconds",
            "images_per_second",
        } <= m.keys()
        assert 0 <= m["test_accuracy"] <= 100 and 0 <= m["train_accuracy"] <= 100
        assert m["images_per_second"] * m["seconds"] == pytest.approx(11 * 128)
    assert metrics[-1]["lr"] == pytest.approx(0.002)
    assert load_config(run / "config.yaml") == quick_config
    environment = json.loads((run / "environment.json").read_text())
    assert environment["device"] == "cpu" and environment["versions"]["torch"] == torch.__version__
    assert environment["backend"] in ("dali", "torch") and environment["backend_reason"]
    correct = round(metrics[-1]["test_accuracy"] * 355 / 100)
    assert (
        f"test: loss {metrics[-1]['test_loss']:.4f}, accuracy {correct}/355 ({metrics[-1]['test_accuracy']:.2f}%)"
        in log.lines
    )
    assert summary["best_accuracy"] == max(m["test_accuracy"] for m in metrics)
    for words in (
        "test accuracy  ",
        "chosen on the test set itself",
        "set-up",
        "compile",
        "LR search",
        "training",
        "evaluation",
        "images/s",
        "peak memory",
        str(run),
    ):
        assert words in log.text
    assert f"python -m analysis {run}" in log.text


def test_checkpoint_holds_the_accuracy_that_it_reports(quick_config: Config, trained: Trained) -> None:
    dataset = sources.load(quick_config.data)
    for name in ("last.pt", "best.pt"):
        state = load_checkpoint(trained(quick_config) / name)
        assert not any("_orig_mod" in key for key in state["model"])
        trainer = make_trainer(quick_config, TORCH)
        trainer.net.load_state_dict(state["model"])
        loader = EvalLoader(dataset.test, batch_size=64, device=torch.device("cpu"), backend="torch")
        (score,) = evaluate(EvalStep(trainer.net, state["mean"], state["std"]), loader).scores
        assert score.accuracy == state["test_accuracy"]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    quick_config: Config, trained: Trained, tmp_path: Path
) -> None:
    for seed in (0, 1):
        fit(changed(quick_config, {"train.seed": seed}), tmp_path / str(seed), log=Lines())
    a, b, c = (weights(run / "last.pt") for run in (trained(quick_config), tmp_path / "0", tmp_path / "1"))
    assert_equal_weights(a, b)
    assert not torch.equal(a["prep.0.weight"], c["prep.0.weight"])


def test_dali_and_torch_pipelines_train_the_same_network(quick_config: Config, trained: Trained) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    dali, torchs = (trained(changed(quick_config, {"data.backend": backend})) for backend in ("dali", "torch"))
    for run, backend in ((dali, "dali"), (torchs, "torch")):
        assert json.loads((run / "environment.json").read_text())["backend"] == backend
    assert_equal_weights(weights(dali / "last.pt"), weights(torchs / "last.pt"))


@pytest.mark.parametrize("steps", [1, 5, 11, 14, 21])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    quick_config: Config, trained: Trained, tmp_path: Path, arm: Arm, steps: int
) -> None:
    config = changed(quick_config, {"train.ema_decay": 0.9, "train.tail": "endless", "run.checkpoint_every": 1})
    arm("step", stop_before(steps + 1))
    with pytest.raises(Stop):
        fit(config, tmp_path / "parts", log=Lines())
    disarm()
    fit(config, tmp_path / "parts", log=Lines(), resume=True)
    a, b = load_checkpoint(trained(config) / "last.pt"), load_checkpoint(tmp_path / "parts" / "last.pt")
    assert_equal_weights(a["model"], b["model"])
    assert_equal_weights(a["ema"], b["ema"])
    assert a["optimizer"]["sgd"]["state"]
    for index, entry in a["optimizer"]["sgd"]["state"].items():
        assert torch.equal(entry["momentum_buffer"], b["optimizer"]["sgd"]["state"][index]["momentum_buffer"])
    for x, y in zip(a["metrics"], b["metrics"], strict=True):
        exact = [key for key in x if "second" not in key]
        assert {key: x[key] for key in exact} == {key: y[key] for key in exact}


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_run_resumed_where_auto_is_another_precision_goes_on_in_its_own(
    quick_config: Config, tmp_path: Path, arm: Arm, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    config = changed(quick_config, {"train.precision": "auto", "run.checkpoint_every": 1})
    fit(changed(config, {"train.precision": before}), tmp_path / "whole", log=Lines())

    def on_a_machine_of(precision: str) -> None:
        monkeypatch.setattr(runtime, "bf16_units", lambda: "amx_bf16" if precision == "bf16" else None)

    on_a_machine_of(before)
    arm("step", stop_before(14))
    with pytest.raises(Stop):
        fit(config, tmp_path / "parts", log=Lines())
    disarm()
    on_a_machine_of(after)
    log = Lines()
    fit(config, tmp_path / "parts", log=log, resume=True)
    assert f"precision: {before} (as the run began)" in log.lines and "other conditions" not in log.text
    recorded = json.loads((tmp_path / "parts" / "environment.json").read_text())
    assert recorded["precision"] == before and f"precision: {before} (as the run began)" in recorded["notes"]
    assert_equal_weights(weights(tmp_path / "whole" / "last.pt"), weights(tmp_path / "parts" / "last.pt"))


def test_resume_under_another_recipe_names_the_keys_and_both_values(
    quick_config: Config, trained: Trained, tmp_path: Path
) -> None:
    shutil.copytree(trained(quick_config), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"optim\.momentum: 0\.9 -> 0\.8"):
        fit(changed(quick_config, {"optim.momentum": 0.8}), tmp_path / "run", log=Lines(), resume=True)
    longer = changed(quick_config, {"train.epochs": 3})
    with pytest.raises(ConfigError, match="needs --extend"):
        fit(longer, tmp_path / "run", log=Lines(), resume=True)
    summary = fit(longer, tmp_path / "run", log=Lines(), resume=True, extend=True)
    assert summary["epochs"] == 3 and len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3


def test_differences_pass_over_paths_and_found_rates() -> None:
    old = {"schedule": {"lr_max": 0.3}, "run": {"dir": "a"}, "net": {"width": 16}}
    new = {"schedule": {"lr_max": "find"}, "run": {"dir": "b"}, "net": {"width": 64}}
    assert differences(old, new) == ["net.width: 16 -> 64"]


def test_a_key_that_an_earlier_version_did_not_write_counts_as_its_default(quick_config: Config) -> None:
    new = to_dict(quick_config)
    old = {section: dict(keys) for section, keys in new.items()}
    del old["optim"]["class_weights"], old["train"]["ema_every"]
    assert differences(old, new) == []
    balanced = to_dict(changed(quick_config, {"optim.class_weights": "balanced"}))
    assert differences(old, balanced) == ["optim.class_weights: none -> balanced"]


def test_differences_name_no_key_that_comes_and_goes_with_the_data_set(quick_config: Config) -> None:
    digits = to_dict(quick_config)
    noise = to_dict(changed(quick_config, {"data.name": "synthetic", "data.synthetic_size": 64}))
    all_keys = {**digits, "data": {**noise["data"], "name": "digits"}}
    assert differences(all_keys, digits) == differences(noise, noise) == []
    assert differences(digits, noise) == differences(all_keys, noise) == ["data.name: digits -> synthetic"]
    assert differences(noise, digits) == ["data.name: synthetic -> digits"]
    larger = {**noise, "data": {**noise["data"], "synthetic_size": 96}}
    assert differences(noise, larger) == ["data.synthetic_size: 64 -> 96"]


def test_a_checkpoint_that_holds_the_keys_of_all_data_sets_resumes(
    quick_config: Config, trained: Trained, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained(quick_config), run)
    state = load_checkpoint(run / "last.pt")
    del state["format"]
    state["config"]["data"] |= {"synthetic_size": 64, "synthetic_classes": 10, "synthetic_count": 50000}
    save_checkpoint(run / "last.pt", state)
    (run / "config.yaml").write_text(yaml.safe_dump(state["config"]))
    log = Lines()
    longer = load_config(run / "config.yaml", ["train.epochs=3"], say=log)
    assert fit(longer, run, log=log, resume=True, extend=True)["epochs"] == 3
    notes = [line for line in log.lines if "left out, as data.name=digits has no such keys: data.synthetic" in line]
    assert len(notes) == 2 and notes[1].startswith("note: the checkpoint's recipe: ")
    for recorded in (load_checkpoint(run / "last.pt")["config"], yaml.safe_load((run / "config.yaml").read_text())):
        assert recorded["data"] == to_dict(quick_config)["data"]


def test_an_existing_run_is_not_overwritten_by_accident(quick_config: Config, trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained(quick_config), tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(RunFolderError, match=r"--resume.*--overwrite"):
        fit(quick_config, tmp_path / "run", log=Lines())
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    shorter = changed(quick_config, {"train.epochs": 1, "schedule.peak_epoch": 0.5})
    fit(shorter, tmp_path / "run", log=Lines(), overwrite=True)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_nothing_to_resume_and_a_second_writer_are_refused(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="nothing to resume"):
        RunFolder(tmp_path / "empty", resume=True)
    assert not (tmp_path / "empty").exists()
    first = RunFolder(tmp_path / "run")
    code, _, err = runs.run("--config", recipe, f"run.dir={tmp_path / 'run'}")
    assert code == 2 and "is writing here" in one_line(err)
    first.close()
    assert not (tmp_path / "run").exists()  # nothing was written in it


def test_default_folder_is_numbered_and_resume_takes_the_newest(tmp_path: Path) -> None:
    assert default_run_dir("a.b", False, tmp_path) == tmp_path / "a.b"
    (tmp_path / "a.b").mkdir()
    assert default_run_dir("a.b", False, tmp_path) == tmp_path / "a.b-2"
    (tmp_path / "a.b-2").mkdir()
    assert default_run_dir("a.b", False, tmp_path) == tmp_path / "a.b-3"
    assert default_run_dir("a.b", True, tmp_path) == tmp_path / "a.b-2"


def test_non_finite_loss_stops_with_the_step_and_keeps_the_last_good_checkpoint(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.train_one
    steps = 0

    def poisoned(self: Trainer, images: Tensor, labels: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        nonlocal steps
        steps += 1
        loss, correct = original(self, images, labels, rate)
        return (loss * math.nan if steps == 11 + 4 else loss), correct

    monkeypatch.setattr(Trainer, "train_one", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"epoch 2, step 3.*images"):
        fit(quick_config, tmp_path / "run", log=Lines())
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_meter_finds_the_first_bad_step() -> None:
    meter = StepMeter(epoch=4, steps=10, device=torch.device("cpu"))
    for step in range(6):
        meter.record(step, torch.tensor(math.inf if step >= 3 else 1.0), torch.tensor(step))
    assert meter.poll(3) and meter.means(10) == (1.0, 10.0)
    with pytest.raises(NonFiniteLoss) as caught:
        meter.poll(6)
    assert (caught.value.epoch, caught.value.step) == (4, 3)


def test_batch_larger_than_the_data_is_refused_before_training(quick_config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than the 1442 training images"):
        fit(changed(quick_config, {"train.batch_size": 5000}), tmp_path / "run", log=Lines())
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_is_refused_without_importing_torch() -> None:
    code = "import sys, train.__main__ as m\n"
    code += "c = m.main(['--config', 'configs/onecycle.yaml', 'train.batch_size=50001', 'data.root=/nowhere'])\n"
    code += "assert c == 2 and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "50001 is more than the 50000 training images of cifar10" in one_line(done.stderr)


def test_ema_and_tta_are_reported_beside_the_plain_figure(quick_config: Config, tmp_path: Path) -> None:
    log = Lines()
    fit(changed(quick_config, {"train.ema_decay": 0.95, "train.tta": True}), tmp_path / "run", log=log)
    first, *_, last = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {"test_accuracy", "test_tta_accuracy", "ema_test_accuracy", "ema_test_tta_accuracy"} <= last.keys()
    assert "test, EMA and flip TTA: loss" in log.text
    # the views are looked at once, after the last epoch
    assert {key for key in last if "tta" not in key} == first.keys()


@pytest.mark.parametrize("validation", [None, 200])
def test_a_finished_run_is_measured_by_the_views_that_it_is_resumed_with(
    quick_config: Config, trained: Trained, tmp_path: Path, validation: int | None
) -> None:
    config = changed(quick_config, {"data.validation": validation})
    with_views = changed(config, {"train.tta": "shift"})
    run, whole = tmp_path / "run", trained(with_views)
    shutil.copytree(trained(config), run)
    log = Lines()
    summary = fit(with_views, run, log=log, resume=True)
    assert {key for key in summary if "tta" in key or "shift" in key} == {
        "last_test_tta_accuracy",
        "last_test_shift_accuracy",
    }
    at_once = read_metrics(whole / "metrics.jsonl")
    for metrics in (read_metrics(run / "metrics.jsonl"), load_checkpoint(run / "last.pt")["metrics"]):
        for line, expected in zip(metrics, at_once, strict=True):
            assert line.keys() == expected.keys()
            assert all(line[key] == expected[key] for key in line if key.endswith(("accuracy", "loss")))
    assert (
        json.loads((whole / "summary.json").read_text())["last_test_shift_accuracy"]
        == summary["last_test_shift_accuracy"]
    )
    # they are measured once
    before = (run / "last.pt").read_bytes()
    fit(with_views, run, log=log, resume=True)
    assert (run / "last.pt").read_bytes() == before
    # a run that is trained on keeps those of the epoch that was its last
    fit(changed(with_views, {"train.epochs": 3}), run, log=log, resume=True, extend=True)
    split = "test" if validation is None else "validation"
    had = [f"{split}_shift_accuracy" in line for line in read_metrics(run / "metrics.jsonl")]
    assert had == [False, True, True]


def test_ema_is_the_running_average_of_the_weights(quick_config: Config) -> None:
    trainer = make_trainer(changed(quick_config, {"train.ema_decay": 0.8, "train.ema_every": 2}), TORCH)
    names = ("classifier.weight", "prep.1.running_var", "prep.1.num_batches_tracked")
    seen: list[dict[str, Tensor]] = []

    def look(done: int) -> None:
        state = trainer.net.state_dict()
        seen.append({name: state[name].clone() for name in names})

    meter = StepMeter(0, trainer.steps_per_epoch, torch.device("cpu"))
    trainer.train_epoch(0, OneCycle(0.1, 0.01, 5, trainer.total_steps), meter, after_step=look)
    assert trainer.ema is not None
    average = trainer.ema.module.state_dict()
    for name in names[:2]:
        expected = seen[1][name]
        for state in seen[3::2]:
            expected = 0.8 * expected + 0.2 * state[name]
        torch.testing.assert_close(average[name], expected)
    assert average[names[2]] == seen[1::2][-1][names[2]] > 0


def test_tensorboard_gets_every_figure_or_is_refused_at_once(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(quick_config, {"run.tensorboard": True})
    with monkeypatch.context() as patch, pytest.raises(RuntimeUnavailable, match=r"pip install -e '\.\[tensorboard\]'"):
        patch.setattr("importlib.util.find_spec", lambda name: None)
        fit(config, tmp_path / "refused", log=Lines())
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    fit(config, tmp_path / "run", log=Lines())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    expected = [m["test_accuracy"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert [e.value for e in events.Scalars("test_accuracy")] == pytest.approx(expected)


def test_the_range_test_alone_writes_the_curve_and_no_checkpoint(quick_config: Config, tmp_path: Path) -> None:
    config = changed(quick_config, {"net.width": 4, "schedule.find_steps": 40})
    rates = find_rates_only(config, tmp_path / "lr", log=Lines())
    assert 1e-4 < rates.lr_min < rates.lr_max < 10
    assert (tmp_path / "lr" / "lr_finder.csv").exists() and not (tmp_path / "lr" / "last.pt").exists()


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


def test_found_rates_are_written_into_the_recipe_of_the_run(quick_config: Config, tmp_path: Path) -> None:
    config = changed(quick_config, {"net.width": 4, **FIND, "schedule.find_steps": 40})
    fit(config, tmp_path / "run", log=Lines())
    written = load_config(tmp_path / "run" / "config.yaml")
    assert isinstance(written.schedule.lr_max, float) and isinstance(written.schedule.lr_min, float)
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert metrics[-1]["lr"] == pytest.approx(written.schedule.lr_min)


def test_a_range_test_that_finds_nothing_spoils_no_run_and_locks_no_folder(
    quick_config: Config, trained: Trained, tmp_path: Path
) -> None:
    search = {"schedule.find_start": 1e8, "schedule.find_end": 1e30, "schedule.find_steps": 20}
    config = changed(quick_config, {**FIND, **search})
    with pytest.raises(RangeTestError, match=r"set schedule\.lr_max"):
        fit(config, tmp_path / "run", log=Lines())
    assert (tmp_path / "run" / "lr_finder.csv").exists()  # it shows why
    shutil.copytree(trained(quick_config), tmp_path / "run", dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(RangeTestError):
        fit(config, tmp_path / "run", log=Lines(), overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before
    with pytest.raises(RunFolderError, match="already holds a run"):
        find_rates_only(quick_config, tmp_path / "run", log=Lines())


def test_data_that_dali_cannot_take_go_to_torch_under_auto_and_are_refused_on_request(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    monkeypatch.setattr(dali_graph, "MAX_STRIP_BYTES", 100 * 32 * 32 * 3)
    config = changed(quick_config, {"train.batch_size": 61})
    with pytest.raises(BackendError, match="take a batch size divisible by 8"):
        fit(changed(config, {"data.backend": "dali"}), tmp_path / "refused", log=Lines())
    log = Lines()
    fit(changed(config, {"data.backend": "auto"}), tmp_path / "run", log=log)
    assert "WARNING: pipeline: torch" in log.text
    record = json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))
    assert record["backend"] == "torch" and "divisible by 8" in record["backend_reason"]


def test_a_checkpoint_of_another_device_keeps_this_ones_kernels_and_scaler(quick_config: Config) -> None:
    trainer, other = (make_trainer(quick_config, TORCH) for _ in range(2))
    state = trainer.state()
    (sgd,) = other.optimizers.by_kind.values()
    for group in sgd.param_groups:
        group["fused"] = True
    other.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    other.load_state(state)
    assert state["scaler"] == {} and other.scaler.get_scale() == 64.0
    assert all(group["fused"] is True for group in sgd.param_groups)


def compiling(config: Config) -> Config:
    needs_compiler()
    torch._dynamo.reset()
    return changed(config, {"train.compile": "default"})


@pytest.mark.slow
def test_two_graphs_are_compiled_before_training_and_none_during_it(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    config = changed(compiling(quick_config), {"train.tta": True, **FIND, "schedule.find_steps": 20})
    counters.clear()
    after_warm_up: list[int] = []
    original = Session.warm_up

    def counted(self: Session, *rest: Any) -> None:
        original(self, *rest)
        after_warm_up.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(Session, "warm_up", counted)
    monkeypatch.setattr(torch.nn.Module, "compile", traced_only)
    fit(config, tmp_path / "run", log=Lines())
    assert after_warm_up == [2]  # one to train, one to evaluate
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert not any("_orig_mod" in key for key in weights(tmp_path / "run" / "last.pt"))


@pytest.mark.slow
def test_a_compiled_step_equals_the_eager_one(quick_config: Config) -> None:
    noise = changed(quick_config, {"data.name": "synthetic", "data.synthetic_count": 256, "train.batch_size": 128})
    # the eager step on contiguous images: on channels-last ones torch's batch norm takes the variance in one pass, which
    # rounds a hundred times as much
    losses, updates = [], []
    for config in (changed(noise, {"train.channels_last": "off"}), compiling(noise)):
        trainer = make_trainer(config, BackendChoice("dali", "test"))
        before = torch.cat([p.detach().flatten().clone() for p in trainer.net.parameters()])
        images, labels = next(trainer.train_loader.epoch(0))
        losses.append(trainer.train_one(images, labels, 0.01)[0].item())
        updates.append(torch.cat([p.detach().flatten() for p in trainer.net.parameters()]) - before)
        trainer.close()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # rounding is 3e-6 of the update, and 2e-3 where it turns a decision of a max-pooling or a ReLU, at one seed of ten or
    # so; a wrong graph is off by all of it
    assert (updates[1] - updates[0]).norm() < 5e-2 * updates[0].norm()


@pytest.mark.long
@pytest.mark.slow
def test_deterministic_mode_gives_the_same_bits_twice_compiled(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    needs_compiler()
    words = ["--config", recipe, "train.deterministic=true", "train.compile=default", "run.checkpoint_every=epoch"]
    words += ["train.epochs=1", "schedule.peak_epoch=0.5"]
    for name in "ab":
        job = runs.start(*words, f"run.dir={tmp_path / name}")
        assert job.wait(timeout=400) == 0, job.stderr
    assert equal(load_checkpoint(tmp_path / "a" / "last.pt"), load_checkpoint(tmp_path / "b" / "last.pt"))


def test_a_long_run_is_told_what_shortens_it(quick_config: Config) -> None:
    wide = changed(quick_config, {"net.width": 64})
    text = long_run_advice(6 * 3600, 12.0, wide, prepare(device="cpu", compile="off"))
    assert "6 h 0 min" in text and "net.width=16" in text and "train.epochs" in text and "GPU" in text
    assert [duration(s) for s in (3.21, 75, 7260)] == ["3.2 s", "1 min 15 s", "2 h 1 min"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_resumed_run_is_told_the_length_of_what_is_left(
    quick_config: Config, tmp_path: Path, arm: Arm, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    config = changed(quick_config, {"run.checkpoint_every": 1})
    if begun:
        arm("step", stop_before(17 + 1))
        with pytest.raises(Stop):
            fit(config, tmp_path / "run", log=Lines())
        disarm()
    # a clock on which a step, with what is around it, takes a thousand seconds
    passed = itertools.count(0, 1000)
    monkeypatch.setattr("train.screen.notice.time", SimpleNamespace(perf_counter=lambda: next(passed)))
    log = Lines()
    fit(config, tmp_path / "run", log=log, resume=begun)
    (line,) = (line for line in log.lines if line.startswith("note: this run will take about"))
    steps = 22 - 17 if begun else 22
    assert line.startswith(f"note: this run will take about {duration(1000 * steps)} at 1000.0 s a step")


def test_command_line_trains_and_refuses(runs: Zygote, tmp_path: Path, quick_config: Config) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(to_yaml(quick_config))
    words = ["--config", str(recipe), f"run.dir={tmp_path / 'run'}", "run.analyse=false"]
    command = [sys.executable, "-m", "train", *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "test: loss" in run.stdout and "pipeline: " in run.stdout
    code, _, err = runs.run(*words)
    assert code == 2 and "already holds a run" in one_line(err)


def test_missing_data_is_one_error_with_three_remedies_and_leaves_nothing(runs: Zygote, tmp_path: Path) -> None:
    words = ["--config", "configs/onecycle.yaml", f"data.root={tmp_path / 'none'}", "data.download=false"]
    code, _, err = runs.run(*words, f"run.dir={tmp_path / 'run'}")
    assert code == 2
    assert "Traceback" not in err
    for remedy in ("data.root=", "configs/quickstart.yaml", "cifar-10-binary.tar.gz"):
        assert remedy in err
    assert not (tmp_path / "run").exists()


def test_damaged_last_checkpoint_is_refused_and_falls_back_when_asked(
    quick_config: Config, trained: Trained, tmp_path: Path
) -> None:
    shutil.copytree(trained(quick_config), tmp_path / "run")
    last = tmp_path / "run" / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.pt.*previous\.pt beside it"):
        fit(quick_config, tmp_path / "run", log=Lines(), resume=True)
    log = Lines()
    fit(quick_config, tmp_path / "run", log=log, resume=True, fallback=True)
    assert "at epoch 1, step 0" in log.text
    assert load_checkpoint(last)["epoch"] == 2


def test_saved_state_is_plain_data(quick_config: Config, trained: Trained, tmp_path: Path) -> None:
    def walk(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            for v in value.values():
                yield from walk(v)
        elif isinstance(value, (list, tuple)):
            for v in value:
                yield from walk(v)
        else:
            yield value

    state = load_checkpoint(trained(quick_config) / "last.pt")
    assert all(isinstance(leaf, (Tensor, int, float, str, type(None))) for leaf in walk(state))
    save_checkpoint(tmp_path / "again.pt", state)


def test_a_drawing_that_fails_leaves_the_run_complete(runs: Zygote, recipe: Path, tmp_path: Path) -> None:
    fail = "import analysis.report as r\ndef no(*a, **b): raise ValueError('no font\\nat all')\nr.analyse = no"
    code, out, err = runs.run("--config", recipe, "run.analyse=true", f"run.dir={tmp_path / 'run'}", before=fail)
    assert code == 0 and err == ""
    assert f"the run is complete, its analysis is not: no font. Again with: python -m analysis {tmp_path}" in out
