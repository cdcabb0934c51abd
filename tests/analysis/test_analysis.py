"""The analysis on a small trained run: figures that equal the run's, pictures, the report, the commands and their errors."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from places import ROOT
from training import QUICK

from analysis import compare, confusion, curves, grad_cam, misclassified, predict, predictions, report, samples
from analysis.predictions import agreement, checked_predictions, predict_test, worst_first
from analysis.report import PICTURES, analyse, render
from analysis.run import AnalysisError, LoadedRun, class_index, fit_data, load_run
from dali_pipeline.dataset import DataError, Split
from dali_pipeline.plan import Augment, draw_plan
from dali_pipeline.sources.synthetic import random_dataset
from net import build
from net.options import NetOptions
from train.config import Config, changed, to_dict
from train.disk.atomic import write_csv
from train.disk.checkpoint import FORMAT, CheckpointError, load_checkpoint, save_checkpoint, seal
from train.disk.folder import FOLDERS
from train.disk.snapshot import load_snapshot
from train.run import fit
from train.screen.log import Log
from train.step.range_test import RangeTest

QUIET: Callable[[str], None] = lambda line: None  # noqa: E731


def recipe(**changes: Any) -> Config:
    """Digits at width 4, two epochs or so: a run of a few seconds that still gets many digits wrong."""
    values = QUICK | {"data.backend": "torch", "net.width": 4, "run.analyse": True}
    return changed(Config(), values | {name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three runs: first, second (another width and seed), noise (other data)."""
    folder = tmp_path_factory.mktemp("runs")
    fit(recipe(train__epochs=3, train__batch_size=64), folder / "first", log=Log(quiet=True))
    fit(recipe(net__width=3, train__seed=1, train__epochs=1), folder / "second", log=Log(quiet=True))
    noise = recipe(data__name="synthetic", data__synthetic_count=256, train__epochs=1, net__width=1)
    fit(noise, folder / "noise", log=Log(quiet=True))
    return folder


@pytest.fixture(scope="module")
def first(runs: Path) -> LoadedRun:
    return load_run(runs / "first", device="cpu", say=QUIET)


@pytest.fixture(scope="module")
def answers(first: LoadedRun) -> predictions.Predictions:
    return predict_test(first, QUIET)


@pytest.fixture(scope="module")
def analysed(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a whole analysis of the first run wrote."""
    return analyse(runs / "first", output=tmp_path_factory.mktemp("analysis"), device="cpu", log=QUIET).parent


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Path:
    """A copy of the first run that a test may damage."""
    target = tmp_path / "copied"
    shutil.copytree(runs / "first", target)
    return target


BEFORE_THE_FIRST_EPOCH: dict[str, Any] = {
    "epoch": 0,
    "metrics": [],
    "best_epoch": 0,
    "best_accuracy": -1.0,
    "test_accuracy": None,
}


def edit_checkpoint(path: Path, **changes: Any) -> None:
    state = load_checkpoint(path)
    state.update(changes)
    state.pop("format")
    save_checkpoint(path, state)


def error_of(main: Callable[[list[str]], int], arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of a command that must end with exit code 2 and without a traceback."""
    assert main([str(argument) for argument in arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and "Traceback" not in line
    return line


# predictions


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_accuracy_equals_the_runs_to_the_last_image(runs: Path, checkpoint: str) -> None:
    run = load_run(runs / "first", checkpoint=checkpoint, device="cpu", say=QUIET)
    found = predict_test(run, QUIET)
    assert run.recorded_accuracy == found.accuracy == 100 * int(found.hits.sum()) / 355
    assert "to the last image" in agreement(run, found)
    recorded = run.metrics[run.epoch - 1]
    assert found.losses.mean() == pytest.approx(recorded["test_loss"], rel=1e-5)


def test_a_difference_that_rounding_cannot_explain_is_refused(first: LoadedRun) -> None:
    test = first.dataset.test
    wrong = dataclasses.replace(first.dataset, test=Split(test.images, (test.labels + 1) % 10))
    run = dataclasses.replace(first, data=wrong)
    with pytest.raises(AnalysisError, match="--accept-difference"):
        checked_predictions(run, QUIET)
    said: list[str] = []
    checked_predictions(run, said.append, accept_difference=True)
    assert any(line.startswith("WARNING") for line in said)


def test_a_difference_in_answers_as_close_as_rounding_is_explained(
    first: LoadedRun, answers: predictions.Predictions
) -> None:
    logits = answers.logits.copy()
    turned = int(np.flatnonzero(answers.hits)[0])
    other = (answers.labels[turned] + 1) % 10
    logits[turned, other] = logits[turned].max() + 1e-7 * np.abs(logits).max()
    sentence = agreement(first, predictions.Predictions(logits, answers.labels))
    assert "rounding" in sentence and f"{first.recorded_accuracy:.2f}%" in sentence


def test_predictions_csv_tells_the_accuracy_and_the_loss(first: LoadedRun, analysed: Path) -> None:
    with (analysed / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(355))
    assert [int(row["label"]) for row in rows] == first.dataset.test.labels.tolist()
    hits = [row["label"] == row["prediction"] for row in rows]
    assert 100 * sum(hits) / len(rows) == first.recorded_accuracy
    loss = float(np.mean([float(row["loss"]) for row in rows]))
    assert loss == pytest.approx(first.metrics[first.epoch - 1]["test_loss"], rel=1e-4)
    # where the answer is right, the loss is the logarithm of the confidence
    for row, hit in zip(rows, hits, strict=True):
        if hit:
            assert float(row["confidence"]) == pytest.approx(np.exp(-float(row["loss"])), abs=2e-6)


def test_worst_first_is_by_falling_loss_and_wrong_answers_alone(answers: predictions.Predictions) -> None:
    order = worst_first(answers)
    assert len(order) == int((~answers.hits).sum()) > 5
    assert not answers.hits[order].any()
    assert (np.diff(answers.losses[order]) <= 0).all()
    assert len(worst_first(answers, wrong_only=False)) == len(answers)


# pictures


def test_every_picture_and_table_is_written_small_and_not_blank(analysed: Path) -> None:
    missing = set(PICTURES) - {"lr_finder.png"} - {path.name for path in analysed.glob("*.png")}
    assert not missing
    for path in analysed.glob("*.png"):
        assert path.stat().st_size < 300_000, path.name
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
            assert len(image.convert("RGB").getcolors(2**24) or []) > 50, path.name
        assert (pixels[:2] == 255).all() and (pixels[:, :2] == 255).all(), f"{path.name}: something touches the edge"
    for name in ("predictions.csv", "confusion_matrix.csv", "per_class.csv", "report.html"):
        assert (analysed / name).stat().st_size > 0


def test_misclassified_orders_and_classes(answers: predictions.Predictions) -> None:
    surest = misclassified.choose(answers, order="confidence")
    assert (np.diff(answers.confidence[surest]) <= 0).all() and not answers.hits[surest].any()
    shuffled = misclassified.choose(answers, order="random", seed=1)
    assert sorted(shuffled) == sorted(surest) and list(shuffled) != list(surest)
    label = int(answers.labels[surest[0]])
    assert set(answers.labels[misclassified.choose(answers, label=label)]) == {label}
    with pytest.raises(ValueError, match="loss"):
        misclassified.choose(answers, order="worst")


def test_samples_are_the_first_images_of_the_epoch_as_the_plan_augments_them(first: LoadedRun) -> None:
    images, labels = samples.augmented_images(first, 8, epoch=1)
    plan = draw_plan(0, 1, len(first.dataset.train), Augment(flip=False))
    plain, true = first.dataset.train.images, first.dataset.train.labels
    for place in range(8):
        index = plan.indices[place]
        padded = np.pad(plain[index], ((4, 4), (4, 4), (0, 0)))
        window = padded[plan.dy[place] :, plan.dx[place] :][:32, :32].copy()
        top, left = max(plan.cy[place] - 4, 0), max(plan.cx[place] - 4, 0)
        window[top : plan.cy[place] + 4, left : plan.cx[place] + 4] = first.dataset.fill
        assert np.array_equal(images[place], window)
        assert labels[place] == true[index]


def test_the_drawn_schedule_is_the_one_that_was_stepped(first: LoadedRun) -> None:
    schedule = curves.schedule_of(first)
    per_epoch = first.snapshot.steps_per_epoch
    assert [schedule(int(m["epoch"]) * per_epoch - 1) for m in first.metrics] == [m["lr"] for m in first.metrics]
    steps, rates = curves.learning_rates(schedule)
    assert steps == list(range(schedule.total_steps)) and max(rates) == pytest.approx(0.1)


# Grad-CAM


def test_grad_cam_leaves_the_network_untouched(first: LoadedRun) -> None:
    net = first.net
    net.train()
    calls: list[int] = []
    handle = net.layer3.register_forward_hook(lambda *_: calls.append(1))
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    try:
        inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        for method in ("gradcam", "ablationcam", "scorecam"):
            grad_cam.heat_maps(net, inputs, [1, 2], method=method)
        assert net.training and all(module.training for module in net.modules())
        assert not calls
        assert len(net.layer3._forward_hooks) == 1
        assert not any(module._forward_hooks for module in net.modules() if module is not net.layer3)
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert all(p.grad is not None and bool((p.grad == 0.5).all()) for p in net.parameters())
    finally:
        handle.remove()
        net.eval()
        net.zero_grad(set_to_none=True)


def test_grad_cam_picture_shows_right_and_wrong_answers(
    first: LoadedRun, answers: predictions.Predictions, tmp_path: Path
) -> None:
    shown = grad_cam.draw_grad_cam(
        first.net,
        first.dataset.test.images,
        answers,
        first.class_names,
        tmp_path / "grad_cam.png",
        mean=first.snapshot.data.mean,
        std=first.snapshot.data.std,
        count=6,
    )
    assert answers.hits[shown].tolist() == [True] * 3 + [False] * 3
    assert shown[3:].tolist() == worst_first(answers)[:3].tolist()
    known = set(answers.labels[answers.hits])
    assert len(set(answers.labels[shown[:3]])) == min(3, len(known)), "correct images of different classes first"


def test_inputs_of_the_maps_are_normalised_as_in_evaluation(first: LoadedRun, answers: predictions.Predictions) -> None:
    inputs = grad_cam.normalise(first.dataset.test.images[:40], first.snapshot.data.mean, first.snapshot.data.std)
    with torch.no_grad():
        logits = first.net(inputs)
    torch.testing.assert_close(logits, torch.from_numpy(answers.logits[:40]), rtol=1e-4, atol=1e-4)


# the report


class Tags(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


def test_report_is_one_file_that_refers_to_nothing_outside(analysed: Path) -> None:
    page = (analysed / "report.html").read_text(encoding="utf-8")
    tags = parse(page)
    assert not [tag for tag, _ in tags.tags if tag in ("script", "link", "iframe", "object", "embed", "a")]
    for _, attributes in tags.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "action"):
                assert value is not None and value.startswith("data:image/png;base64,")
    assert "url(" not in page and "@import" not in page
    images = [attributes for tag, attributes in tags.tags if tag == "img"]
    assert len(images) == 50 + len(list(analysed.glob("*.png")))
    assert all(attributes.get("alt") for attributes in images)
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    policies = [
        a["content"] for tag, a in tags.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_an_analysis_into_a_folder_of_pictures_neither_removes_nor_shows_them(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("curves.png", "lr_finder.png"):  # a run without an epoch or a range test has neither
        (tmp_path / name).write_bytes(b"mine")
    (copied / "metrics.jsonl").unlink()
    edit_checkpoint(copied / "best.pt", **BEFORE_THE_FIRST_EPOCH)
    page = analyse(copied, output=tmp_path, device="cpu", accept_difference=True, log=QUIET).read_text()
    assert (tmp_path / "lr_finder.png").read_bytes() == (tmp_path / "curves.png").read_bytes() == b"mine"
    assert "Learning rate range test" not in page and "Not drawn: no epoch is finished" in page
    # beside a report of ours the same names are an earlier analysis', and go
    page = analyse(copied, output=tmp_path, device="cpu", accept_difference=True, log=QUIET).read_text()
    assert not (tmp_path / "lr_finder.png").exists() and not (tmp_path / "curves.png").exists()


def test_no_file_of_an_analysis_is_written_through_a_link(copied: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.write_text("mine")
    (copied / "analysis").mkdir()
    flat = RangeTest(tuple(np.geomspace(1e-3, 1, 40).tolist()), (2.0,) * 40, diverged=False)
    write_csv(copied / "lr_finder.csv", flat.rows())
    names = set(FOLDERS["analysis"]) - {"predict.png"}
    for name in names:
        (copied / "analysis" / name).symlink_to(target)
    analyse(copied, device="cpu", log=QUIET)
    assert target.read_text() == "mine"
    written = {path.name for path in (copied / "analysis").iterdir() if path.is_file() and not path.is_symlink()}
    assert written == names
    # nor those of a command alone, or of several runs
    for name in ("predict.png", "compare.png"):
        (tmp_path / name).symlink_to(target)
    Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
    words = [str(copied), str(tmp_path / "image.png"), "--explain", "--output", str(tmp_path), "--device", "cpu"]
    assert predict.main(words) == 0
    other = shutil.copytree(copied, tmp_path / "other")
    assert compare.main([str(copied), str(other), "--output", str(tmp_path / "compare.png"), "--device", "cpu"]) == 0
    for name in ("predict.png", "compare.png"):
        assert not (tmp_path / name).is_symlink() and (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert target.read_text() == "mine"


def test_an_analysis_folder_that_is_a_link_is_refused_by_name(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "curves.png").write_text("mine")
    (copied / "analysis").symlink_to(elsewhere)
    for main in (report.main, curves.main, confusion.main, samples.main):
        assert f"{copied / 'analysis'}: is a symbolic link" in error_of(main, [copied, "--device", "cpu"], capsys)
    assert [(path.name, path.read_text()) for path in elsewhere.iterdir()] == [("curves.png", "mine")]
    assert curves.main([str(copied), "--output", str(elsewhere), "--device", "cpu"]) == 0  # named by the user


def test_report_holds_the_figures_the_recipe_and_the_worst_images(
    first: LoadedRun, answers: predictions.Predictions, analysed: Path
) -> None:
    text = " ".join(parse((analysed / "report.html").read_text(encoding="utf-8")).text)
    assert f"{first.recorded_accuracy:.2f}%" in text
    assert "schedule" in text and "lr_max" in text and first.environment["cpu"] in text
    places = [int(number) for number in re.findall(r"no\. (\d+), loss", text)]
    assert places == worst_first(answers, wrong_only=False)[:50].tolist()


def test_report_escapes_whatever_names_and_values_hold(
    first: LoadedRun, answers: predictions.Predictions, analysed: Path, tmp_path: Path
) -> None:
    hostile = '<img src=x onerror="alert(1)">&amp;\'$x$'
    folder = tmp_path / hostile
    folder.mkdir()
    run = dataclasses.replace(
        first,
        path=folder,
        class_names=tuple(f"</td><script>{i}</script>" for i in range(10)),
        environment={"cpu": "<script>alert(2)</script>", "notes": ["</table><h1>"]},
        notes=["<b>bold</b>", "{{ 7 * 7 }} {% raw %}"],
    )
    scores = confusion.draw_for(answers.labels, answers.predicted, run.class_names, tmp_path, run.caption())
    found = report.reliability(answers.confidence, answers.hits)
    results = report.Results(answers, "<i>fine</i>", scores, found, {"grad_cam.png": "<u>no</u>"})
    tags = parse(render(run, results, tmp_path))
    assert not {"script", "b", "i", "u"} & {tag for tag, _ in tags.tags if tag != "b"}
    assert not [a for _, a in tags.tags if "onerror" in a]
    assert [tag for tag, _ in tags.tags].count("h1") == 1
    text = "".join(tags.text)
    assert hostile in text and "<script>alert(2)</script>" in text and "<b>bold</b>" in text
    assert "{{ 7 * 7 }} {% raw %}" in text and "</td><script>3</script>" in text


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no chromium on the PATH (apt-get install chromium)")


def browse(page: Path, profile: Path, *arguments: str) -> str:
    """Open a page in a headless browser and give what it printed."""
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags = [*quiet.split(), "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}"]
    done = subprocess.run(
        [chromium(), *flags, *arguments, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


@pytest.mark.slow
def test_report_in_a_browser_shows_every_image_in_light_and_dark_and_fits_a_phone(
    analysed: Path, tmp_path: Path
) -> None:
    chromium()
    shots = {}
    for name, scheme in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{name}.png"
        browse(
            analysed / "report.html",
            tmp_path / name,
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=1200,1600",
            "--hide-scrollbars",
            f"--screenshot={shot}",
        )
        with Image.open(shot) as image:
            shots[name] = np.asarray(image.convert("RGB"))
            assert len(image.convert("RGB").getcolors(2**24) or []) > 500, name
    assert shots["light"][5, 5].min() > 200 and shots["dark"][5, 5].max() < 60
    # a copy that may run a script measures itself; the original must be laid out the same
    page = (analysed / "report.html").read_text(encoding="utf-8")
    measure = """<script>addEventListener("load", () => document.title = "measured " + JSON.stringify([innerWidth,
        document.documentElement.scrollWidth, [...document.images].filter(i => !i.naturalWidth).length]))</script>"""
    assert "Content-Security-Policy" in page
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", measure + "</body>")
    (tmp_path / "measured.html").write_text(page, encoding="utf-8")
    dom = browse(tmp_path / "measured.html", tmp_path / "measured", "--window-size=390,800", "--dump-dom")
    match = re.search(r"<title>measured (\[.*?\])</title>", dom)
    assert match, dom[:300]
    inner, scroll, broken = json.loads(match[1])
    assert scroll <= inner <= 600 and broken == 0


# runs that are not whole


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("environment.json", {"precision": [1], "device": {"x": 1}, "device_name": 3, "channels_last": "yes"}),
        ("environment.json", {"precision": True}),
        ("environment.json", [1]),
        ("summary.json", {"test": [1], "last_accuracy": "high", "last_test_tta_accuracy": None}),
        ("summary.json", {"test": {"best.pt": {"epoch": 3}, "last.pt": 7}, "chosen_on": "validation"}),
        ("summary.json", "x"),
    ],
)
def test_records_with_values_that_no_run_writes_are_left_out_and_named(copied: Path, name: str, damage: Any) -> None:
    whole = json.loads((copied / name).read_text())
    (copied / name).write_text(json.dumps(whole | damage if isinstance(damage, dict) else damage))
    said: list[str] = []
    run = load_run(copied, device="cpu", need_data=False, say=said.append)
    run.caption()
    predictions.eval_step(run)
    assert any(line.startswith(f"note: {name}") and "left out" in line for line in said)


def test_an_interrupted_run_is_analysed_with_what_is_there(copied: Path, tmp_path: Path) -> None:
    for name in ("best.pt", "previous.pt", "metrics.jsonl", "summary.json", "environment.json"):
        (copied / name).unlink(missing_ok=True)
    three_steps = {"step": 3, "step_losses": [2.3, 2.2, 2.1], "step_correct": [7, 8, 9]}
    edit_checkpoint(copied / "last.pt", **BEFORE_THE_FIRST_EPOCH | three_steps)
    said: list[str] = []
    page = analyse(copied, device="cpu", log=said.append).read_text(encoding="utf-8")
    assert any("last.pt" in line for line in said), "falling back is said aloud"
    text = " ".join(parse(page).text)
    assert "no best.pt" in text and "no epoch is finished" in text
    assert not (copied / "analysis" / "curves.png").exists()
    assert (copied / "analysis" / "grad_cam.png").exists()


@pytest.mark.parametrize("content", ['{"epoch": 1, "lr"', '{"epoch": 1}\n', "5\n", "\xff"])
def test_damaged_metrics_give_way_to_the_checkpoints_own(copied: Path, content: str) -> None:
    whole = load_run(copied, device="cpu", say=QUIET).metrics
    (copied / "metrics.jsonl").write_text(content, encoding="latin-1")
    run = load_run(copied, checkpoint="last", device="cpu", say=QUIET)
    assert run.metrics == whole
    assert any("metrics.jsonl" in note for note in run.notes)


def test_best_is_taken_unless_last_is_asked_for(runs: Path, copied: Path) -> None:
    assert load_run(copied, device="cpu", need_data=False, say=QUIET).file == "best.pt"
    assert load_run(copied, checkpoint="last", device="cpu", need_data=False, say=QUIET).file == "last.pt"
    (copied / "best.pt").unlink()
    with pytest.raises(AnalysisError, match="--checkpoint last"):
        load_run(copied, checkpoint="best", device="cpu", say=QUIET)


def test_grad_cam_that_cannot_be_imported_leaves_the_rest(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(method: str) -> None:
        raise grad_cam.GradCamUnavailable("operator torchvision::nms does not exist")

    monkeypatch.setattr(grad_cam, "method_class", broken)
    page = analyse(copied, device="cpu", log=QUIET).read_text(encoding="utf-8")
    assert "torchvision::nms does not exist" in page
    assert (copied / "analysis" / "misclassified.png").exists()


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError("operator torchvision::nms does not exist"), "torchvision"),
        (
            ImportError("libGL.so.1: cannot open shared object file: No such file or directory"),
            "opencv-python-headless",
        ),
        (ImportError("libgthread-2.0.so.0: cannot open shared object file: No such file"), "opencv-python-headless"),
    ],
)
def test_an_import_error_of_grad_cam_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str
) -> None:
    class Refuses:
        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name == "pytorch_grad_cam":
                raise error

    for name in [name for name in sys.modules if name.split(".")[0] == "pytorch_grad_cam"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])
    with pytest.raises(grad_cam.GradCamUnavailable, match=rf"{error}.*pip install .*{remedy}"):
        grad_cam.method_class("gradcam")


# errors


@pytest.mark.parametrize("module", [misclassified, samples, grad_cam])
def test_a_count_below_one_is_refused(module: Any, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for count in (0, -5):
        assert "--count" in error_of(module.main, [runs / "first", f"--count={count}"], capsys)


def test_errors_of_folder_and_checkpoint_name_the_remedy(
    runs: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean first?" in error_of(report.main, [runs / "frist"], capsys)
    assert "expected a run folder" in error_of(report.main, [runs / "first" / "best.pt"], capsys)
    assert "neither best.pt nor last.pt" in error_of(report.main, [tmp_path], capsys)
    content = bytearray((copied / "best.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (copied / "best.pt").write_bytes(content)
    damaged = error_of(report.main, [copied, "--device", "cpu"], capsys)
    assert "damaged" in damaged and "last.pt beside it may be whole" in damaged


def test_a_run_that_recorded_the_keys_of_all_data_sets_is_analysed_with_a_note(copied: Path, first: LoadedRun) -> None:
    config = load_checkpoint(copied / "best.pt")["config"]
    config["data"] |= {"synthetic_size": 64, "synthetic_classes": 10, "synthetic_count": 50000}
    edit_checkpoint(copied / "best.pt", config=config)
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    run = load_run(copied, device="cpu", say=QUIET)
    assert run.config == first.config
    assert [note for note in run.notes if note not in first.notes] == [
        "best.pt: left out, as data.name=digits has no such keys: "
        "data.synthetic_size, data.synthetic_classes, data.synthetic_count"
    ]


def test_recipes_over_different_data_sets_differ_in_their_keys_too() -> None:
    digits, noise = (to_dict(recipe(data__name=name)) for name in ("digits", "synthetic"))
    noise["data"]["synthetic_size"] = 64
    assert compare.differing_keys([digits, noise, digits]) == [
        ("data.name", ["digits", "synthetic", "digits"]),
        ("data.synthetic_size", [None, 64, None]),
        ("data.synthetic_classes", [None, 10, None]),
        ("data.synthetic_count", [None, 50000, None]),
    ]
    assert compare.differing_keys([digits, digits]) == []


def test_a_checkpoint_of_another_width_class_count_or_data_is_refused(
    runs: Path, copied: Path, first: LoadedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(runs / "second" / "best.pt", copied / "best.pt")
    assert "net.width=3, but config.yaml beside it says 4" in error_of(report.main, [copied], capsys)
    (copied / "config.yaml").unlink()
    state = load_checkpoint(copied / "last.pt")
    shutil.copy(copied / "last.pt", copied / "best.pt")
    edit_checkpoint(copied / "best.pt", config=state["config"] | {"net": {"width": 5}})
    assert "width 4, its own record says 5" in error_of(report.main, [copied], capsys)
    shutil.copy(copied / "last.pt", copied / "best.pt")
    edit_checkpoint(copied / "best.pt", class_names=[*state["class_names"], "ten"])
    assert "class count 10, its own record says 11" in error_of(report.main, [copied], capsys)
    edit_checkpoint(copied / "best.pt", class_names=state["class_names"])
    foreign = {
        key: value for key, value in load_checkpoint(copied / "best.pt").items() if key not in ("format", "lr_max")
    }
    save_checkpoint(copied / "best.pt", foreign)
    assert "lacks lr_max" in error_of(report.main, [copied], capsys)
    snapshot = load_snapshot(copied / "last.pt")
    with pytest.raises(AnalysisError, match="knows 10 classes, synthetic has 4"):
        fit_data(random_dataset(32, 4, 50), snapshot, "best.pt")
    with pytest.raises(AnalysisError, match="class names are not those"):
        fit_data(random_dataset(32, 10, 50), snapshot, "best.pt")
    with pytest.raises(AnalysisError, match="32 x 32, digits has 40 x 40"):
        other = dataclasses.replace(random_dataset(40, 10, 50), name="digits", class_names=first.class_names)
        fit_data(other, snapshot, "best.pt")


def test_missing_data_say_how_to_name_their_folder(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "config.yaml").unlink()
    state = load_checkpoint(copied / "best.pt")
    state["config"]["data"] |= {"name": "cifar10", "root": str(tmp_path / "nowhere"), "download": True}
    edit_checkpoint(copied / "best.pt", config=state["config"])
    line = error_of(report.main, [copied], capsys)
    assert str(tmp_path / "nowhere") in line and "--data-root" in line
    with pytest.raises(DataError, match="elsewhere"):
        load_run(copied, device="cpu", data_root=tmp_path / "elsewhere", say=QUIET)


def test_unknown_names_get_the_nearest_right_one(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [runs / "first", "--device", "cpu"]
    assert "did you mean layer3?" in error_of(grad_cam.main, [*run, "--layer", "laier3"], capsys)
    assert "no height and width" in error_of(grad_cam.main, [*run, "--layer", "classifier"], capsys)
    assert "did you mean gradcam++?" in error_of(grad_cam.main, [*run, "--method", "gradcam+"], capsys)
    assert "unknown class" in error_of(misclassified.main, [*run, "--class", "eleven"], capsys)
    with pytest.raises(AnalysisError, match="did you mean maple_tree"):
        class_index("maple tre", ["maple_tree", "oak_tree"])
    assert class_index("Maple Tree", ["oak_tree", "maple_tree"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that must be missing")
def test_a_device_that_is_not_there_is_refused_by_the_option_that_asked(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--device cuda" in error_of(report.main, [runs / "first", "--device", "cuda"], capsys)


def test_a_checkpoint_that_would_run_code_is_refused(copied: Path) -> None:
    import pickle
    import zipfile

    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (exec, ("raise SystemError('code has run')",))

    with zipfile.ZipFile(copied / "bomb", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"format": FORMAT, "model": Bomb()}, protocol=2))
        archive.writestr("archive/version", "3\n")
    (copied / "best.pt").write_bytes(seal((copied / "bomb").read_bytes()))
    with pytest.raises(CheckpointError, match="does not hold plain tensors and numbers"):
        load_run(copied, device="cpu", say=QUIET)


@pytest.mark.parametrize(
    "module",
    [
        "report",
        "curves",
        "samples",
        "misclassified",
        "grad_cam",
        "confusion",
        "calibration",
        "predictions",
        "predict",
        "compare",
    ],
)
def test_every_module_has_help_and_a_default_output(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib

    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"analysis.{module}").main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--output" in shown and "--checkpoint" in shown and "python -m analysis" in shown


@pytest.mark.parametrize(
    "module", ["samples", "misclassified", "confusion", "calibration", "predictions", "curves", "grad_cam"]
)
def test_every_module_runs_alone(module: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib

    main = importlib.import_module(f"analysis.{module}").main
    options = ["--count", "3"] if module in ("samples", "misclassified", "grad_cam") else []
    assert main([str(runs / "first"), "--device", "cpu", "--output", str(tmp_path / "out"), *options]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines() if line.startswith(str(tmp_path))]
    assert written and all(path.exists() for path in written)


def test_the_package_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "analysis", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "report.html" in done.stdout


# own images


def test_predict_answers_for_a_file_as_for_the_same_test_image(
    runs: Path, first: LoadedRun, answers: predictions.Predictions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(first.dataset.test.images[17]).save(tmp_path / "seventeen.png")
    assert predict.main([str(runs / "first"), str(tmp_path / "seventeen.png"), "--device", "cpu"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    name, sure = first.class_names[answers.predicted[17]], 100 * answers.confidence[17]
    assert line.startswith(f"{tmp_path / 'seventeen.png'}: {name} {sure:.1f}%")
    assert line.count("%") == 5


def test_predict_names_bad_files_and_answers_for_the_others(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    files = ["text.png", "good.jpg", "cut.jpg", "missing.png", "*.webp"]
    arguments = [str(runs / "first"), *(str(tmp_path / name) for name in files)]
    assert predict.main([*arguments, "--explain", "--device", "cpu", "--output", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    for name in ("text.png", "cut.jpg", "missing.png"):
        assert f"error: {tmp_path / name}: " in err
    assert f"error: {tmp_path / '*.webp'}: matches no file" in err
    assert f"{tmp_path / 'good.jpg'}: " in out and "3 of 4 files" in out
    assert (tmp_path / "out" / "predict.png").exists()


def test_predict_needs_no_data(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "config.yaml").unlink()
    state = load_checkpoint(copied / "best.pt")
    state["config"]["data"] |= {"name": "cifar10", "root": str(tmp_path / "nowhere")}
    edit_checkpoint(copied / "best.pt", config=state["config"])
    Image.new("L", (50, 40), 90).save(tmp_path / "grey.png")
    assert predict.main([str(copied), str(tmp_path / "grey.png"), "--device", "cpu"]) == 0


# several runs


def test_compare_prints_the_table_and_draws(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        str(runs / "first"),
        str(runs / "second"),
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "compare.png"),
    ]
    assert compare.main(arguments) == 0
    out = capsys.readouterr().out
    for name in ("first", "second"):
        run = load_run(runs / name, device="cpu", say=QUIET)
        assert re.search(rf"^{name} .*{run.recorded_accuracy:.2f}%", out, re.M)
    assert re.search(r"^net\.width +4 +3$", out, re.M) and re.search(r"^train\.epochs +3 +1$", out, re.M)
    assert "run.dir" not in out
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_compare_refuses_other_test_sets_and_single_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(compare.main, [runs / "first", runs / "noise", "--device", "cpu"], capsys)
    assert "noise is tested on synthetic, first on digits" in line
    assert "nothing to compare" in error_of(compare.main, [runs / "first"], capsys)
    assert "more than once" in error_of(compare.main, [runs / "first", runs / "first"], capsys)


# speed


@pytest.mark.gpu
def test_ten_thousand_images_at_full_width_take_seconds(runs: Path) -> None:
    run = load_run(runs / "noise", say=QUIET)
    data = random_dataset(32, 10, 50_000)
    net = build(NetOptions(width=64), 10).to(run.runtime.device).eval()
    full = dataclasses.replace(run, net=net, data=data)
    begun = time.perf_counter()
    assert len(predict_test(full, QUIET)) == 10_000
    assert time.perf_counter() - begun < 20
