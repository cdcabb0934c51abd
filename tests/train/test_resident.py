"""Runs whose images do not lie on the device, against runs whose images do: the same to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from training import Lines, assert_equal_weights, weights
from whole_runs import Arm, Stop, stop_before

from dali_pipeline import memory
from train.config import Config, changed
from train.disk.folder import read_metrics
from train.failpoints import disarm
from train.run import fit


def numbers(run: Path) -> list[dict[str, float]]:
    """The run's metrics without its times."""
    return [{k: v for k, v in entry.items() if "second" not in k} for entry in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_streamed_run_interrupted_in_an_epoch_ends_as_a_resident_one(
    backend: str, quick_config: Config, tmp_path: Path, arm: Arm
) -> None:
    config = changed(
        quick_config,
        {"data.backend": backend, "data.validation": 0.2, "augment.flip": True, "schedule.lr_max": 0.05},
    )
    resident = changed(config, {"data.resident": "always"})
    streamed = changed(config, {"data.resident": "never", "run.checkpoint_every": 4})
    fit(resident, tmp_path / "resident", log=Lines())

    arm("step", stop_before(16))  # an epoch has 11 steps
    with pytest.raises(Stop):
        fit(streamed, tmp_path / "streamed", log=Lines())
    disarm()
    log = Lines()
    fit(streamed, tmp_path / "streamed", log=log, resume=True)
    assert "at epoch 1, step 4" in log.text
    assert "training images: sent to cpu batch by batch (data.resident=never)" in log.text
    assert "validation images: sent to cpu batch by batch (data.resident=never)" in log.text
    assert numbers(tmp_path / "streamed") == numbers(tmp_path / "resident")
    for file in ("last.pt", "best.pt"):
        assert_equal_weights(weights(tmp_path / "streamed" / file), weights(tmp_path / "resident" / file))


def test_a_run_can_be_resumed_with_its_images_elsewhere(quick_config: Config, tmp_path: Path) -> None:
    config = changed(quick_config, {"data.resident": "never", "train.epochs": 1})
    fit(config, tmp_path / "run", log=Lines())
    longer = changed(config, {"data.resident": "always", "train.epochs": 2})
    assert fit(longer, tmp_path / "run", log=Lines(), resume=True, extend=True)["epochs"] == 2


def test_auto_says_in_one_line_that_the_images_do_not_fit(
    quick_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Lines()
    fit(changed(quick_config, {"train.epochs": 1}), tmp_path / "fits", log=log)
    assert "batch by batch" not in log.text
    monkeypatch.setattr(memory, "free_bytes", lambda device: 6_000_000)
    fit(changed(quick_config, {"train.epochs": 1}), tmp_path / "does not", log=log)
    # the training images have a border of 4 pixels; the test images fit
    needed = 1442 * 40 * 40 * 3 / 1e6
    assert [line for line in log.lines if "batch by batch" in line] == [
        f"training images: sent to cpu batch by batch ({needed:.2f} MB as resident images, 6.00 MB free on cpu for this process)"
    ]
    assert_equal_weights(weights(tmp_path / "fits" / "last.pt"), weights(tmp_path / "does not" / "last.pt"))
