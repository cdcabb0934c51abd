"""The project as a whole: what the README says, what setup.cfg declares, which way imports run."""

from __future__ import annotations

import ast
import configparser
import json
import re
from pathlib import Path

import pytest

from train.config import reference_table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("dali_pipeline", "net", "train", "analysis", "benchmarks")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, wherever in it; blocks that only type checkers read are passed over."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def test_readme_holds_the_current_table_of_keys() -> None:
    assert reference_table() in README


def test_readme_gives_the_measured_range_test() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "lr_finder.json").read_text(encoding="utf-8"))
    found = ", ".join(f"{run['accuracy']:.2f}" for run in result["found"])
    assert f"| {found} | {result['mean_accuracy_found']:.2f} |" in README
    for row in result["grid"]:
        assert f"| {row['lr_max']:g} | {', '.join(f'{a:.2f}' for a in row['accuracies'])} |" in README
    assert result["ratio_of_found_lr_max"] < 2 and result["ratio_of_found_lr_min"] < 2
    assert result["mean_accuracy_found"] > result["best_of_grid"]["accuracy"] - 0.5


def test_readme_names_every_recipe_and_every_module() -> None:
    for recipe in (ROOT / "configs").glob("*.yaml"):
        assert f"configs/{recipe.name}" in README
    for package in ("dali_pipeline", "net", "train"):
        for path in sources(package):
            assert path.name == "__init__.py" or path.name in README, path


def test_every_file_that_the_readme_names_exists() -> None:
    for name in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README):
        target = name[0] or name[1]
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_readme_explains_every_dependency() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    for line in setup["options"]["install_requires"].splitlines():
        name = re.match(r"[\w-]+", line.strip())
        if name:
            assert f"| {name.group()} |" in README, name.group()


ALLOWED = {
    "net": {"net"},
    "dali_pipeline": {"dali_pipeline"},
    "train": {"train", "dali_pipeline", "net"},
    "analysis": {"analysis", "train", "dali_pipeline", "net"},
}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package: str) -> None:
    for path in sources(package):
        if path == ROOT / "train" / "__main__.py":
            continue  # the command draws the pictures of the run that it made
        ours = {name.split(".")[0] for name in imported(path)} & set(PACKAGES)
        assert ours <= ALLOWED[package], path


def test_dali_and_matplotlib_are_imported_in_one_place_each() -> None:
    for package in PACKAGES[:3]:
        for path in sources(package):
            names = imported(path)
            assert not any(name.startswith("matplotlib") for name in names), path
            if path.name != "dali_graph.py":
                assert not any(name.startswith("nvidia") for name in names), path


def test_every_package_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert set(setup["options"]["packages"].split()) == set(PACKAGES)
