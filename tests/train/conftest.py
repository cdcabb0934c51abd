"""Fixtures of the tests of whole runs: forked processes, a recipe for them, and named places armed for one test."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from zygote import Zygote, zygote

from train import failpoints
from train.config import Config, changed, from_dict, to_yaml
from train.run import fit
from train.screen.log import Log

pytest.register_assert_rewrite("whole_runs")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts `python -m train` without the cost of importing torch each time."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork()")
    with zygote(tmp_path_factory.mktemp("runs")) as made:
        yield made


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], Path]:
    """The folder of the undisturbed run of a recipe, trained once for all tests, which read it and change a copy."""

    @functools.cache
    def of_recipe(text: str) -> Path:
        config = from_dict(yaml.safe_load(text))
        folder = tmp_path_factory.mktemp("trained") / "run"
        fit(config, folder, log=Log(quiet=True))
        return folder

    return lambda config: of_recipe(to_yaml(config))


@pytest.fixture
def recipe(quick_config: Config, tmp_path: Path) -> Path:
    """The file of the quick run on torch's pipeline, saved after every step."""
    config = changed(quick_config, {"data.backend": "torch", "run.checkpoint_every": 1, "run.analyse": False})
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(config))
    return path


@pytest.fixture
def arm() -> Iterator[Callable[[str, Callable[[int], object]], None]]:
    """train.failpoints.arm, for runs within this process; nothing stays armed after the test."""
    yield failpoints.arm
    failpoints.disarm()
