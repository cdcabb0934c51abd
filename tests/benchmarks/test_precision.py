"""precision.py: pairs of runs, interruptions, the paired interval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import precision
from train.config import Config, changed, load_config, to_yaml
from train.run import fit
from train.screen.log import Log


@pytest.fixture
def recipe_file(quick_config: Config, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    short = {"train.precision": "auto", "train.epochs": 1, "schedule.peak_epoch": 0.5}
    path.write_text(to_yaml(changed(quick_config, short)))
    return path


def made_up(fp32: list[float], bf16: list[float], step: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "seed": seed,
            "precision": name,
            "accuracy": accuracy,
            "test_loss": 1.0,
            "step_seconds": step[name],
            "processor_seconds": 2 * step[name],
        }
        for name, values in (("fp32", fp32), ("bf16", bf16))
        for seed, accuracy in enumerate(values)
    ]


def test_precision_measures_every_seed_in_both_and_goes_on_after_an_interruption(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished, path = tmp_path / "runs.jsonl", tmp_path / "report.json"
    words = [str(recipe_file), "--finished", str(finished), "--runs", "2"]
    assert precision.main(words) == 0
    all_lines = finished.read_text().splitlines()
    runs = [json.loads(line) for line in all_lines[1:]]
    assert [(run["seed"], run["precision"]) for run in runs] == [(0, "fp32"), (0, "bf16"), (1, "bf16"), (1, "fp32")]
    # a run is what training the recipe in that precision gives
    for run in runs[:2]:
        alone = load_config(recipe_file, [f"train.precision={run['precision']}"])
        assert run["accuracy"] == fit(alone, None, log=Log(quiet=True))["last_accuracy"]
    # killed while the third run's line was written
    finished.write_text("\n".join(all_lines[:3]) + "\n" + all_lines[3][:30])
    capsys.readouterr()
    assert precision.main([*words, "--json", str(path)]) == 0
    said = capsys.readouterr()
    assert finished.read_text().splitlines()[:3] == all_lines[:3]
    report = json.loads(path.read_text())
    assert report == json.loads(said.out.splitlines()[-1]) and report["seeds"] == 2
    assert "2 finished runs, 2 to go" in said.out
    again = [json.loads(line) for line in finished.read_text().splitlines()[1:]]
    assert [run["accuracy"] for run in again] == [run["accuracy"] for run in runs]
    # another recipe's runs are no part of it
    assert precision.main([*words, "optim.momentum=0.8"]) == 2
    assert "optim.momentum: 0.9 -> 0.8" in capsys.readouterr().err
    assert precision.main([*words, "train.precision=bf16"]) == 2
    assert capsys.readouterr().err.startswith("error: train.precision: bf16, but both")


def test_the_interval_is_that_of_the_differences_within_a_seed() -> None:
    random = np.random.default_rng(1)
    seeds = random.normal(90, 3, 6)  # seeds differ much, the precisions within a seed little
    fp32, bf16 = seeds + random.normal(0, 0.05, 6), seeds + random.normal(-0.1, 0.05, 6)
    entries = made_up([*fp32], [*bf16], {"fp32": 0.6, "bf16": 0.2})
    report = precision.summarise(entries, {}, {"compile": "off, off"})
    expected = stats.ttest_rel(bf16, fp32).confidence_interval(0.95)
    found = report["accuracy_difference"]
    assert found["mean"] - found["interval95"] == pytest.approx(expected.low)
    assert report["accuracy_difference_lower95"] == pytest.approx(expected.low)
    assert found["mean"] + found["interval95"] == pytest.approx(expected.high)
    assert report["step_time_ratio"]["mean"] == pytest.approx(3) and report["bf16_may_be_default"]
    assert report["processor_time_ratio"]["ends95"] == pytest.approx([3, 3])


@pytest.mark.parametrize(
    ("loss", "seeds", "allowed"), [(0.1, 5, True), (0.1, 4, False), (0.1, 1, False), (0.35, 5, False), (-1.0, 5, True)]
)
def test_bf16_may_be_the_default_only_after_enough_seeds_that_lose_little(
    loss: float, seeds: int, allowed: bool
) -> None:
    fp32 = [90.0 + seed for seed in range(seeds)]
    bf16 = [value - loss + 0.01 * (seed % 2) for seed, value in enumerate(fp32)]
    report = precision.summarise(made_up(fp32, bf16, {"fp32": 1.0, "bf16": 1.0}), {}, {"compile": "off, off"})
    assert report["bf16_may_be_default"] is allowed
    text = "\n".join(precision.lines(report))
    assert ("bf16 may be the default" in text) == allowed
    assert ("5 are needed" in text) == (seeds < 5)
