"""A run on a folder of one's own images, from the files to answers for files."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training import QUICK

import analysis
import train
from analysis import predict
from train.config import ConfigError

COLOURS = {"reddish": (200, 60, 60), "greenish": (60, 200, 60)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 files of each of two classes, 80 x 50 pixels, coloured noise that a small network tells apart."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for number in range(60):
            noise = generator.normal(colour, 40, (50, 80, 3))
            Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).save(root / name / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> train.FinishedRun:
    words = [f"{key}={value}" for key, value in QUICK.items() if not key.startswith("data.")]
    folder = tmp_path_factory.mktemp("runs") / "pictures"
    return train.fit(
        "folder",
        f"data.root={pictures}",
        "data.resize=squash",
        "data.validation=20",
        "net.width=4",
        "train.batch_size=16",
        f"run.dir={folder}",
        *(word for word in words if not word.startswith(("net.width", "train.batch_size"))),
    )


def test_a_file_gets_the_answer_of_the_same_image_in_the_data(run: train.FinishedRun, pictures: Path) -> None:
    network = analysis.load(run.folder)
    data = network.dataset
    files = sorted(pictures.glob("*/*.jpg"))
    answers = network.predict(files)
    assert set(network.class_names) == set(COLOURS)
    found = {image.tobytes(): label for image, label in zip(data.test.images, data.test.labels, strict=True)}
    by_file = [found.get(pixels.tobytes()) for pixels in (read(file) for file in files)]
    there = np.array([label is not None for label in by_file])
    assert there.sum() == len(data.test) > 10
    right = answers.labels[there] == [label for label in by_file if label is not None]
    assert 100 * right.mean() == pytest.approx(network.evaluate()["test"])
    assert run.accuracy > 80


def read(file: Path) -> np.ndarray:  # type: ignore[type-arg]
    with Image.open(file) as image:
        return np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))


def test_a_file_that_has_changed_since_is_noticed_when_the_run_goes_on(
    run: train.FinishedRun, pictures: Path, tmp_path: Path
) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    assert train.fit(f"{run.folder}/config.yaml", f"data.root={other}", resume=True).accuracy == run.accuracy
    Image.new("RGB", (40, 40), (1, 2, 3)).save(other / "reddish" / "0.jpg")
    with pytest.raises(ConfigError, match="not what the run was trained on"):
        train.fit(f"{run.folder}/config.yaml", f"data.root={other}", resume=True)


def test_from_python_many_files_get_the_answers_of_their_pixels_among_images_of_other_kinds(
    run: train.FinishedRun, pictures: Path, tmp_path: Path
) -> None:
    network, files = analysis.load(run.folder), sorted(pictures.glob("*/*.jpg"))
    pixels = [read(file) for file in files]
    expected = network.predict(pixels).probabilities
    mixed = [pixels[place] if place % 5 == 1 else file for place, file in enumerate(files)]
    for given in (files, mixed, iter(mixed)):
        np.testing.assert_allclose(network.predict(given).probabilities, expected, atol=1e-6)
    (tmp_path / "broken.jpg").write_bytes(files[0].read_bytes()[:300])
    with pytest.raises(analysis.UserError, match=r"broken\.jpg: cannot be read"):
        network.predict([*files[:90], tmp_path / "broken.jpg", *files[90:]])


# analysis.predict


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """A folder of new images with a broken one, odd names, a folder below and files of other kinds."""
    root = tmp_path / "new, ones"
    (root / "deeper").mkdir(parents=True)
    generator = np.random.default_rng(1)
    names = ['a "quoted".png', "b\nbroken line.png", os.fsdecode(b"c\xff.png"), "deeper/d.png", "deeper/e.png"]
    for name, colour in zip(names, [*COLOURS.values(), *COLOURS.values(), COLOURS["reddish"]], strict=True):
        noise = generator.normal(colour, 40, (40, 40, 3))
        Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).save(root / name)
    (root / "deeper" / "broken.png").write_bytes((root / "deeper" / "d.png").read_bytes()[:300])
    (root / "notes.txt").write_text("no image", encoding="utf-8")
    (root / ".hidden.png").write_bytes(b"")
    return root


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_table_of_a_folder_says_what_the_network_says_of_each_file(
    run: train.FinishedRun, messy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "answers.csv"
    assert predict.main([str(run.folder), str(messy), "--csv", str(out), "--top", "9"]) == 2
    said, errors = capsys.readouterr()
    rows = table(out)
    names = [row["path"].removeprefix(f"{messy}/") for row in rows]
    assert names == [
        'a "quoted".png',
        "b\nbroken line.png",
        "c\\xff.png",
        "deeper/broken.png",
        "deeper/d.png",
        "deeper/e.png",
    ]
    assert "1 of 6 files could not be read" in said and "1 .txt" in said
    assert errors.count("error: ") == 1 and "broken.png" in errors
    files = sorted((path for path in messy.rglob("*.png") if path.name[0] not in ".b"), key=os.fsencode)
    files.insert(1, messy / "b\nbroken line.png")
    answers = analysis.load(run.folder).predict(files)
    whole = [row for row in rows if not row["error"]]
    assert [row["label"] for row in whole] == list(answers.names) and len(set(answers.names)) == 2
    second = 1 - answers.labels
    for row, sure, other in zip(whole, answers.probabilities, second, strict=True):
        assert float(row["probability"]) == pytest.approx(sure.max(), abs=1e-5)
        assert row["label_2"] == list(COLOURS)[::-1][other] and float(row["probability_2"]) <= 0.5
    (broken,) = (row for row in rows if row["error"])
    assert broken["label"] == broken["probability_2"] == "" and "broken.png" in broken["error"]


def test_answers_do_not_depend_on_how_files_are_named_or_batched(
    run: train.FinishedRun,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(pictures))
    ways = {
        "home": ["~/**/*.jpg"],
        "folder": [pictures],
        "pattern": [f"{pictures}/**/*.jpg"],
        "files": sorted(pictures.glob("*/*.jpg"), key=os.fsencode),
        "again": [f"{pictures}/*", pictures / "greenish" / "7.jpg"],
    }
    for name, words in ways.items():
        assert predict.main([str(run.folder), *map(str, words), "--csv", str(tmp_path / f"{name}.csv")]) == 0
    first, *others = (table(tmp_path / f"{name}.csv") for name in ways)
    assert len(first) == 120 and all(other == first for other in others)
    monkeypatch.setattr("dali_pipeline.image_files.BATCH_FILES", 7)
    assert predict.main([str(run.folder), str(pictures), "--csv", str(tmp_path / "small.csv")]) == 0
    small = table(tmp_path / "small.csv")
    for ours, theirs in zip(small, first, strict=True):
        assert ours["path"] == theirs["path"] and ours["label"] == theirs["label"]
        assert float(ours["probability"]) == pytest.approx(float(theirs["probability"]), abs=1e-4)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{new}", "--csv", "{new}"], "is a folder; name a file in it"),
        (["{new}", "--csv", "{new}/a.png"], "bears the name of an image"),
        ([""], "an empty name"),
        (["{new}/*.gif"], "matches no file"),
        (["~no such user/*.png"], "no home is known for its ~"),
        (["{empty}"], "holds no image; read are .jpg"),
    ],
)
def test_words_that_name_no_file_end_it_before_any_work(
    words: list[str], message: str, messy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    given = [word.format(new=messy, empty=tmp_path / "empty") for word in words]
    assert predict.main([str(tmp_path / "no such run"), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
