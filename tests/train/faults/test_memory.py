"""Out of memory, of every kind, is one line that says what to lower."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from whole_runs import one_line
from zygote import Zygote

import train.run
from train.__main__ import main
from train.errors import explained
from train.screen.log import Log


@pytest.mark.parametrize("place", ["write", "step"])
def test_out_of_memory_names_the_batch_size_and_changes_nothing(
    runs: Zygote, recipe: Path, tmp_path: Path, place: str
) -> None:
    """Before the first save, which holds the weights twice, and before the first step."""
    limit = f"""
import resource
from train.failpoints import arm

def limit(count):
    if count == 1:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20,) * 2)

arm({place!r}, limit)
"""
    if sys.platform != "linux":
        pytest.skip("RLIMIT_AS is not enforced here")
    words = ["--config", recipe, "net.width=64", "train.batch_size=1024", f"run.dir={tmp_path / 'run'}"]
    code, _, err = runs.run(*words, before=limit)
    assert code == 1
    line = one_line(err)
    assert "train.batch_size=1024" in line and "lower one of them" in line
    assert read_config(tmp_path / "run") == 1024
    assert (tmp_path / "run" / "last.pt").exists() == (place == "step")


def read_config(folder: Path) -> int:
    import yaml

    return int(yaml.safe_load((folder / "config.yaml").read_text())["train"]["batch_size"])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        MemoryError(),
        RuntimeError("CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_every_kind_of_out_of_memory_is_one_line(
    error: Exception, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(train.run, "fit", fit)
    assert main(["--config", str(recipe), f"run.dir={tmp_path / 'run'}"]) == 1
    assert "train.batch_size=128" in one_line(capsys.readouterr().err)


def test_other_errors_are_not_explained_away() -> None:
    for error in (RuntimeError("a bug"), OSError(2, "No such file"), ValueError("x")):
        with pytest.raises(type(error)), explained(Log(), out_of_memory=""):
            raise error
