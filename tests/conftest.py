"""Fixtures that several test files share; skips what needs a GPU where there is none."""

from __future__ import annotations

import contextlib
import signal

with contextlib.suppress(ImportError):
    # the compiler imports it, which is an error once anything has imported distutils, as libraries of the tests do
    import setuptools  # noqa: F401
import pytest
import torch

from train.config import Config, changed

# what helps the tests asserts too
pytest.register_assert_rewrite("training")


def pytest_configure() -> None:
    # tests are small: a second thread gains little, and waits at every barrier on a machine with other work
    torch.set_num_threads(1)
    # where the tests run in the background, the shell or nohup has had these ignored, and children inherit that
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "long" in item.keywords:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, torch finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def quick_config() -> Config:
    """Digits, a tiny network, two epochs, fixed rates, uncompiled: a whole run in a few seconds."""
    from training import QUICK

    return changed(Config(), QUICK)
