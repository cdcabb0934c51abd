"""The project as a whole: what the README says, and what setup.cfg declares."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path

import pytest
from places import ROOT

from train.config import reference_table

README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("dali_pipeline", "net", "train", "analysis", "benchmarks")


def sources(package: str) -> list[Path]:
    """The files of a package and of its sub-packages."""
    return sorted((ROOT / package).rglob("*.py"))


def tree() -> dict[str, set[str]]:
    """By folder, the Python files that the README's tree names in it."""
    block = README.split("## The tree")[1].split("\n\n")[1]
    found: dict[str, set[str]] = {}
    top = folder = ""
    for line in block.splitlines():
        start = re.match(r"    (  )?(\w+)/", line)
        if start:
            top = top if start[1] else start[2]
            folder = f"{top}/{start[2]}" if start[1] else top
        found.setdefault(folder, set()).update(re.findall(r"\w+\.py\b", line))
    return found


def setup() -> configparser.ConfigParser:
    result = configparser.ConfigParser()
    result.read(ROOT / "setup.cfg", encoding="utf-8")
    return result


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


def test_readme_names_every_recipe() -> None:
    for recipe in (ROOT / "configs").glob("*.yaml"):
        assert f"configs/{recipe.name}" in README


@pytest.mark.parametrize("package", PACKAGES[:4])
def test_the_tree_names_every_module_in_its_folder(package: str) -> None:
    named = tree()
    for path in sources(package):
        folder = path.parent.relative_to(ROOT).as_posix()
        assert path.name == "__init__.py" or path.name in named[folder] or path == ROOT / "analysis/__main__.py", path


def test_every_module_that_the_tree_names_exists() -> None:
    named = tree()
    assert {"train", "train/step", "dali_pipeline/sources", "benchmarks"} <= named.keys()
    for folder, files in named.items():
        for name in files:
            assert (ROOT / folder / name).exists(), f"{folder}/{name}"


DOCUMENTS = [README, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))]


def test_every_file_that_the_documents_name_exists() -> None:
    for name in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README):
        target = name[0] or name[1]
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    for text in DOCUMENTS:
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        for target in re.findall(
            rf"(?<![\w/])(?:{'|'.join(PACKAGES)}|tests|configs|docs)/[\w/]+\.(?:py|md|yaml|sh)", prose
        ):
            assert (ROOT / target).exists(), target


def test_readme_explains_every_dependency() -> None:
    for line in setup()["options"]["install_requires"].splitlines():
        name = re.match(r"[\w-]+", line.strip())
        if name:
            assert f"| {name.group()} |" in README, name.group()


def test_dali_and_matplotlib_are_imported_in_one_place_each() -> None:
    importing = re.compile(r"^\s*(?:from|import)\s+(matplotlib|nvidia)\b|import_module\(.(matplotlib|nvidia)\b", re.M)
    found = {
        (path.name, first or second)
        for package in PACKAGES[:3]
        for path in sources(package)
        for first, second in importing.findall(path.read_text(encoding="utf-8"))
    }
    assert found == {("dali_graph.py", "nvidia")}


def test_every_package_is_installed() -> None:
    ours = {path.parent.relative_to(ROOT) for package in PACKAGES for path in sources(package)}
    assert set(setup()["options"]["packages"].split()) == {".".join(folder.parts) for folder in ours}
