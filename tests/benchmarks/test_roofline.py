"""benchmarks/roofline.py against plans small enough to compute by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import roofline, tables
from net.resnet import CustomResNet

RECORDED = sorted((Path(__file__).resolve().parents[1] / "rehearsal" / "plans").glob("*.json"))
IDEAL = roofline.Gpu(name="ideal", flops=100.0, bandwidth=10.0, matrix=1.0, copy=1.0, gap=0.5, source="made up")


def plan_of(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "width": 64,
        "batch": 8,
        "dtype": "bfloat16",
        "torch": "0",
        "rows": list(rows),
        "flops_per_step": sum(row["flops"] for row in rows),
    }


def test_step_is_the_longer_of_arithmetic_and_memory_and_the_gaps() -> None:
    fraction = roofline.matrix_fraction("forward", 128, 128)
    convolution = {"group": "convolutions", "what": "forward", "channels": [128, 128], "kernels": 1}
    plan = plan_of(
        convolution | {"bytes": 20, "flops": 1000},
        {"group": "others", "kernels": 3, "bytes": 40, "flops": 0},
    )
    found = roofline.predict(plan, IDEAL)
    arithmetic = 1000 / (100 * fraction)
    assert found["groups"]["convolutions"]["seconds"] == pytest.approx(arithmetic + 0.5)
    assert found["groups"]["convolutions"]["bound"] == "arithmetic"
    assert found["groups"]["others"]["seconds"] == pytest.approx(4 + 3 * 0.5)
    assert found["groups"]["others"]["bound"] == "memory"
    step = arithmetic + 0.5 + 4 + 1.5
    assert found["step_ms"] == pytest.approx(1e3 * step)
    assert found["images_per_second"] == pytest.approx(8 / step)
    assert found["floor_ms"] == pytest.approx(1e3 * 1000 / 100)
    assert found["mfu_of_peak"] == pytest.approx(1000 / step / 100)


def recorded(*recipes: str) -> Any:
    """A test for the recorded plan of each of the recipes, by each pair of versions."""
    plans = [
        (f"{path.stem}, {', '.join(plan['recipes'])}", plan) for path in RECORDED for plan in roofline.read_plans(path)
    ]
    some = [pytest.param(plan, id=name) for name, plan in plans if not recipes or set(recipes) & plan["recipes"].keys()]
    return pytest.mark.parametrize("plan", some)


@recorded()
def test_no_gpu_beats_its_floor(plan: dict[str, Any]) -> None:
    for gpu in roofline.GPUS:
        found = roofline.predict(plan, gpu)
        assert found["step_ms"] > found["floor_ms"]
        assert 0 < found["mfu_of_matrix_rate"] < 1
        assert sum(group["bytes"] for group in found["groups"].values()) == plan["bytes_per_step"]


@recorded("onecycle")
def test_recorded_plan_agrees_with_the_closed_form(plan: dict[str, Any]) -> None:
    first = 9 * 3 * 64 * 32 * 32  # multiply-adds of the first layer, which has no gradient of the images
    classifier = 512 * 10
    forward = CustomResNet().multiply_adds(32, 32) - classifier
    assert plan["flops_per_step"] == 2 * plan["batch"] * (3 * forward - first)
    assert plan["evaluation"]["flops_per_step"] == 2 * plan["evaluation"]["batch"] * forward
    assert plan["bytes_per_step"] <= 5.3e9 and plan["kernels_per_step"] <= 130


# output, input channels and side of each trained convolution of fast94's network behind the whitening; the first is 1x1
FILTERS = (
    (64, 54, 32), (128, 64, 32), (128, 128, 16), (128, 128, 16), (256, 128, 16), (512, 256, 8), (512, 512, 4), (512, 512, 4),
)  # fmt: skip


@recorded("fast94")
def test_recorded_plan_with_whitening_and_muon_agrees_with_the_closed_form(plan: dict[str, Any]) -> None:
    terms = [inputs * (1 if inputs == 54 else 9) for _, inputs, _ in FILTERS]  # of the sum that is an output
    whitening = 54 * 27 * 32**2
    layers = [outputs * n * side**2 for (outputs, _, side), n in zip(FILTERS, terms, strict=True)]
    forward = whitening + sum(layers)
    # the whitening has no gradients, and of its output, which does not depend on any weight, nobody asks for one
    gradients = 2 * sum(layers) - layers[0]
    # Newton-Schulz, five times with the shorter side first: X X', its square, and their combination times X
    muon = 0
    for (outputs, _, _), n in zip(FILTERS, terms, strict=True):
        short, long = sorted((outputs, n))
        muon += 5 * (2 * short**2 * long + short**3)
    by_group = {"convolutions": 2 * plan["batch"] * (forward + gradients), "optimizer": 2 * muon}
    found = roofline.predict(plan, IDEAL)["groups"]
    assert {name: found[name]["flops"] for name in by_group} == by_group
    assert plan["flops_per_step"] == sum(by_group.values())
    assert plan["evaluation"]["flops_per_step"] == 2 * plan["evaluation"]["batch"] * forward


@recorded("fast94")
def test_the_optimizers_move_each_array_of_sgd_once_and_muons_more_often(plan: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in plan["rows"] if row["group"] == "optimizer"}
    filters = sum(outputs * inputs * (1 if inputs == 54 else 9) for outputs, inputs, _ in FILTERS)
    others = 513 * 10 + 2 * sum(outputs for outputs, _, _ in FILTERS)  # classifier, factors and biases of batch norm
    # weight, gradient and momentum in float32 are read, weight and momentum written
    assert rows["sgd"]["bytes"] == pytest.approx(20 * others, abs=100)
    assert rows["muon"]["bytes"] > 20 * filters
    # fifteen products of each shape of filters
    assert rows["muon, products of matrices"]["kernels"] == 15 * len({(o, i) for o, i, _ in FILTERS})


def test_recipe_takes_its_epochs_and_one_evaluation_by_its_views() -> None:
    step = {"group": "others", "kernels": 1, "bytes": 40, "flops": 0}
    plan = plan_of(step) | {
        "recipes": {"a": {"epochs": 2, "views": 1}, "b": {"epochs": 3, "views": 6}},
        "evaluation": plan_of(step | {"bytes": 5}) | {"batch": 999},
    }
    found = roofline.predict_recipes(plan, IDEAL)["recipes"]
    steps, batches = 50_000 // 8, 11  # the last of an evaluation is filled up
    assert found["a"]["seconds"] == pytest.approx(2 * steps * (4 + 0.5) + batches * (0.5 + 0.5))
    assert found["b"]["training_seconds"] == pytest.approx(3 * steps * (4 + 0.5))
    assert found["b"]["evaluation_seconds"] == pytest.approx(6 * batches * (0.5 + 0.5))
    assert roofline.predict_recipes(plan, IDEAL, epochs=1)["recipes"]["b"]["epochs"] == 1


def test_predicted_times_stand_in_a_table_that_says_so(tmp_path: Path) -> None:
    plans = roofline.read_plans(RECORDED[0])
    report = roofline.make_report(plans, None, None) | {"command": "the command"}
    (tmp_path / "a.json").write_text(json.dumps(report))
    block = tables.recipes_block(tmp_path).splitlines()
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in block if "|" in row}
    header = cells["seconds, predicted, not measured"]
    names = [gpu.name for gpu in roofline.GPUS]
    assert header == ["epochs", "views", *names]
    assert cells.keys() >= {f"`{name}`" for name in ("onecycle", "fast94", "fast95", "accurate96")}
    for plan in plans:
        step = roofline.predict(plan, roofline.GPUS[0])["step_ms"] / 1e3
        view = 10 * roofline.predict(plan["evaluation"], roofline.GPUS[0])["step_ms"] / 1e3  # 10,000 images
        for name, recipe in plan["recipes"].items():
            epochs, views, first, *_ = cells[f"`{name}`"]
            assert (int(epochs), int(views)) == (recipe["epochs"], recipe["views"])
            assert float(first) == pytest.approx(recipe["epochs"] * 97 * step + recipe["views"] * view, abs=0.051)
    assert any(row.startswith("Predicted, not measured") and "`the command`" in row for row in block)


def test_report_is_written_with_the_measurement_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = RECORDED[0]
    measured = tmp_path / "throughput.json"
    measured.write_text(json.dumps({"machine": {"gpu": "NVIDIA H200"}, "stages": {"step": {"median": 100_000.0}}}))
    target, picture = tmp_path / "roofline.json", tmp_path / "roofline.png"
    words = ["--plan", str(plan), "--measured", str(measured), "--json", str(target), "--picture", str(picture)]
    assert roofline.main(words) == 0
    report = json.loads(target.read_text())
    assert {"kernels_per_step", "bytes_per_step", "flops_per_step", "predictions"} <= report.keys()
    h200 = next(p for p in report["predictions"] if p["gpu"] == "H200")
    assert report["measured"][0]["ratio"] == pytest.approx(100_000 / h200["images_per_second"])
    assert picture.stat().st_size > 0
    printed = capsys.readouterr().out
    assert "predicted" in printed and "measured on NVIDIA H200" in printed and "error" in printed


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", "H200"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", None),
    ],
)
def test_a_measured_gpu_is_held_against_its_own_prediction(device: str, name: str | None) -> None:
    assert roofline.gpu_of(device) == name


def test_a_file_that_is_no_plan_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    assert roofline.main(["--plan", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: no plan of kernels, it lacks ")


def test_the_files_asked_for_are_whole_and_replace_a_link_and_not_its_target(tmp_path: Path) -> None:
    plan = RECORDED[0]
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in ("r.json", "r.png"):
        (tmp_path / name).symlink_to(mine)
    words = ["--plan", str(plan), "--json", str(tmp_path / "r.json"), "--picture", str(tmp_path / "r.png")]
    assert roofline.main(words) == 0
    assert mine.read_text() == "mine"
    assert json.loads((tmp_path / "r.json").read_text())["figures"] == "predicted"
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = RECORDED[0]
    (tmp_path / "file").write_text("")
    assert roofline.main(["--plan", str(plan), "--json", str(tmp_path / "file" / "r.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
