"""Fixtures that several test files share; skips what needs a GPU where there is none."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from train.config import Config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def pytest_configure() -> None:
    # tests are small: a second thread gains little, and waits at every barrier on a machine with other work
    torch.set_num_threads(1)
    # where the tests run in the background, the shell or nohup has had these ignored, and children inherit that
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, torch finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def quick_config() -> Config:
    """Digits, a tiny network, two epochs, fixed rates, uncompiled: a whole run in a few seconds."""
    config = Config()
    config.data.name = "digits"
    config.augment.flip = False
    config.net.width = 2
    config.schedule.lr_max, config.schedule.lr_min, config.schedule.peak_epoch = 0.1, 0.002, 1.0
    config.train.epochs, config.train.batch_size, config.train.eval_batch_size = 2, 128, 100
    config.run.analyse = False
    config.train.compile, config.train.device, config.train.precision = "off", "cpu", "fp32"
    return config
