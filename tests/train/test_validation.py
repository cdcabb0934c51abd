"""Training that is chosen on a validation split: what best.pt follows, what is measured of the test set, and when."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training import QUICK, Lines, assert_equal_weights, make_trainer, weights
from whole_runs import Arm, Stop, Trained, stop_before

import net as networks
from analysis.compare import check_same_splits, contender, describe
from analysis.report import headline
from analysis.run import AnalysisError, load_run
from dali_pipeline import dali_graph, sources
from dali_pipeline.backend import BackendError
from dali_pipeline.dataset import Dataset
from dali_pipeline.plan import Augment
from net.whitening import Whitening
from train.config import Config, ConfigError, changed
from train.disk.folder import read_metrics
from train.disk.snapshot import load_snapshot
from train.failpoints import disarm
from train.run import fit
from train.step.trainer import Trainer, new_network


@pytest.fixture
def config(quick_config: Config) -> Config:
    return changed(quick_config, {"data.validation": 200, "data.backend": "torch"})


def accuracy_by_hand(path: Path, dataset: Dataset) -> float:
    """Of a checkpoint on the test set: torch's own network call on all images at once."""
    snapshot = load_snapshot(path)
    net = networks.build(changed(Config(), {"net.width": QUICK["net.width"]}).net, dataset.num_classes)
    net.load_state_dict(snapshot.model)
    images = (dataset.test.images - np.array(dataset.mean)) / np.array(dataset.std)
    with torch.no_grad():
        logits = net.eval()(torch.tensor(images, dtype=torch.float32).permute(0, 3, 1, 2))
    return 100 * float((logits.argmax(1).numpy() == dataset.test.labels).mean())


def test_best_follows_validation_and_the_test_set_is_measured_once_by_both_checkpoints(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the order of the epochs' validation accuracies turned round, so that best.pt is not the last epoch."""
    asked: list[int] = []
    original, original_on = Trainer.evaluate, Trainer.evaluate_on

    def falling(self: Trainer, *rest: Any) -> Any:
        asked.append(1)
        scores = original(self, *rest)
        return {m: replace(score, correct=score.count - len(asked)) for m, score in scores.items()}

    tested: list[int] = []

    def testing(self: Trainer, loader: Any, measures: Any, *rest: Any) -> Any:
        if any(measure.split == "test" for measure in measures):
            tested.append(len(asked))
        return original_on(self, loader, measures, *rest)

    monkeypatch.setattr(Trainer, "evaluate", falling)
    monkeypatch.setattr(Trainer, "evaluate_on", testing)
    log = Lines()
    summary = fit(config, tmp_path / "run", log=log)
    assert (summary["chosen_on"], summary["best_epoch"], summary["epochs"]) == ("validation", 1, 2)
    assert summary["best_validation_accuracy"] == 99.5 and summary["last_validation_accuracy"] == 99.0
    assert tested == [2, 2]  # last.pt and best.pt, after both epochs
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all("validation_accuracy" in r and not any(key.startswith("test") for key in r) for r in records)
    dataset = sources.load(config.data)
    for name in ("best.pt", "last.pt"):
        by_hand = accuracy_by_hand(tmp_path / "run" / name, dataset)
        assert summary["test"][name]["accuracy"] == pytest.approx(by_hand, abs=0.3)  # one image of 355
    assert summary["best_accuracy"] == summary["test"]["best.pt"]["accuracy"]
    assert summary["last_accuracy"] == summary["test"]["last.pt"]["accuracy"]
    assert "chosen on the validation split (99.50%)" in log.text
    # the weights of last.pt are again those of the trainer when the run ends: nothing of best.pt was saved over them
    assert load_snapshot(tmp_path / "run" / "last.pt").position.epoch == 2


def test_a_best_checkpoint_that_is_lost_or_another_costs_its_own_measurement_alone(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, epochs = Trainer.evaluate, iter((2, 1) * 2)

    def falling(self: Trainer, *rest: Any) -> Any:
        right = next(epochs)
        return {m: replace(score, correct=right) for m, score in original(self, *rest).items()}

    monkeypatch.setattr(Trainer, "evaluate", falling)
    whole = fit(config, tmp_path / "run")
    assert whole["best_epoch"] == 1 and whole["test"].keys() == {"best.pt", "last.pt"}
    best = tmp_path / "run" / "best.pt"
    for content in (b"", (tmp_path / "run" / "last.pt").read_bytes()):
        best.write_bytes(content)
        log = Lines()
        summary = fit(config, tmp_path / "run", resume=True, log=log)
        assert "WARNING" in log.text and "best.pt" in log.text and "not measured" in log.text
        assert summary["test"] == {"last.pt": whole["test"]["last.pt"]} and summary["best_accuracy"] is None
        assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_without_a_validation_split_the_last_epoch_is_the_headline_and_best_is_said_to_be_chosen_on_the_test_set(
    quick_config: Config, tmp_path: Path
) -> None:
    log = Lines()
    summary = fit(quick_config, tmp_path / "run", log=log)
    assert summary["chosen_on"] == "test" and "test" not in summary
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["test_accuracy"]
    assert summary["last_accuracy"] == last
    assert f"test accuracy  {last:.2f}% after the last epoch (2)" in log.text
    assert "chosen on the test set itself" in log.text and "flatters" in log.text


def test_a_run_interrupted_in_the_middle_ends_with_the_same_bits_and_measurements(
    config: Config, trained: Trained, tmp_path: Path, arm: Arm
) -> None:
    config = changed(config, {"run.checkpoint_every": 3})
    whole = json.loads((trained(config) / "summary.json").read_text())
    arm("step", stop_before(12))
    with pytest.raises(Stop):
        fit(config, tmp_path / "parts")
    disarm()
    parts = fit(config, tmp_path / "parts", resume=True)
    for name in ("best.pt", "last.pt"):
        assert_equal_weights(weights(trained(config) / name), weights(tmp_path / "parts" / name))
    assert parts["test"] == whole["test"] and parts["best_validation_accuracy"] == whole["best_validation_accuracy"]


def test_resume_refuses_another_amount_and_other_images_by_name(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(config, tmp_path / "run")
    for amount in (None, 100, 0.2):
        with pytest.raises(ConfigError, match=r"data\.validation: 200 ->"):
            fit(changed(config, {"data.validation": amount}), tmp_path / "run", resume=True)
    original = sources.load

    def others(*arguments: Any, **options: Any) -> Dataset:
        dataset = original(*arguments, **options)
        assert dataset.validation is not None
        return replace(dataset, validation=dataset.validation.take(slice(1, None)))

    monkeypatch.setattr(sources, "load", others)
    with pytest.raises(ConfigError, match="the validation split of digits is not that of the run"):
        fit(config, tmp_path / "run", resume=True)


@pytest.mark.parametrize("overrides", [{}, {"train.batch_size": 64}, {"data.backend": "dali"}, {"train.seed": 5}])
def test_the_split_depends_on_nothing_but_the_data(config: Config, overrides: dict[str, Any]) -> None:
    expected = sources.load(config.data).validation
    trainer = make_trainer(changed(config, overrides))
    try:
        assert expected is not None and trainer.dataset.validation is not None
        assert trainer.dataset.validation.fingerprint == expected.fingerprint
        (measure, score), *_ = trainer.evaluate().items()
        assert (measure.key, score.count) == ("validation", len(expected))
    finally:
        trainer.close()


def test_the_report_and_a_comparison_know_what_chose(config: Config, tmp_path: Path) -> None:
    for name, amount in (("a", 200), ("b", 200), ("c", 300), ("d", None)):
        fit(changed(config, {"data.validation": amount, "train.epochs": 1}), tmp_path / name)
    runs = {name: load_run(tmp_path / name, say=lambda line: None) for name in "abcd"}
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert runs["a"].recorded_accuracy == summary["test"]["best.pt"]["accuracy"]
    first = contender(runs["a"], "a", np.ones(355, bool))
    check_same_splits(first, runs["b"], "b")
    for name, theirs in (("c", "300"), ("d", "nothing")):
        with pytest.raises(AnalysisError, match=f"{name} holds out {theirs} of the training images.*a 200"):
            check_same_splits(first, runs[name], name)


@pytest.mark.parametrize("backend", ["auto", "dali"])
def test_a_test_set_that_dali_cannot_take_is_measured_by_torch_under_auto_and_refused_on_request(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    # in batches that are not divided into strips, DALI takes the 200 images held out, and not the 355 of the test set
    monkeypatch.setattr(dali_graph, "MAX_STRIP_BYTES", 300 * 32 * 32 * 3)
    words = {"train.eval_batch_size": 61, "data.backend": backend}
    log, run = Lines(), tmp_path / "run"
    if backend == "dali":
        with pytest.raises(BackendError, match="355 images"):
            fit(changed(config, words), run, log=log)
        return
    summary = fit(changed(config, words), run, log=log)
    assert "WARNING: test images: torch (torch on cpu: 355 images" in log.text
    assert json.loads((run / "environment.json").read_text())["backend"] == "dali", "the training's"
    assert summary["last_accuracy"] == pytest.approx(accuracy_by_hand(run / "last.pt", sources.load(config.data)))


def test_choosing_on_validation_never_touches_the_test_set(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import accuracy
    from train.config import to_yaml

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    words = [str(recipe), "--runs", "2", "train.epochs=1", "--finished"]
    made: list[str] = []
    original = Trainer.make_eval_loader

    def noted(self: Trainer, split: str, *rest: Any) -> Any:
        made.append(split)
        return original(self, split, *rest)

    monkeypatch.setattr(Trainer, "make_eval_loader", noted)
    assert accuracy.main([*words, str(tmp_path / "v.jsonl"), "--on", "validation"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(made) == {"validation"} and report["on"] == "validation" and report["accuracy"]["n"] == 2
    assert accuracy.main([*words, str(tmp_path / "t.jsonl")]) == 0
    assert "test" in made and json.loads(capsys.readouterr().out.splitlines()[-1])["on"] == "test"
    # one file holds one kind of measurement
    assert accuracy.main([*words, str(tmp_path / "v.jsonl")]) == 2
    assert "measured.on: validation -> None" in capsys.readouterr().err
    assert accuracy.main([*words, str(tmp_path / "x.jsonl"), "data.validation=null", "--on", "validation"]) == 2
    assert "add data.validation=5000" in capsys.readouterr().err


def test_the_headline_of_the_report_is_chosen_by_nothing_or_by_validation(config: Config, tmp_path: Path) -> None:
    from analysis.calibration import reliability
    from analysis.predictions import predict_test
    from analysis.report import Results

    for name, amount, words in (
        ("test", None, ["after the last epoch, 2", "chosen on the test set itself, which flatters"]),
        ("validation", 200, ["chosen on the validation split", "test accuracy, epoch 2"]),
    ):
        fit(changed(config, {"data.validation": amount}), tmp_path / name)
        run = load_run(tmp_path / name, say=lambda line: None)
        predictions = predict_test(run, say=lambda line: None)
        results = Results(predictions, "", [], reliability(predictions.confidence, predictions.hits), {})
        notes = [note for _, _, note in headline(run, results)[:2]]
        assert all(word in note for word, note in zip(words, notes, strict=True)), notes


def test_a_held_out_image_is_never_trained_on(config: Config) -> None:
    plain = changed(config, {"augment.crop": False, "augment.cutout": 0, "train.batch_size": 128})
    trainer = make_trainer(changed(plain, {"augment.flip": False}))
    try:
        assert trainer.config.augment == Augment(crop=False, flip=False, cutout=0)
        seen = {
            image.numpy().tobytes()
            for images, _ in trainer.train_loader.epoch(0)
            for image in images.permute(0, 2, 3, 1).contiguous()
        }
        assert trainer.dataset.validation is not None
        assert not seen & {image.tobytes() for image in trainer.dataset.validation.images}
    finally:
        trainer.close()


def test_the_further_accuracies_of_a_report_are_those_of_the_test_set(config: Config, tmp_path: Path) -> None:
    from analysis.report import _further_accuracies

    for amount in (200, None):
        path = tmp_path / str(amount)
        summary = fit(changed(config, {"data.validation": amount, "train.tta": True, "train.ema_decay": 0.9}), path)
        found = {measure.key: value for measure, value in _further_accuracies(load_run(path, say=lambda line: None))}
        assert list(found) == ["test_tta", "ema_test", "ema_test_tta"]
        assert found == {key: summary[f"last_{key}_accuracy"] for key in found}


def test_tensorboard_gets_what_was_measured_of_the_test_set_at_the_end(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[tuple[str, int], float] = {}
    closed: list[bool] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None: ...

        def add_scalar(self, name: str, value: float, epoch: int) -> None:
            told[name, epoch] = value

        def flush(self) -> None: ...

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    summary = fit(changed(config, {"run.tensorboard": True}), tmp_path / "run")
    assert told["test_accuracy_of_last", 2] == summary["test"]["last.pt"]["accuracy"]
    assert told["test_accuracy_of_best", summary["best_epoch"]] == summary["test"]["best.pt"]["accuracy"]
    assert {name for name, _ in told} >= {"validation_accuracy", "validation_loss", "test_loss_of_last"}
    assert closed == [True]


def test_a_comparison_says_where_the_test_set_chose(config: Config, tmp_path: Path) -> None:
    for name, amount in (("a", None), ("b", 200)):
        fit(changed(config, {"data.validation": amount, "train.epochs": 1}), tmp_path / name)
        run = load_run(tmp_path / name, say=lambda line: None)
        pair = [contender(run, f"{name}{number}", np.arange(355) % 2 == number) for number in (0, 1)]
        said = [line for line in describe(pair) if "chosen on the test set itself" in line]
        assert len(said) == (amount is None) and all("best.pt of a0, a1" in line for line in said)


def test_accuracy_measures_a_validation_split_that_the_source_has(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import accuracy
    from dali_pipeline.sources.digits import Digits
    from train.config import to_yaml

    whole = sources.load(config.data)
    monkeypatch.setattr(Digits, "load", lambda *a, **b: whole)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(changed(config, {"data.validation": None, "train.epochs": 1})))
    words = [str(recipe), "--runs", "1", "--on", "validation", "--finished", str(tmp_path / "v.jsonl")]
    assert accuracy.main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["on"] == "validation"


def test_the_whitening_sees_no_held_out_image(config: Config) -> None:
    """It is that of the training images, fewer here than the 5,000 that it asks for."""
    config = changed(config, {"net.whitening": True})
    dataset = sources.load(config.data)
    expected = Whitening()
    pixels = (dataset.train.images - np.array(dataset.mean)) / np.array(dataset.std)
    expected.fit(torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2))
    found = new_network(config, dataset).state_dict()["whitening.weight"]

    def squared(filters: Tensor) -> Tensor:
        """Where eigenvalues are equal, as in grey images, the axes are not unique; this is."""
        return filters.flatten(1).double().T @ filters.flatten(1).double()

    wanted = squared(expected.weight.detach())
    assert (squared(found) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    everything = changed(config, {"data.validation": None})
    other = squared(new_network(everything, sources.load(everything.data)).state_dict()["whitening.weight"])
    assert (other - wanted).abs().max() > 1e-4 * wanted.abs().max()
