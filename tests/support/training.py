"""What several test files need of a training: a log that keeps its lines, a trainer on the digits, equality to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dali_pipeline import sources
from dali_pipeline.backend import BackendChoice, choose_backend
from train.config import Config
from train.disk.checkpoint import load_checkpoint
from train.machine.compiler import find_compiler
from train.machine.runtime import prepare, seed_everything
from train.screen.log import Log
from train.step.trainer import Trainer

# digits, a tiny network, two epochs, fixed rates, uncompiled: a whole run in a few seconds
QUICK: dict[str, Any] = {
    "data.name": "digits",
    "augment.flip": False,
    "net.width": 1,
    "schedule.lr_max": 0.1,
    "schedule.lr_min": 0.002,
    "schedule.peak_epoch": 1.0,
    "train.epochs": 2,
    "train.batch_size": 128,
    "train.eval_batch_size": 100,
    "train.compile": "off",
    "train.device": "cpu",
    "train.precision": "fp32",
    "run.analyse": False,
}


COMPILE = torch.nn.Module.compile


def traced_only(module: torch.nn.Module, **how: Any) -> None:
    """In the place of `torch.nn.Module.compile`: graphs are found as ever, and not made into machine code."""
    COMPILE(module, backend="eager", dynamic=how.get("dynamic"))


def needs_compiler() -> None:
    """Skip the test where torch.compile has no C++ compiler that works."""
    found, what = find_compiler(torch.device("cpu"))
    if not found:
        pytest.skip(what)


class Lines(Log):
    """Collects what would be printed."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __call__(self, line: str = "") -> None:
        self.lines.append(line)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def make_trainer(config: Config, backend: BackendChoice | None = None) -> Trainer:
    """The trainer of a recipe, on this process alone, freshly seeded."""
    train = config.train
    runtime = prepare(
        device=train.device,
        precision=train.precision,
        compile=train.compile,
        step_graph=train.step_graph,
        channels_last=train.channels_last,
    )
    backend = backend or choose_backend(config.data.backend, runtime.device)
    dataset = sources.load(config.data)
    seed_everything(train.seed, train.deterministic)
    return Trainer(config, dataset, runtime, backend)


def weights(path: Path) -> dict[str, Tensor]:
    """The network's in a checkpoint's file."""
    return load_checkpoint(path)["model"]  # type: ignore[no-any-return]


def assert_equal_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_same(a: Any, b: Any) -> None:
    """Equal to the bit, through nested dicts, lists and tuples."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b
