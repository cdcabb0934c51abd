"""The analysis and the export print every line, whatever standard output can write and whatever the run is called."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training import QUICK

from analysis import compare, curves, predict, samples
from train import export
from train.config import Config, changed
from train.run import fit
from train.screen.log import Log

COMMANDS: dict[str, tuple[Callable[[list[str]], int], list[str], str]] = {
    "curves": (curves.main, ["RUN"], "learning_rate.png"),
    "samples": (samples.main, ["RUN"], "samples.png"),
    "predict": (predict.main, ["RUN", "IMAGE"], "%"),
    "compare": (compare.main, ["RUN", "OTHER", "--output", "PICTURE"], "compare.png"),
    "export": (export.main, ["RUN"], "model.safetensors"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in a folder whose name holds an escape code, a line break and bytes that are no UTF-8."""
    folder = tmp_path_factory.mktemp("runs") / "läuft\x1b[31m\nrot \udcff"
    short = {"train.epochs": 1, "schedule.peak_epoch": 0.5, "net.width": 1, "data.backend": "torch"}
    fit(changed(Config(), QUICK | short), folder, log=Log(quiet=True))
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder.parent / "image\n.png")
    shutil.copytree(folder, folder.parent / "other")
    return folder


@pytest.mark.parametrize(
    ("name", "encoding"), [*((name, "ascii") for name in COMMANDS), ("predict", "cp1252"), ("predict", "utf-8")]
)
def test_every_command_prints_all_its_lines(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, encoding: str
) -> None:
    main, words, last = COMMANDS[name]
    if name == "export":
        pytest.importorskip("safetensors")
    places = {"RUN": run, "OTHER": run.parent / "other", "IMAGE": run.parent / "image\n.png"}
    places["PICTURE"] = tmp_path / "compare.png"
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="strict"))
    assert main([str(places.get(word, word)) for word in words]) == 0
    text = written.getvalue().decode(encoding)
    assert last in text.splitlines()[-1]
    assert "\x1b" not in text and r"\x1b[31m\nrot \udcff" in text
