"""The project as a whole: what the README says, and what setup.cfg declares."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path

import pytest
import yaml
from places import ROOT

from train.config import reference_table

DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = DOCUMENTS["README.md"]
INSTALLED = ("dali_pipeline", "net", "train", "analysis", "configs")
PACKAGES = (*INSTALLED, "benchmarks")


def sources(package: str) -> list[Path]:
    """The files of a package and of its sub-packages."""
    return sorted((ROOT / package).rglob("*.py"))


def tree() -> dict[str, set[str]]:
    """By folder, the Python files that the README's tree names in it."""
    block = README.split("### The tree\n\n")[1].split("\n\n")[0]
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


def test_the_documents_hold_the_current_table_of_keys() -> None:
    text = DOCUMENTS["docs/configuration.md"]
    assert re.search(r"<!-- keys: .* -->\n(.*?)\n<!-- /keys -->", text, re.S).group(1) == reference_table()  # type: ignore[union-attr]


def test_the_documents_give_the_measured_range_test() -> None:
    text = DOCUMENTS["docs/range-test.md"]
    result = json.loads((ROOT / "benchmarks" / "results" / "lr_finder.json").read_text(encoding="utf-8"))
    assert result["command"] in text
    found = ", ".join(f"{run['accuracy']:.2f}" for run in result["found"])
    assert f"| {found} | {result['mean_accuracy_found']:.2f} |" in text
    for row in result["grid"]:
        assert f"| {row['lr_max']:g} | {', '.join(f'{a:.2f}' for a in row['accuracies'])} |" in text
    assert result["ratio_of_found_lr_max"] < 2 and result["ratio_of_found_lr_min"] < 2
    assert result["mean_accuracy_found"] > result["best_of_grid"]["accuracy"] - 0.5


def test_readme_names_every_recipe() -> None:
    for recipe in (ROOT / "configs").glob("*.yaml"):
        assert f"configs/{recipe.name}" in README


@pytest.mark.parametrize("package", INSTALLED)
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


def anchors(text: str) -> set[str]:
    """What GitHub makes of a document's headings."""
    return {re.sub(r"[^\w -]", "", found.lower()).replace(" ", "-") for found in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_of_a_document_leads_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", DOCUMENTS[name]):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_a_document_names_exists(name: str) -> None:
    prose = re.sub(r"^```.*?^```", "", DOCUMENTS[name], flags=re.M | re.S)
    for target in re.findall(rf"(?<![\w/])(?:{'|'.join(PACKAGES)}|tests|docs)/[\w/]+\.(?:py|md|yaml|sh)", prose):
        assert (ROOT / target).exists(), target


def test_the_readme_leads_to_every_document() -> None:
    for name in DOCUMENTS:
        assert name == "README.md" or f"]({name})" in README, name


def test_readme_explains_every_dependency() -> None:
    for line in setup()["options"]["install_requires"].splitlines():
        name = re.match(r"[\w-]+", line.strip())
        if name:
            assert f"| {name.group()} |" in README, name.group()


def test_only_the_files_named_after_dali_import_it_and_only_one_of_the_analysis_matplotlib() -> None:
    importing = re.compile(r"^\s*(?:from|import)\s+(matplotlib|nvidia)\b|import_module\(.(matplotlib|nvidia)\b", re.M)
    found = {
        (path.name, first or second)
        for package in INSTALLED[:3]
        for path in sources(package)
        for first, second in importing.findall(path.read_text(encoding="utf-8"))
    }
    assert found and all(file.startswith("dali") and name == "nvidia" for file, name in found), found
    plotting = {path.name for path in sources("analysis") if importing.search(path.read_text(encoding="utf-8"))}
    assert plotting == {"plotting.py"}


def test_every_package_but_the_benchmarks_is_installed_with_its_types() -> None:
    ours = {path.parent.relative_to(ROOT) for package in INSTALLED for path in sources(package)}
    assert set(setup()["options"]["packages"].split()) == {".".join(folder.parts) for folder in ours}
    assert all((ROOT / package / "py.typed").exists() for package in INSTALLED)


def test_the_changelog_begins_with_the_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == setup()["metadata"]["version"] and len(set(headings)) == len(headings)


def test_the_workflow_runs_ci_from_the_lowest_python_on() -> None:
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"].values()
    assert job["steps"][-1]["run"] == "bash .ci/run" and (ROOT / ".ci/run").exists()
    assert f">={job['strategy']['matrix']['python'][0]}" == setup()["options"]["python_requires"]
