"""analysis.load: the run's own answers and accuracies, for whatever Python calls an image, and errors in words of Python."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import analysis
from analysis import predictions
from analysis.classifier import Answers, Classifier
from dali_pipeline import sources
from dali_pipeline.dataset import DataError
from train.config import Config, changed
from train.run import fit
from train.screen.log import Log


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs on the digits with everything that an evaluation can report, chosen on a validation split."""
    config = changed(
        Config(),
        {
            "data.name": "digits",
            "data.backend": "torch",
            "data.validation": 150,
            "augment.flip": False,
            "net.width": 3,
            "schedule.lr_max": 0.1,
            "schedule.lr_min": 0.002,
            "schedule.peak_epoch": 1.0,
            "train.epochs": 3,
            "train.batch_size": 128,
            "train.eval_batch_size": 100,
            "train.ema_decay": 0.8,
            "train.tta": True,
            "train.compile": "off",
            "train.device": "cpu",
            "train.precision": "fp32",
        },
    )
    folder = tmp_path_factory.mktemp("runs") / "digits"
    fit(config, folder, log=Log(quiet=True))
    return folder


@pytest.fixture(scope="module")
def network(run: Path) -> Classifier:
    return analysis.load(run, device="cpu")


@pytest.fixture(scope="module")
def images(network: Classifier) -> np.ndarray[Any, Any]:
    return network.dataset.test.images[:7]


def assert_same(found: Answers, expected: Answers) -> None:
    assert found.names == expected.names
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-6)


def test_predictions_of_the_test_images_are_those_of_predictions_csv(run: Path, tmp_path: Path) -> None:
    assert predictions.main([str(run), "--checkpoint", "best", "--device", "cpu", "--output", str(tmp_path)]) == 0
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    network = analysis.load(str(run), device="cpu")
    answers = network.predict(network.dataset.test.images)
    assert len(answers) == len(rows) == 355
    assert answers.labels.tolist() == [int(row["prediction"]) for row in rows]
    assert list(answers.names) == [row["prediction_name"] for row in rows]
    assert answers.probabilities.shape == (355, 10) and answers.probabilities.dtype == np.float64
    np.testing.assert_allclose(answers.probabilities.sum(1), 1)
    confidence = np.array([float(row["confidence"]) for row in rows])
    np.testing.assert_allclose(answers.probabilities.max(1), confidence, atol=2e-6)


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_evaluate_gives_what_the_run_recorded(run: Path, checkpoint: str) -> None:
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epoch = lines[summary["test"][f"{checkpoint}.pt"]["epoch"] - 1]
    found = analysis.load(run, checkpoint, "cpu").evaluate()
    assert found["test"] == summary["test"][f"{checkpoint}.pt"]["accuracy"]
    measured = ["validation", "ema_validation"]
    if epoch is lines[-1]:  # the views come in after the last epoch
        measured += ["validation_tta", "ema_validation_tta"]
    assert {key: found[key] for key in measured} == {key: epoch[f"{key}_accuracy"] for key in measured}
    assert found.keys() >= {"test", "test_tta", "ema_test", "ema_test_tta"}
    if checkpoint == "last":
        for key in ("test_tta", "ema_test", "ema_test_tta"):
            assert found[key] == summary[f"last_{key}_accuracy"]


def test_an_image_is_the_same_as_array_file_and_pillow_image_alone_and_among_others(
    network: Classifier, images: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    expected = network.predict(images)
    paths = [tmp_path / f"{place}.png" for place in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    opened = [Image.fromarray(image) for image in images]
    mixed = [images[0], paths[1], str(paths[2]), opened[3], *images[4:]]
    for given in (paths, list(map(str, paths)), opened, list(images), mixed, iter(paths), np.array(paths, object)):
        assert_same(network.predict(given), expected)
    for alone in (images[2], images[2:3], paths[2], str(paths[2]), opened[2]):
        answer = network.predict(alone)
        assert len(answer) == 1 and answer.names == expected.names[2:3]
        np.testing.assert_allclose(answer.probabilities, expected.probabilities[2:3], atol=1e-6)


def test_an_image_of_another_size_is_brought_to_the_networks(
    network: Classifier, images: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    large = np.kron(images[0], np.ones((4, 4, 1), np.uint8))
    wide = np.concatenate([np.zeros((128, 64, 3), np.uint8), large, np.zeros((128, 64, 3), np.uint8)], 1)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    found = network.predict(wide)
    assert_same(network.predict(tmp_path / "wide.png"), found)
    middle = network.predict(large).probabilities
    np.testing.assert_allclose(
        found.probabilities, middle, atol=1e-3
    )  # at its edges the pixels beside it shine through
    squashed = network.predict(wide, fit="squash").probabilities
    assert np.abs(squashed - middle).max() > 0.01


def test_no_images_give_no_answers(network: Classifier, images: np.ndarray[Any, Any]) -> None:
    for nothing in (images[:0], []):
        answers = network.predict(nothing)
        assert (len(answers), answers.names, answers.probabilities.shape) == (0, (), (0, 10))


def test_what_is_no_image_is_refused_in_one_line(
    network: Classifier, images: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    (tmp_path / "words.png").write_text("no picture")
    for given, words in (
        (images / 255.0, "float64 (32, 32, 3) is no image"),
        (images.transpose(0, 3, 1, 2), "uint8 (3, 32, 32) is no image"),
        (images[0, :, :, 0], "uint8 (32, 32) is no image"),
        ([images[0], 3], "int64 () is no image"),
        (3, "is no image"),
        ([None], "NoneType is no image"),
        (tmp_path / "nowhere.png", "nowhere.png: no such file"),
        ([images[0], tmp_path / "words.png"], "words.png: is no image"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(analysis.UserError) as caught:
            network.predict(given)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(analysis.UserError, match="fit='stretch'"):
        network.predict(images, fit="stretch")


def test_pictures_and_report_are_written_and_leave_the_answers_as_they_were(
    run: Path, images: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "copy")
    network = analysis.load(tmp_path / "copy", device="cpu")
    before, random = network.predict(images), torch.get_rng_state()
    for path in (network.curves(), network.grad_cam()):
        assert path.parent == tmp_path / "copy" / "analysis"
        with Image.open(path) as opened:
            assert opened.format == "PNG"
    assert network.report() == tmp_path / "copy" / "analysis" / "report.html"
    np.testing.assert_array_equal(network.predict(images).probabilities, before.probabilities)
    assert torch.equal(torch.get_rng_state(), random)


def test_only_what_needs_the_data_reads_them(
    run: Path, images: np.ndarray[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise DataError("the data are elsewhere")

    shutil.copytree(run, tmp_path / "copy")
    monkeypatch.setattr(sources, "load", missing)
    network = analysis.load(tmp_path / "copy", device="cpu")
    assert len(network.predict(images)) == 7
    assert network.curves().exists()
    needing: list[Callable[[], object]] = [network.evaluate, network.grad_cam, network.report, lambda: network.dataset]
    for call in needing:
        with pytest.raises(DataError, match="the data are elsewhere") as caught:
            call()
        assert "data_root=" in str(caught.value) and "--" not in str(caught.value)


def test_what_a_user_of_the_results_must_know_is_a_warning(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "metrics.jsonl").write_text("{")
    with pytest.warns(UserWarning, match=r"metrics\.jsonl is damaged"):
        analysis.load(tmp_path / "copy", device="cpu")


def test_a_run_that_cannot_be_loaded_is_a_user_error_in_words_of_python(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "best.pt").unlink()
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path / "copy", {}, 'use checkpoint="last"'),
        (tmp_path / "nowhere", {}, "no such run folder"),
        (run, {"device": "gpu"}, "device='gpu': expected one of auto, cpu, cuda, mps"),
        (run, {"checkpoint": "newest"}, 'use checkpoint="best"'),
    ]
    if not torch.cuda.is_available():
        cases.append((run, {"device": "cuda"}, 'device="cuda"'))
    for folder, options, words in cases:
        with pytest.raises(analysis.UserError) as caught:
            analysis.load(folder, **options)
        assert words in str(caught.value) and "--" not in str(caught.value)
    assert analysis.load(tmp_path / "copy", "last", "cpu").class_names == tuple("0123456789")


def test_the_result_names_what_it_holds(network: Classifier, images: np.ndarray[Any, Any]) -> None:
    assert [field.name for field in dataclasses.fields(network.predict(images))] == ["labels", "names", "probabilities"]
    assert network.image_size == (32, 32) and "run digits" in repr(network)
