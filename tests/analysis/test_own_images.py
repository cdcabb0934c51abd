"""A run on a folder of one's own images, from the files to answers for files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training import QUICK

import analysis
import train
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
