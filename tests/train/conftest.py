"""Fixtures of the tests of whole runs: forked processes, a recipe for them, and named places armed for one test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from zygote import Zygote, zygote

from train import failpoints
from train.config import Config, changed, to_yaml

pytest.register_assert_rewrite("whole_runs")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts `python -m train` without the cost of importing torch each time."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork()")
    with zygote(tmp_path_factory.mktemp("runs")) as made:
        yield made


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
