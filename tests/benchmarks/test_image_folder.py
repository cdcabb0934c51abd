"""throughput.py --folder: what it measures of files, on a few of them; no times."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import image_folder, tables, throughput
from benchmarks.measure import Rate

pytest.importorskip("torchvision")


@pytest.fixture(params=["train and test", "classes"])
def pictures(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """80 images: two splits of 40, or two classes of 40."""
    root = tmp_path / "pictures"
    generator = np.random.default_rng(0)
    splits = ("train/ash", "train/birch", "test/ash", "test/birch")
    for name in splits if request.param != "classes" else ("ash", "birch", "ash/more", "birch/more"):
        (root / name).mkdir(parents=True)
        for number in range(20):
            image = generator.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(image).save(root / name / f"{number}.jpg")
    return root


def test_every_way_of_the_same_files_is_measured_and_the_users_folder_stays_as_it_was(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_folder, "WORKERS", 0)
    out = tmp_path / "r.json"
    before = sorted(pictures.rglob("*"))
    words = [
        "--folder",
        str(pictures),
        "--repeats",
        "2",
        "--json",
        str(out),
        "train.batch_size=16",
        "data.backend=torch",
        *(["data.test=40"] if (pictures / "ash").exists() else []),
    ]
    assert throughput.main(words) == 0
    assert sorted(pictures.rglob("*")) == before
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads(out.read_text(encoding="utf-8")) and str(tmp_path) not in report["command"]
    assert report["kind"] == "image_folder" and report["stages"].keys() == image_folder.LABELS.keys()
    assert all(len(stage["samples"]) == 2 and stage["median"] > 0 for stage in report["stages"].values())
    assert report["ratios"].keys() == image_folder.RATIOS.keys()
    settings = report["settings"]
    assert (settings["images"], settings["training_images"], settings["largest_difference"]) == (80, 40, 0)
    assert settings["augment"]["pad"] == 4 and settings["image_size"] == [32, 32]
    table = "\n".join(tables.folder_table(report))
    ratio = report["ratios"]["resident_over_image_folder"]
    assert report["command"] in table and (f" {ratio:.1f}x " in table or f" {ratio:.0f}x " in table)


def test_ratios_are_medians_of_rounds() -> None:
    rates = {name: Rate((4.0, 2.0, 30.0)) for name in image_folder.LABELS} | {"image_folder": Rate((1.0, 1.0, 10.0))}
    found = image_folder.ratios(rates)
    assert found["resident_over_image_folder"] == 3.0 and found["decode_over_image_folder_plain"] == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--folder", "{root}/nothing"], "no such folder"),
        (["--folder", "{root}", "--ablations"], "--ablations: does not go with --folder"),
        (["--folder", "{root}", "--data-root", "{root}"], "--data-root: does not go with --folder"),
        (["--folder", "{root}"], "holds no folder of a class"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert throughput.main([word.format(root=tmp_path / "empty") for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
