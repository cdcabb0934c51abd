"""The wheel: what lies in it, and that the command works from it, away from the checkout."""

from __future__ import annotations

import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml
from places import CONFIGS, ROOT

from train.config import from_dict, load_config

PACKAGES = ("analysis", "configs", "dali_pipeline", "net", "train")
# what is built from; benchmarks and tests are there so that they could get into the wheel
TREE = (*PACKAGES, "benchmarks", "tests", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def missing() -> str | None:
    """What this environment lacks for building a wheel without fetching anything."""
    if importlib.util.find_spec("pip") is None:
        return "pip"
    try:
        found = version("setuptools")
    except PackageNotFoundError:
        return "setuptools"
    return None if int(found.split(".")[0]) >= 69 else f"setuptools 69 or newer (there is {found})"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=f"needs {missing()} to build a wheel"),
]


def environment() -> dict[str, str]:
    """This process's, without what could lead to the checkout."""
    left_out = ("PYTHON", "COV_", "COVERAGE_", "PIP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return {**kept, "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"}


def run(*words: str | Path, cwd: Path) -> str:
    result = subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves folders beside what it builds, and takes up what an earlier build left."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(ROOT / name, tree / name)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, tree, cwd=out)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of a new environment that holds the wheel, and finds this one's other packages, but no checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # a folder that a .pth file names is searched, but its own .pth files, an editable install among them, are not read
    outer = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(purelib) / "outer.pth").write_text("\n".join(outer))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--force-reinstall", wheel, cwd=folder)
    return scripts


def test_the_wheel_holds_the_packages_their_types_and_the_recipes_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        about = email.message_from_bytes(archive.read(metadata))
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    for package in PACKAGES:
        files = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*") if path.is_file()}
        ours = {path.as_posix() for path in files if not re.search(r"__pycache__|/\.", path.as_posix())}
        assert {name for name in names if name.startswith(f"{package}/")} == ours
    assert f"## {about['Version']} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_everything_is_imported_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = f"import importlib\nfor name in {PACKAGES!r}: print(importlib.import_module(name).__file__)"
    files = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert len(files) == len(PACKAGES) and all(Path(file).is_relative_to(installed.parent) for file in files)


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_the_command_prints_the_packaged_recipe_from_any_folder(name: str, installed: Path, tmp_path: Path) -> None:
    printed = run(installed / "cifar-train", "--config", name, "--print-config", cwd=tmp_path)
    assert from_dict(yaml.safe_load(printed)) == load_config(CONFIGS / "quickstart.yaml")


def test_the_command_calls_itself_by_its_name(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "cifar-train", "--help", cwd=tmp_path).startswith("usage: cifar-train ")
    assert run(installed / "python", "-m", "train", "--help", cwd=tmp_path).startswith("usage: python -m train ")


def test_the_command_trains_and_draws_from_any_folder_and_says_which_recipe(installed: Path, tmp_path: Path) -> None:
    words = (
        "train.epochs=1 schedule.peak_epoch=1 schedule.lr_max=0.1 schedule.lr_min=0.01 train.compile=off net.width=2"
    )
    said = run(installed / "cifar-train", "--config", "quickstart", *words.split(), cwd=tmp_path)
    found = re.search(r"^recipe: (.*), as no file quickstart lies here$", said, re.M)
    assert found and Path(found[1]).is_relative_to(installed.parent) and Path(found[1]).name == "quickstart.yaml"
    folder = tmp_path / "runs" / "quickstart"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert (folder / "best.pt").exists() and (folder / "analysis" / "report.html").exists()
