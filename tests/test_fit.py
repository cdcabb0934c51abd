"""Whole runs on the digits: what is written, what is printed, and that nothing is lost or changed on the way."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from torch import Tensor

import train.fit
import train.trainer
from dali_pipeline import dali_graph
from dali_pipeline.datasets import load
from dali_pipeline.loader import BackendChoice, BackendError, EvalLoader
from train.checkpoint import load_checkpoint, save_checkpoint
from train.config import Config, ConfigError, load_config, to_yaml
from train.estimate import long_run_advice
from train.evaluation import evaluate
from train.fit import differences, find_only, fit
from train.lr_finder import RangeTestError
from train.optim import OneCycle
from train.progress import NonFiniteLoss, StepMeter, duration
from train.record import Log, RunFolder, RunFolderError, default_run_dir, read_metrics
from train.runtime import RuntimeUnavailable, prepare
from train.steps import EvalStep
from train.trainer import Trainer

ROOT = CONFIGS.parent


class Lines(Log):
    """Collects what would be printed."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __call__(self, line: str = "") -> None:
        self.lines.append(line)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def weights(path: Path) -> dict[str, Tensor]:
    return load_checkpoint(path)["model"]  # type: ignore[no-any-return]


def assert_equal_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


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
        "best accuracy",
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


def test_checkpoint_holds_the_accuracy_that_it_reports(quick_config: Config, tmp_path: Path) -> None:
    fit(quick_config, tmp_path / "run", log=Lines())
    dataset = load("digits", Path("unused"))
    for name in ("last.pt", "best.pt"):
        state = load_checkpoint(tmp_path / "run" / name)
        assert not any("_orig_mod" in key for key in state["model"])
        runtime = prepare(device="cpu", compile="off")
        trainer = Trainer(quick_config, dataset, runtime, BackendChoice("torch", "test"))
        trainer.net.load_state_dict(state["model"])
        loader = EvalLoader(dataset.test, batch_size=64, device=runtime.device, backend="torch")
        score = evaluate(EvalStep(trainer.net, state["mean"], state["std"]), loader).plain
        assert score.accuracy == state["test_accuracy"]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(quick_config: Config, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = copy.deepcopy(quick_config)
        config.train.seed = seed
        fit(config, tmp_path / name, log=Lines())
    a, b, c = (weights(tmp_path / name / "last.pt") for name in "abc")
    assert_equal_weights(a, b)
    assert not torch.equal(a["prep.0.weight"], c["prep.0.weight"])


def test_dali_and_torch_pipelines_train_the_same_network(quick_config: Config, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    for backend in ("dali", "torch"):
        config = copy.deepcopy(quick_config)
        config.data.backend = backend  # type: ignore[assignment]
        fit(config, tmp_path / backend, log=Lines())
    assert_equal_weights(weights(tmp_path / "dali" / "last.pt"), weights(tmp_path / "torch" / "last.pt"))


class Stop(Exception):
    pass


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make training raise Stop once `steps` steps are done, as a kill between two steps would."""
    done = 0
    original = Trainer.train_one

    def counted(self: Trainer, *arguments: Any) -> Any:
        nonlocal done
        if done == steps:
            raise Stop
        done += 1
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "train_one", counted)


FULL = {"train.ema_decay": 0.9, "train.tail": "endless", "optim.label_smoothing": 0.1}


@pytest.mark.parametrize("steps", [1, 5, 11, 14, 21])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    quick_config.train.ema_decay, quick_config.train.tail = 0.9, "endless"
    quick_config.run.checkpoint_every = 1
    whole = copy.deepcopy(quick_config)
    fit(whole, tmp_path / "whole", log=Lines())
    with monkeypatch.context() as patch, pytest.raises(Stop):
        interrupt_after(steps, patch)
        fit(copy.deepcopy(quick_config), tmp_path / "parts", log=Lines())
    fit(copy.deepcopy(quick_config), tmp_path / "parts", log=Lines(), resume=True)
    a, b = load_checkpoint(tmp_path / "whole" / "last.pt"), load_checkpoint(tmp_path / "parts" / "last.pt")
    assert_equal_weights(a["model"], b["model"])
    assert_equal_weights(a["ema"], b["ema"])
    for index, entry in a["optimizer"]["state"].items():
        assert torch.equal(entry["momentum_buffer"], b["optimizer"]["state"][index]["momentum_buffer"])
    for x, y in zip(a["metrics"], b["metrics"], strict=True):
        exact = [key for key in x if "second" not in key]
        assert {key: x[key] for key in exact} == {key: y[key] for key in exact}


def test_resume_under_another_recipe_names_the_keys_and_both_values(quick_config: Config, tmp_path: Path) -> None:
    fit(copy.deepcopy(quick_config), tmp_path / "run", log=Lines())
    changed = copy.deepcopy(quick_config)
    changed.optim.momentum, changed.run.tensorboard = 0.8, False
    with pytest.raises(ConfigError, match=r"optim\.momentum: 0\.9 -> 0\.8"):
        fit(changed, tmp_path / "run", log=Lines(), resume=True)
    longer = copy.deepcopy(quick_config)
    longer.train.epochs = 3
    with pytest.raises(ConfigError, match="needs --extend"):
        fit(longer, tmp_path / "run", log=Lines(), resume=True)
    summary = fit(longer, tmp_path / "run", log=Lines(), resume=True, extend=True)
    assert summary["epochs"] == 3 and len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3


def test_differences_pass_over_paths_and_found_rates() -> None:
    old = {"schedule": {"lr_max": 0.3}, "run": {"dir": "a"}, "net": {"width": 16}}
    new = {"schedule": {"lr_max": "find"}, "run": {"dir": "b"}, "net": {"width": 64}}
    assert differences(old, new) == ["net.width: 16 -> 64"]


def test_an_existing_run_is_not_overwritten_by_accident(quick_config: Config, tmp_path: Path) -> None:
    fit(copy.deepcopy(quick_config), tmp_path / "run", log=Lines())
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(RunFolderError, match=r"--resume.*--overwrite"):
        fit(copy.deepcopy(quick_config), tmp_path / "run", log=Lines())
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    quick_config.train.epochs, quick_config.schedule.peak_epoch = 1, 0.5
    fit(quick_config, tmp_path / "run", log=Lines(), overwrite=True)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_nothing_to_resume_and_a_second_writer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="nothing to resume"):
        RunFolder(tmp_path / "empty", resume=True)
    assert not (tmp_path / "empty").exists()
    first = RunFolder(tmp_path / "run")
    code = f"from train.record import RunFolder; RunFolder({str(tmp_path / 'run')!r})"
    second = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "is writing here" in second.stderr and second.returncode != 0
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

    monkeypatch.setattr(train.trainer.Trainer, "train_one", poisoned)
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
    quick_config.train.batch_size = 5000
    with pytest.raises(ConfigError, match="more than the 1442 training images"):
        fit(quick_config, tmp_path / "run", log=Lines())
    assert not (tmp_path / "run").exists()


def test_ema_and_tta_are_reported_beside_the_plain_figure(quick_config: Config, tmp_path: Path) -> None:
    quick_config.train.ema_decay, quick_config.train.tta = 0.95, True
    log = Lines()
    fit(quick_config, tmp_path / "run", log=log)
    record = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert {"test_accuracy", "test_tta_accuracy", "ema_test_accuracy", "ema_test_tta_accuracy"} <= record.keys()
    assert "test, EMA and flip TTA: loss" in log.text


def test_ema_is_the_running_average_of_the_weights(quick_config: Config) -> None:
    quick_config.train.ema_decay, quick_config.train.ema_every = 0.8, 2
    trainer = Trainer(
        quick_config, load("digits", Path("x")), prepare(device="cpu", compile="off"), BackendChoice("torch", "t")
    )
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
    quick_config.run.tensorboard = True
    with monkeypatch.context() as patch, pytest.raises(RuntimeUnavailable, match=r"pip install -e '\.\[tensorboard\]'"):
        patch.setattr("importlib.util.find_spec", lambda name: None)
        fit(quick_config, tmp_path / "refused", log=Lines())
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    fit(quick_config, tmp_path / "run", log=Lines())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    expected = [m["test_accuracy"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert [e.value for e in events.Scalars("test_accuracy")] == pytest.approx(expected)


def test_find_only_writes_the_curve_and_no_checkpoint(quick_config: Config, tmp_path: Path) -> None:
    quick_config.net.width = 4
    quick_config.schedule.find_steps = 40
    lr_max, lr_min = find_only(quick_config, tmp_path / "lr", log=Lines())
    assert 1e-4 < lr_min < lr_max < 10
    assert (tmp_path / "lr" / "lr_finder.csv").exists() and not (tmp_path / "lr" / "last.pt").exists()


def test_found_rates_are_written_into_the_recipe_of_the_run(quick_config: Config, tmp_path: Path) -> None:
    quick_config.net.width = 4
    quick_config.schedule.lr_max = quick_config.schedule.lr_min = "find"
    quick_config.schedule.find_steps = 40
    fit(quick_config, tmp_path / "run", log=Lines())
    written = load_config(tmp_path / "run" / "config.yaml")
    assert isinstance(written.schedule.lr_max, float) and isinstance(written.schedule.lr_min, float)
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert metrics[-1]["lr"] == pytest.approx(written.schedule.lr_min)


def test_a_range_test_that_finds_nothing_spoils_no_run_and_locks_no_folder(
    quick_config: Config, tmp_path: Path
) -> None:
    config = copy.deepcopy(quick_config)
    config.schedule.lr_max = config.schedule.lr_min = "find"
    config.schedule.find_start, config.schedule.find_end, config.schedule.find_steps = 1e8, 1e30, 20
    with pytest.raises(RangeTestError, match=r"set schedule\.lr_max"):
        fit(copy.deepcopy(config), tmp_path / "run", log=Lines())
    assert (tmp_path / "run" / "lr_finder.csv").exists()  # it shows why
    fit(copy.deepcopy(quick_config), tmp_path / "run", log=Lines())
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(RangeTestError):
        fit(copy.deepcopy(config), tmp_path / "run", log=Lines(), overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before
    with pytest.raises(RunFolderError, match="already holds a run"):
        find_only(copy.deepcopy(quick_config), tmp_path / "run", log=Lines())


def test_data_that_dali_cannot_take_go_to_torch_under_auto_and_are_refused_on_request(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    monkeypatch.setattr(dali_graph, "_MAX_PICTURE_BYTES", 100 * 32 * 32 * 3)
    quick_config.train.batch_size = 61
    quick_config.data.backend = "dali"
    with pytest.raises(BackendError, match="take a batch size divisible by 16"):
        fit(copy.deepcopy(quick_config), tmp_path / "refused", log=Lines())
    quick_config.data.backend = "auto"
    log = Lines()
    fit(quick_config, tmp_path / "run", log=log)
    assert "WARNING: pipeline: torch" in log.text
    record = json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))
    assert record["backend"] == "torch" and "divisible by 16" in record["backend_reason"]


def test_a_checkpoint_of_another_device_keeps_this_ones_kernels_and_scaler(quick_config: Config) -> None:
    runtime = prepare(device="cpu", precision="fp32", compile="off")
    dataset = load("digits", Path("unused"))
    trainer, other = (Trainer(quick_config, dataset, runtime, BackendChoice("torch", "test")) for _ in range(2))
    state = trainer.state()
    for group in other.optimizer.param_groups:
        group["fused"] = True
    other.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    other.load_state(state)
    assert state["scaler"] == {} and other.scaler.get_scale() == 64.0
    assert all(group["fused"] is True for group in other.optimizer.param_groups)


def compiling(config: Config) -> Config:
    if not prepare(device="cpu", compile="auto").compile_mode:
        pytest.skip("no C++ compiler here")
    torch._dynamo.reset()
    config = copy.deepcopy(config)
    config.train.compile = "default"
    return config


@pytest.mark.slow
def test_two_graphs_are_compiled_before_training_and_none_during_it(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    config = compiling(quick_config)
    config.train.tta = True
    config.schedule.lr_max = config.schedule.lr_min = "find"
    config.schedule.find_steps = 20
    counters.clear()
    after_warm_up: list[int] = []
    original = train.fit.Setup.warm_up

    def counted(self: Any, trainer: Trainer) -> None:
        original(self, trainer)
        after_warm_up.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(train.fit.Setup, "warm_up", counted)
    fit(config, tmp_path / "run", log=Lines())
    assert after_warm_up == [2]  # one to train, one to evaluate
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert not any("_orig_mod" in key for key in weights(tmp_path / "run" / "last.pt"))


@pytest.mark.slow
def test_a_compiled_step_equals_the_eager_one(quick_config: Config) -> None:
    dataset = load(
        "synthetic", Path("unused"), synthetic_count=256
    )  # noise: no ties that pooling could break either way
    losses, updates = [], []
    for config in (quick_config, compiling(quick_config)):
        torch.manual_seed(0)
        trainer = Trainer(
            config, dataset, prepare(device="cpu", compile=config.train.compile), BackendChoice("dali", "test")
        )
        before = torch.cat([p.detach().flatten().clone() for p in trainer.net.parameters()])
        trainer.warm_up()
        images, labels = next(trainer.train_loader.epoch(0))
        losses.append(trainer.train_one(images, labels, 0.01)[0].item())
        updates.append(torch.cat([p.detach().flatten() for p in trainer.net.parameters()]) - before)
        trainer.close()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # fp32 rounding through ten batch norms is about 1e-3 of the update; a wrong graph is off by all of it
    assert (updates[1] - updates[0]).norm() < 5e-3 * updates[0].norm()


def test_a_long_run_is_told_what_shortens_it(quick_config: Config) -> None:
    quick_config.net.width = 64
    text = long_run_advice(6 * 3600, 12.0, quick_config, prepare(device="cpu", compile="off"))
    assert "6 h 0 min" in text and "net.width=16" in text and "train.epochs" in text and "GPU" in text
    assert [duration(s) for s in (3.21, 75, 7260)] == ["3.2 s", "1 min 15 s", "2 h 1 min"]


def test_command_line_trains_resumes_and_refuses(tmp_path: Path, quick_config: Config) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(to_yaml(quick_config))
    words = [sys.executable, "-m", "train", "--config", str(recipe), f"run.dir={tmp_path / 'run'}", "run.analyse=false"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "test: loss" in run.stdout and "pipeline: " in run.stdout
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ") and len(again.stderr.splitlines()) == 1


def test_missing_data_is_one_error_with_three_remedies_and_leaves_nothing(tmp_path: Path) -> None:
    words = ["--config", "configs/onecycle.yaml", f"data.root={tmp_path / 'none'}", "data.download=false"]
    command = [sys.executable, "-m", "train", *words, f"run.dir={tmp_path / 'run'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    for remedy in ("data.root=", "configs/quickstart.yaml", "cifar-10-binary.tar.gz"):
        assert remedy in result.stderr
    assert not (tmp_path / "run").exists()


def test_damaged_last_checkpoint_is_refused_and_falls_back_when_asked(quick_config: Config, tmp_path: Path) -> None:
    fit(copy.deepcopy(quick_config), tmp_path / "run", log=Lines())
    last = tmp_path / "run" / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    with pytest.raises(train.checkpoint.CheckpointError, match=r"last\.pt.*previous\.pt beside it"):
        fit(copy.deepcopy(quick_config), tmp_path / "run", log=Lines(), resume=True)
    log = Lines()
    fit(copy.deepcopy(quick_config), tmp_path / "run", log=log, resume=True, fallback=True)
    assert "at epoch 1, step 0" in log.text
    assert load_checkpoint(last)["epoch"] == 2


def test_saved_state_is_plain_data(quick_config: Config, tmp_path: Path) -> None:
    fit(quick_config, tmp_path / "run", log=Lines())

    def walk(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            for v in value.values():
                yield from walk(v)
        elif isinstance(value, (list, tuple)):
            for v in value:
                yield from walk(v)
        else:
            yield value

    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(isinstance(leaf, (Tensor, int, float, str, type(None))) for leaf in walk(state))
    save_checkpoint(tmp_path / "again.pt", state)
