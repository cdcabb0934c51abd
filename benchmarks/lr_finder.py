"""The range test against a grid: its suggestions over seeds, and the accuracy with them against that with fixed peak rates.

python benchmarks/lr_finder.py data.root=DIR --json benchmarks/results/lr_finder.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder, whose files could hide packages of the same name

from benchmarks.given import parsed, whole  # noqa: E402
from train.screen.streams import Parser  # noqa: E402

GRID = (0.4, 0.8, 1.6)  # the fixed peak rates
RECIPE = ["net.width=16", "train.epochs=4", "schedule.peak_epoch=1.5", "train.compile=off", "run.analyse=false"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"on top of {' '.join(RECIPE)}")
    parser.add_argument("--config", default=str(ROOT / "configs" / "onecycle.yaml"), help="the recipe (onecycle.yaml)")
    parser.add_argument("--seeds", type=whole(), default=5, help="range tests, and trainings with what they found")
    parser.add_argument(
        "--grid-seeds", type=whole(0), default=1, help="trainings for each rate of the grid; 0: no grid"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/lr_finder"), help="run folders; what is there is not repeated"
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parsed(parser, arguments)
    from benchmarks.outcome import explained, write_report

    with explained() as outcome:
        result = measure(options, sys.argv[1:] if arguments is None else arguments)
        if options.json:
            write_report(options.json, result, indent=2)
        print(json.dumps(result))
    return outcome.code


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Do the range tests and trainings that are missing in --work, and return the results of all of them; `arguments` are those
    of the command."""
    from benchmarks.machine import command, shareable
    from train.config import load_config, to_dict
    from train.machine.environment import cpu_name, git_commit
    from train.run import find_rates_only, fit
    from train.screen.log import Log
    from train.step.range_test import RangeTest, suggest

    given = {word.partition("=")[0] for word in options.overrides}
    words = [word for word in RECIPE if word.partition("=")[0] not in given] + options.overrides
    quiet = Log(quiet=True)
    # run folders of another recipe are not results of this one
    recipe: dict[str, Any] = {**to_dict(load_config(options.config, words)), "run": None}
    recipe["data"]["root"] = recipe["train"]["seed"] = None
    work = options.work / hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]

    def accuracy(name: str, seed: int, lr_max: float, lr_min: float) -> float:
        summary = work / name / "summary.json"
        if not summary.exists():
            rates = [f"schedule.lr_max={lr_max!r}", f"schedule.lr_min={lr_min!r}", f"train.seed={seed}"]
            fit(load_config(options.config, words + rates), summary.parent, log=quiet, overwrite=True)
        value: float = json.loads(summary.read_text())["last_accuracy"]
        return value

    found: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        folder = work / f"find-{seed}"
        if not (folder / "lr_finder.csv").exists():
            config = load_config(options.config, [*words, f"train.seed={seed}"])
            find_rates_only(config, folder, log=quiet, overwrite=True)
        suggestion = suggest(RangeTest.read_csv(folder / "lr_finder.csv"))
        percent = accuracy(f"found-{seed}", seed, suggestion.lr_max, suggestion.lr_min)
        found.append({"seed": seed, "lr_max": suggestion.lr_max, "lr_min": suggestion.lr_min, "accuracy": percent})
        print(
            f"seed {seed}: found {suggestion.lr_max:.3f} / {suggestion.lr_min:.4f}, ends at {percent:.2f}%", flush=True
        )

    grid: list[dict[str, Any]] = []
    for lr_max in GRID if options.grid_seeds else ():
        lr_min = lr_max / 200
        accuracies = [accuracy(f"grid-{lr_max}-{seed}", seed, lr_max, lr_min) for seed in range(options.grid_seeds)]
        grid.append({"lr_max": lr_max, "lr_min": lr_min, "accuracies": accuracies})
        print(f"grid {lr_max:g} / {lr_min:g}: {', '.join(f'{a:.2f}%' for a in accuracies)}", flush=True)

    best = max(grid, key=lambda row: statistics.mean(row["accuracies"]), default=None)
    return {
        "command": command("lr_finder", arguments),
        "seeds": options.seeds,
        "grid_seeds": options.grid_seeds,
        "recipe": shareable(words),
        "commit": git_commit(),
        "machine": {"cpu": cpu_name()},
        "found": found,
        "grid": grid,
        "ratio_of_found_lr_max": max(f["lr_max"] for f in found) / min(f["lr_max"] for f in found),
        "ratio_of_found_lr_min": max(f["lr_min"] for f in found) / min(f["lr_min"] for f in found),
        "mean_accuracy_found": statistics.mean(f["accuracy"] for f in found),
        "best_of_grid": best and {"lr_max": best["lr_max"], "accuracy": statistics.mean(best["accuracies"])},
    }


if __name__ == "__main__":
    sys.exit(main())
