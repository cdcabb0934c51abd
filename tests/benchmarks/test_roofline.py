"""benchmarks/roofline.py against plans small enough to compute by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import roofline
from net.resnet import CustomResNet

PLANS = Path(__file__).resolve().parents[1] / "rehearsal" / "plans"
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


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_plan_agrees_with_the_closed_form_and_no_gpu_beats_its_floor(path: Path) -> None:
    plan = roofline.read_plan(path)
    first = 9 * 3 * 64 * 32 * 32  # multiply-adds of the first layer, which has no gradient of the images
    classifier = 512 * 10
    forward = CustomResNet().multiply_adds(32, 32) - classifier
    assert plan["flops_per_step"] == 2 * plan["batch"] * (3 * forward - first)
    assert plan["bytes_per_step"] <= 5.3e9 and plan["kernels_per_step"] <= 130
    for gpu in roofline.GPUS:
        found = roofline.predict(plan, gpu)
        assert found["step_ms"] > found["floor_ms"]
        assert 0 < found["mfu_of_matrix_rate"] < 1
        assert sum(group["bytes"] for group in found["groups"].values()) == plan["bytes_per_step"]


def test_report_is_written_with_the_measurement_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = next(iter(sorted(PLANS.glob("*.json"))))
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


def test_a_file_that_is_no_plan_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    assert roofline.main(["--plan", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: no plan of kernels, it lacks ")


def test_the_files_asked_for_are_whole_and_replace_a_link_and_not_its_target(tmp_path: Path) -> None:
    plan = next((roofline.REHEARSAL / "plans").glob("*.json"))
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in ("r.json", "r.png"):
        (tmp_path / name).symlink_to(mine)
    words = ["--plan", str(plan), "--json", str(tmp_path / "r.json"), "--picture", str(tmp_path / "r.png")]
    assert roofline.main(words) == 0
    assert mine.read_text() == "mine"
    assert json.loads((tmp_path / "r.json").read_text())["kind"] == "predicted"
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = next((roofline.REHEARSAL / "plans").glob("*.json"))
    (tmp_path / "file").write_text("")
    assert roofline.main(["--plan", str(plan), "--json", str(tmp_path / "file" / "r.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
