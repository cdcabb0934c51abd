"""How the house is built: every module imports, what a package hands on stays what it is, and imports run one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from places import ROOT

PACKAGES = ("dali_pipeline", "net", "train", "analysis")
# which of ours each may import
ALLOWED = {
    "net": {"net"},
    "dali_pipeline": {"dali_pipeline"},
    "train": {"train", "dali_pipeline", "net"},
    "analysis": {"analysis", "train", "dali_pipeline", "net"},
}
# the command draws the pictures of the run that it made
ONE_ARROW_UP = {"train.__main__": {"analysis"}}


def files(package: str) -> dict[str, Path]:
    """Every module of a package and of its sub-packages."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = {name: path for package in PACKAGES for name, path in files(package).items()}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it; blocks that only type checkers read are passed over."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: a relative import"
            # what is imported from a package may be a module of it
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# by module, which of our modules it imports
GRAPH = {name: (imported(path) & MODULES.keys()) - {name} for name, path in MODULES.items()}


def assert_no_circle(graph: Mapping[str, Iterable[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    names = {"benchmarks", *PACKAGES}
    for module, path in files(package).items():
        ours = {name.split(".")[0] for name in imported(path)} & names
        assert ours <= ALLOWED[package] | ONE_ARROW_UP.get(module, set()), module


def test_no_module_imports_itself_by_a_detour() -> None:
    assert_no_circle(GRAPH)


def test_between_the_rooms_of_train_imports_run_one_way() -> None:
    rooms = {name for name, path in MODULES.items() if path.name == "__init__.py" and name.startswith("train.")}
    assert rooms == {"train.machine", "train.disk", "train.step", "train.screen"}

    def room(module: str) -> str:
        parent = ".".join(module.split(".")[:2])
        return parent if parent in rooms else module

    between = {r: {room(to) for name in GRAPH if room(name) == r for to in GRAPH[name]} - {r} for r in map(room, GRAPH)}
    assert_no_circle(between)
    assert not between["train.machine"] & rooms, "what a training stands on knows nothing of what stands on it"


def test_a_circle_would_be_found() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"a -> b -> a|b -> a -> b"):
        assert_no_circle({"a": ["b"], "b": ["a"]})


# imports every module, in the order given, and then looks at what each package hands on
LOOK = """
import importlib, pkgutil, sys, types

packages, reverse = sys.argv[1].split(), sys.argv[2] == "last to first"
modules = list(packages)
for name in packages:
    modules += [found.name for found in pkgutil.walk_packages(importlib.import_module(name).__path__, name + ".")]
for name in sorted(modules, reverse=reverse):
    importlib.import_module(name)
print("modules", *sorted(modules))
for name in modules:
    module = sys.modules[name]
    if hasattr(module, "__path__"):
        for public in getattr(module, "__all__", ()):
            value = getattr(module, public)
            assert not isinstance(value, types.ModuleType), f"{name}.{public} is a module now"
            assert public.isupper() or callable(value), f"{name}.{public} is {value!r}"
            print("public", name + "." + public)
"""


@pytest.mark.parametrize("order", ["first to last", "last to first"])
def test_every_module_imports_and_leaves_every_public_name_callable(order: str) -> None:
    """The first import of a submodule puts it in place of its package's attribute of the same name."""
    result = subprocess.run(
        [sys.executable, "-c", LOOK, " ".join(PACKAGES), order], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split()[1:] == sorted(MODULES)
    assert {"public net.build", "public dali_pipeline.sources.load"} <= set(lines)


@pytest.mark.parametrize("package", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_no_module_has_the_name_of_what_its_package_hands_on(package: str) -> None:
    tree = ast.parse(MODULES[package].read_text(encoding="utf-8"))
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if not (isinstance(node, ast.ImportFrom) and f"{node.module}.{alias.name}" in MODULES)
    }
    names |= {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    inside = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == package}
    assert not names & inside


TORCHLESS = [
    ["--help"],
    ["--config", "configs/quickstart.yaml", "--print-config"],
    ["--config", "configs/quickstart.yaml", "train.epochs=none"],
]


@pytest.mark.parametrize("words", TORCHLESS, ids=["help", "print-config", "a wrong key"])
def test_help_print_config_and_a_wrong_key_import_no_torch(words: list[str]) -> None:
    code = f"import sys, train.__main__ as m\ntry: m.main({words!r})\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'matplotlib', 'sklearn', 'nvidia.dali'} & sys.modules.keys()"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


WITHOUT_TORCH = (
    "dali_pipeline.errors",
    "dali_pipeline.options",
    "dali_pipeline.dataset",
    "dali_pipeline.plan",
    "dali_pipeline.processors",
    "dali_pipeline.layout",
    "dali_pipeline.sources",
    "net",
    "net.options",
    "train.options",
    "train.config",
    "train.failpoints",
    "train.machine.openmp",
)


def test_sections_plan_and_data_sets_import_no_torch() -> None:
    code = f"import sys\nfor name in {WITHOUT_TORCH!r}: __import__(name)\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
