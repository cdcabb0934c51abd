"""The parts of the analysis against computations of their own: Grad-CAM, calibration, confusion, McNemar, image reading."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from places import ROOT
from torch import Tensor, nn
from torch.nn import functional as F

from analysis import calibration, compare, confusion, curves, grad_cam, predictions, style
from analysis.plotting import Figure
from analysis.predictions import Predictions
from net.network import build
from net.options import NetOptions
from net.resnet import CustomResNet
from train.disk.atomic import write_csv
from train.options import OptimOptions, TrainOptions
from train.step.measures import measures_of
from train.step.range_test import RangeTest, suggest
from train.step.schedule import OneCycle
from train.step.steps import EvalStep


@pytest.fixture(scope="module")
def net() -> CustomResNet:
    """Random weights, and batch-norm statistics of random images so that the maps are not degenerate."""
    torch.manual_seed(0)
    result = CustomResNet(7, 4)
    with torch.no_grad():
        for _ in range(20):
            result(torch.randn(16, 3, 32, 32))
    return result.eval()


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def own_map(net: nn.Module, image: Tensor, label: int, layer: nn.Module, positionwise: bool) -> np.ndarray:
    """Grad-CAM of one image (3, H, W) by autograd: relu(sum of channels weighted by d logit / d channel), scaled, enlarged.

    `positionwise`: LayerCAM, where every place has its own weight, the positive part of its gradient.
    """
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    logit = net(image[None])[0, label]
    handle.remove()
    (gradient,) = torch.autograd.grad(logit, kept[0])
    weights = gradient.clamp(min=0) if positionwise else gradient.mean((2, 3), keepdim=True)
    heat = (weights * kept[0]).sum(1, keepdim=True).clamp(min=0).detach()
    heat = (heat - heat.min()) / (heat.max() - heat.min() + 1e-7)
    heat = F.interpolate(heat, size=image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    return ((heat - heat.min()) / (heat.max() - heat.min() + 1e-7)).numpy()


@pytest.mark.parametrize(("method", "positionwise"), [("gradcam", False), ("layercam", True)])
@pytest.mark.parametrize("layer", ["layer1", "layer2", "layer3.0", "layer3"])
def test_maps_equal_those_by_autograd(
    net: CustomResNet, inputs: Tensor, layer: str, method: str, positionwise: bool
) -> None:
    labels = [0, 1, 6, 3, 3]
    maps = grad_cam.heat_maps(net, inputs, labels, layer=layer, method=method)
    assert maps.shape == (5, 32, 32) and maps.dtype == np.float32
    module = net.get_submodule(layer)
    for image, label, found in zip(inputs, labels, maps, strict=True):
        np.testing.assert_allclose(found, own_map(net, image, label, module, positionwise), atol=2e-3)
    assert maps.max() > 0.9


def test_maps_of_a_whitened_network_equal_those_by_autograd(inputs: Tensor) -> None:
    torch.manual_seed(0)
    net = build(NetOptions(width=4, whitening=True, activation="gelu"), 7)
    net.prepare(inputs)
    net.train()(inputs)  # statistics of the norms
    net.eval()
    (found,) = grad_cam.heat_maps(net, inputs[:1], [3], layer="layer3.0")
    np.testing.assert_allclose(found, own_map(net, inputs[0], 3, net.get_submodule("layer3.0"), False), atol=2e-3)
    assert not net.get_parameter("whitening.weight").requires_grad


def test_every_method_gives_maps_between_0_and_1(net: CustomResNet, inputs: Tensor) -> None:
    for method in grad_cam.METHODS:
        maps = grad_cam.heat_maps(net, inputs[:2], [1, 2], method=method)
        assert maps.shape == (2, 32, 32), method
        assert np.isfinite(maps).all() and maps.min() >= 0 and maps.max() <= 1 + 1e-6, method


def test_maps_do_not_mind_the_callers_modes_and_precision(net: CustomResNet, inputs: Tensor) -> None:
    expected = grad_cam.heat_maps(net, inputs[:2], [1, 2])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        frozen = CustomResNet(7, 4)
        frozen.load_state_dict(net.state_dict())
        frozen.requires_grad_(False).train()
        found = grad_cam.heat_maps(frozen, inputs[:2], [1, 2])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_maps_of_images_in_one_batch_are_those_of_each_alone(net: CustomResNet, inputs: Tensor) -> None:
    together = grad_cam.heat_maps(net, inputs, [0, 1, 2, 3, 4])
    for place in range(5):
        alone = grad_cam.heat_maps(net, inputs[place : place + 1], [place])
        np.testing.assert_allclose(alone[0], together[place], atol=1e-4)


def test_the_network_never_sees_more_at_once_than_memory_has_room_for(
    net: CustomResNet, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = grad_cam.heat_maps(net, inputs, [0, 1, 2, 3, 4])
    sizes: list[int] = []
    forward = CustomResNet.forward

    def counted(self: CustomResNet, images: Tensor) -> Tensor:
        sizes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(CustomResNet, "forward", counted)
    monkeypatch.setattr(grad_cam, "PIXELS_AT_ONCE", 2 * 32 * 32)
    np.testing.assert_allclose(grad_cam.heat_maps(net, inputs, [0, 1, 2, 3, 4]), together, atol=1e-4)
    assert max(sizes) == 2
    sizes.clear()
    step = EvalStep(net, (0.0,) * 3, (1.0,) * 3, channels_last=False).eval()
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    found = [predictions.logits_of(step, images, torch.device("cpu"), size) for size in (5, 2)]
    assert sizes == [5, 2, 2, 1]
    torch.testing.assert_close(found[0], found[1])


# calibration


def test_calibration_error_equals_the_one_computed_by_hand() -> None:
    confidence = np.array([0.15, 0.2, 0.55, 0.6, 0.95, 1.0])
    hits = np.array([False, True, True, False, True, True])
    found = calibration.reliability(confidence, hits, bins=5)
    # bins (0, .2], (.2, .4], (.4, .6], (.6, .8], (.8, 1]; gaps |0.5 - 0.175|, |0.5 - 0.575|, |1 - 0.975|
    assert found.counts.tolist() == [2, 0, 2, 0, 2]
    assert found.ece == pytest.approx((2 * 0.325 + 2 * 0.075 + 2 * 0.025) / 6)
    assert found.overconfidence == pytest.approx(confidence.mean() - hits.mean())


def test_a_calibrated_source_has_a_small_error_and_a_boastful_one_a_large() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, 50_000)
    hits = rng.uniform(size=50_000) < confidence
    assert calibration.reliability(confidence, hits).ece < 0.01
    boastful = calibration.reliability(np.minimum(confidence + 0.2, 1), hits)
    assert 0.1 < boastful.ece == pytest.approx(boastful.overconfidence, abs=0.02)


def test_calibration_edges() -> None:
    found = calibration.reliability(np.array([0.0, 1.0]), np.array([False, True]), bins=10)
    assert found.counts.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1] and found.ece == 0
    with pytest.raises(ValueError, match="0 confidences"):
        calibration.reliability(np.array([]), np.array([], bool))


# confusion


def test_confusion_rows_sum_to_support_and_scores_follow_from_it() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, 400), rng.integers(0, 5, 400)
    labels[labels == 4] = 3  # a class that never occurs
    counts = confusion.confusion(labels, predicted, 5)
    by_hand = np.zeros((5, 5), int)
    for true, said in zip(labels, predicted, strict=True):
        by_hand[true, said] += 1
    assert np.array_equal(counts, by_hand)
    names = ("a", "b", "c", "d", "e")
    scores = confusion.per_class(labels, predicted, names)
    assert [s.support for s in scores] == counts.sum(1).tolist()
    for i, score in enumerate(scores):
        said, true = counts[:, i].sum(), counts[i].sum()
        assert score.precision == pytest.approx(counts[i, i] / said)
        assert score.recall == (pytest.approx(counts[i, i] / true) if true else 0)
        assert score.f1 == (pytest.approx(2 * counts[i, i] / (said + true)) if true else 0)
    pairs = confusion.most_confused(labels, predicted, 5, 3)
    assert [n for _, _, n in pairs] == sorted(int(counts[i, j]) for i in range(5) for j in range(5) if i != j)[-3:][
        ::-1
    ]
    assert all(counts[true, said] == n and true != said for true, said, n in pairs)


def test_a_class_without_test_images_is_not_among_those_known_least() -> None:
    """Its scores are 0, as there is nothing to divide by."""
    scores = [confusion.ClassScore(str(n), n / 300, n / 300, n / 300, n % 2) for n in range(300)]
    shown, title = confusion.known_least(scores)
    assert [score.name for score in shown] == [str(n) for n in range(1, 101, 2)]
    assert "50 of 150 tested classes" in title
    assert [score.name for score in confusion.known_least(scores[:3])[0]] == ["0", "1", "2"]


def test_a_hundred_classes_with_long_names_are_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = tuple(f"a_rather_long_name_{i}" for i in range(100))
    labels = np.arange(100).repeat(20)
    predicted = np.where(rng.uniform(size=2000) < 0.7, labels, rng.integers(0, 100, 2000))
    confusion.draw_for(labels, predicted, names, tmp_path, "caption")
    for name in ("confusion_matrix.png", "per_class.png"):
        assert 10_000 < (tmp_path / name).stat().st_size < 300_000


def test_of_ten_thousand_classes_the_most_confused_and_the_least_known_are_shown(tmp_path: Path) -> None:
    names = tuple(f"class_{i}" for i in range(10_000))
    labels = np.arange(10_000).repeat(2)
    predicted = labels.copy()
    predicted[2 * 7000 : 2 * 7000 + 2] = 3  # both images of class 7000, and one of class 41
    predicted[2 * 41] = 9999
    confusion.draw_for(labels, predicted, names, tmp_path, "caption")
    assert confusion.most_confused(labels, predicted, 10_000) == [(7000, 3, 2), (41, 9999, 1)]
    for name in ("confusion_matrix.png", "per_class.png"):
        with Image.open(tmp_path / name) as image:
            assert max(image.size) < 4000
    with (tmp_path / "confusion_matrix.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["true", "predicted", "images"] and len(rows) == 10_002
    assert ["class_7000", "class_3", "2"] in rows and sum(int(row[2]) for row in rows[1:]) == 20_000


# comparison


def test_mcnemar_and_the_interval_equal_their_closed_forms() -> None:
    ours = np.array([True] * 12 + [False] * 3 + [True] * 70 + [False] * 15)
    theirs = np.array([False] * 12 + [True] * 3 + [True] * 70 + [False] * 15)
    found = compare.paired_difference(ours, theirs)
    assert (found.gained, found.lost) == (12, 3) and found.points == pytest.approx(9)
    tail = sum(math.comb(15, k) for k in range(4)) / 2**15
    assert found.p_value == pytest.approx(2 * tail)
    middle = 9 / 102
    half = 1.959963985 * math.sqrt(16 - 81 / 102) / 102
    assert (found.low, found.high) == pytest.approx((100 * (middle - half), 100 * (middle + half)), rel=1e-6)
    mirrored = compare.paired_difference(theirs, ours)
    assert (mirrored.points, mirrored.low, mirrored.high) == pytest.approx((-found.points, -found.high, -found.low))


def test_equal_answers_differ_by_nothing_with_an_interval_around_it() -> None:
    same = np.array([True, False, True])
    found = compare.paired_difference(same, same)
    assert found.points == 0 and found.p_value == 1 and found.low < 0 < found.high
    with pytest.raises(ValueError, match="same"):
        compare.paired_difference(same, same[:2])


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(600):
        kind = rng.choice(4, size=500, p=[0.05, 0.03, 0.82, 0.10])  # gained, lost, both right, both wrong
        found = compare.paired_difference(np.isin(kind, (0, 2)), np.isin(kind, (1, 2)))
        covered += found.low <= 2.0 <= found.high
    assert 0.92 <= covered / 600 <= 0.98


def test_names_are_as_long_as_it_takes_to_tell_them_apart(tmp_path: Path) -> None:
    assert compare.distinct_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert compare.distinct_names([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]


# style


def test_tiles_are_enlarged_pixel_for_pixel(tmp_path: Path) -> None:
    tile = np.random.default_rng(0).integers(0, 200, (32, 32, 3), dtype=np.uint8)
    tile[..., 0] |= 1
    tile[..., 2] &= 254  # never grey, as all the text around it is
    style.draw_sheet(
        [style.Tile(tile, (("a label", "black"),))], tmp_path / "sheet.png", columns=1, title="t", caption="c", scale=4
    )
    with Image.open(tmp_path / "sheet.png") as image:
        page = np.asarray(image.convert("RGB")).astype(int)
    coloured = (page[..., 0] != page[..., 2]) | (page[..., 0] != page[..., 1])
    top, left = np.flatnonzero(coloured.any(1))[0], np.flatnonzero(coloured.any(0))[0]
    assert np.array_equal(page[top : top + 128, left : left + 128], tile.repeat(4, 0).repeat(4, 1))


def test_a_training_loss_that_is_not_the_tests_is_told() -> None:
    """With smoothed labels or weighed classes, the losses of training and test differ even where the network answers alike."""
    assert curves.loss_label(OptimOptions()) == "training, augmented"
    assert curves.loss_label(OptimOptions(label_smoothing=0.2)) == "training, augmented, labels smoothed"
    both = OptimOptions(label_smoothing=0.1, class_weights="balanced")
    assert curves.loss_label(both) == "training, augmented, labels smoothed, classes weighed"


def test_hostile_text_is_printed_and_not_interpreted(tmp_path: Path) -> None:
    assert style.plain("a$b$c") == r"a\$b\$c"
    assert style.plain("line\nbreak\x00") == "line\N{REPLACEMENT CHARACTER}break\N{REPLACEMENT CHARACTER}"
    assert len(style.plain("x" * 500)) == 90
    hostile = "\\frac{$\\undefined$}% \N{SNOWMAN} 漢字 \U0001f600"
    metrics = [
        {"epoch": 1, "lr": 0.1, "train_loss": 2.0, "test_loss": 1.5, "train_accuracy": 20.0, "test_accuracy": 30.0}
    ]
    curves.draw_curves(metrics, tmp_path / "curves.png", title=hostile, caption=hostile)
    schedule = OneCycle(0.1, 0.01, 5, 10)
    curves.draw_learning_rate(schedule, 5, tmp_path / "rate.png", metrics=metrics, title=hostile, caption=hostile)
    tile = style.Tile(np.zeros((32, 32, 3), np.uint8), ((style.pretty(hostile), "black"),))
    style.draw_sheet([tile, None], tmp_path / "sheet.png", columns=2, title=hostile, caption=hostile)
    style.draw_sheet([], tmp_path / "empty.png", columns=8, title="none", caption=hostile)


def test_percentages_say_everything_and_nothing_only_of_what_is() -> None:
    assert [style.percent(p) for p in (1.0, 0.9999, 0.996, 0.87, 0.001)] == ["100%", "99.9%", "99.6%", "87%", "<1%"]


def test_long_schedules_are_thinned_but_keep_peak_and_ends() -> None:
    schedule = OneCycle(1.0, 0.1, 33_333.4, 100_000)
    steps, rates = curves.learning_rates(schedule, points=500)
    assert len(steps) < 510 and {0, 33_333, 33_334, 99_999} <= set(steps)
    assert rates == [schedule(step) for step in steps]


def test_predictions_check_their_shapes_and_rank_the_second_choice() -> None:
    found = Predictions(np.array([[1.0, 3.0, 2.0], [5.0, 0.0, 4.9]], np.float32), np.array([2, 0]))
    assert found.predicted.tolist() == [1, 0] and found.runner_up().tolist() == [2, 2]
    assert found.accuracy == 50 and found.close_calls(0.2) == 1
    assert found.losses[0] == pytest.approx(math.log(math.exp(1) + math.exp(3) + math.exp(2)) - 2)
    with pytest.raises(ValueError, match="expected"):
        Predictions(np.zeros((3, 2), np.float32), np.zeros(2, np.int64))


def test_drawing_needs_no_pyplot_no_backend_and_no_compiler() -> None:
    code = "import sys, analysis.curves, analysis.report\n"
    code += "sys.exit(bool({'matplotlib.pyplot', 'torch._dynamo'} & sys.modules.keys()))"
    environment = {"MPLBACKEND": "tkagg", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_picture_of_a_range_test_marks_the_rates_used_or_says_why_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(curves, "save", lambda figure, path: drawn.append(figure))
    rates = tuple(np.geomspace(1e-4, 10, 100).tolist())
    valley = tuple((1 + np.log10(np.asarray(rates) / 0.1) ** 2).tolist())
    write_csv(tmp_path / "found.csv", RangeTest(rates, valley, False).rows())
    write_csv(tmp_path / "given.csv", RangeTest(rates, valley[::-1][:50] * 2, False).rows())
    write_csv(tmp_path / "none.csv", RangeTest(rates[:5], valley[:5], True).rows())
    found = suggest(RangeTest(rates, valley, False))
    curves.draw_lr_finder(tmp_path / "found.csv", tmp_path / "a.png")
    curves.draw_lr_finder(tmp_path / "given.csv", tmp_path / "b.png", used=(0.5, 0.01))
    curves.draw_lr_finder(tmp_path / "none.csv", tmp_path / "c.png")
    labels = [[text.get_text() for text in figure.axes[0].get_legend().get_texts()] for figure in drawn]
    assert {f"lr_max {found.lr_max:.3g}", f"lr_min {found.lr_min:.3g}"} <= set(labels[0])
    assert {"lr_max 0.5", "lr_min 0.01"} <= set(labels[1])
    assert not any("lr_max" in label for label in labels[2])
    assert "diverged after 5 steps" in drawn[2].get_suptitle()


def test_the_picture_of_the_schedule_says_whose_rate_it_is_beside_muon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(curves, "save", lambda figure, path: drawn.append(figure))
    schedule = OneCycle(0.4, 0.01, 5, 10)
    for peak in (None, 0.2):
        curves.draw_learning_rate(schedule, 5, tmp_path / "rate.png", filters_peak=peak)
    alone, beside = (figure.axes[0].get_title() for figure in drawn)
    assert alone == "" and "of SGD" in beside and "Muon" in beside and "to 0.2 at the peak" in beside


def test_no_two_curves_look_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every view, and the average of the weights beside them."""
    drawn: list[Figure] = []
    monkeypatch.setattr(curves, "save", lambda figure, path: drawn.append(figure))
    keys = [m.key for m in measures_of(TrainOptions(tta="shift", ema_decay=0.9))]
    line = {f"{key}_{what}": 50.0 for key in keys for what in ("accuracy", "loss")}
    metrics = [{"epoch": epoch, "train_loss": 1.0, "train_accuracy": 40.0, **line} for epoch in (1, 2)]
    curves.draw_curves(metrics, tmp_path / "curves.png")
    lines = [line for line in drawn[0].axes[1].get_lines() if not str(line.get_label()).startswith("_")]
    assert len(lines) == 1 + len(keys) == 7
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines)


PLAIN = ("test", "ema_test")


def test_a_view_of_the_last_epoch_alone_is_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of one point shows nothing."""
    drawn: list[Figure] = []
    monkeypatch.setattr(curves, "save", lambda figure, path: drawn.append(figure))
    keys = [m.key for m in measures_of(TrainOptions(tta="shift", ema_decay=0.9))]
    metrics = [
        {"epoch": epoch, "train_loss": 1.0, "train_accuracy": 40.0}
        | {f"{key}_{what}": 50.0 for key in keys for what in ("accuracy", "loss") if epoch == 3 or key in PLAIN}
        for epoch in (1, 2, 3)
    ]
    curves.draw_curves(metrics, tmp_path / "curves.png")
    lines = [line for line in drawn[0].axes[1].get_lines() if not str(line.get_label()).startswith("_")]
    points = [line for line in lines if np.isfinite(np.asarray(line.get_ydata(), float)).sum() == 1]
    assert len(points) == len(keys) - len(PLAIN) == 4
    assert all(line.get_marker() != "None" for line in points)
    assert len({(line.get_color(), line.get_marker()) for line in points}) == 4
    assert {str(line.get_label()).rpartition(" ")[2] for line in points} == {"50.00%"}
