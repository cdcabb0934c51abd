"""What the user has set for matplotlib reaches no picture and stops none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from places import ROOT

from analysis import calibration, confusion, curves, style
from train.disk.atomic import write_csv
from train.step.range_test import RangeTest
from train.step.schedule import OneCycle

HOSTILE: dict[str, Any] = {
    "text.usetex": True,  # needs a LaTeX that is not there
    "font.family": ["no such family"],
    "font.size": 40,
    "figure.facecolor": "black",
    "figure.constrained_layout.use": True,
    "axes.facecolor": "black",
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(color=["red"]),
    "axes.formatter.use_locale": True,
    "image.cmap": "prism",
    "image.origin": "lower",
    "lines.linewidth": 9,
    "savefig.bbox": "tight",
    "savefig.transparent": True,
    "path.sketch": (3, 100, 2),
    "xtick.top": True,
}
METRICS = [
    {"epoch": e, "lr": 0.1, "train_loss": 1 / e, "train_accuracy": 50.0, "test_loss": 2 / e, "test_accuracy": 40.0 + e}
    for e in (1, 2, 3)
]


def draw_range_test(path: Path) -> None:
    rates = tuple(np.geomspace(1e-4, 10, 100).tolist())
    valley = tuple((1 + np.log10(np.asarray(rates) / 0.1) ** 2).tolist())
    write_csv(path.with_suffix(".csv"), RangeTest(rates, valley, False).rows())
    curves.draw_lr_finder(path.with_suffix(".csv"), path)


DRAW: dict[str, Callable[[Path], object]] = {
    "curves": lambda path: curves.draw_curves(METRICS, path, caption="·"),
    "learning rate": lambda path: curves.draw_learning_rate(OneCycle(0.1, 0.01, 10, 30), 10, path),
    "range test": draw_range_test,
    "sheet": lambda path: style.draw_sheet(
        [style.Tile(np.zeros((8, 8, 3), np.uint8), (("a", "red"),))], path, columns=1, title="a", caption="b"
    ),
    "calibration": lambda path: calibration.draw_calibration(
        calibration.reliability(np.linspace(0, 1, 50), np.arange(50) % 2 == 0), path
    ),
    "confusion": lambda path: confusion.draw_confusion(np.array([[3, 1], [0, 4]]), ("a", "b"), path),
}


@pytest.mark.parametrize("name", DRAW)
def test_a_picture_is_the_same_to_the_byte_under_any_settings_and_leaves_them(name: str, tmp_path: Path) -> None:
    DRAW[name](tmp_path / "own.png")
    with matplotlib.rc_context(HOSTILE):
        before = dict(matplotlib.rcParams)
        DRAW[name](tmp_path / "hostile.png")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "hostile.png").read_bytes()


SETTINGS: dict[str, tuple[dict[str, str], bytes | None]] = {
    "a backend of a notebook": ({"MPLBACKEND": "module://matplotlib_inline.no_such"}, None),
    "no backend at all": ({"MPLBACKEND": "nonsense"}, None),
    "a file of settings that is no text": ({}, b"\xff\xfe\x00"),
    "both": ({"MPLBACKEND": "nonsense"}, b"\xff\xfe\x00"),
    "settings that do not exist": ({}, b"backend: nope\nfigure.dpi: many\nnonsense: 3\n"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_damaged_settings_of_the_user_stop_no_picture(name: str, tmp_path: Path) -> None:
    variables, content = SETTINGS[name]
    if content is not None:
        (tmp_path / "matplotlibrc").write_bytes(content)
    code = (
        "import os\nfrom pathlib import Path\nimport numpy as np\nfrom analysis.style import draw_sheet\n"
        "draw_sheet([], Path('picture.png'), columns=1, title='', caption='')\n"
        "print(os.environ.get('MPLBACKEND'), Path.cwd())"
    )
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(variables.get("MPLBACKEND")), str(tmp_path)]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
