"""What bf16 costs in accuracy and gains in time against fp32: the same seeds in both, differences with a 95% interval.

python benchmarks/precision.py configs/cpu.yaml --runs 5 [--finished FILE] [--json FILE] [section.key=value ...]

A seed draws the same weights and the same augmentation in both; where the recipe asks for a range test, each finds its own rates.
Each finished run is a line of a JSONL file; after an interruption the same command continues with the runs that are missing.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder, whose files could hide packages of the same name

from benchmarks.given import add_finished, finished_runs, parsed, seeds_parser  # noqa: E402

if TYPE_CHECKING:
    from train.config import Config

KIND = "precision"
PRECISIONS = ("fp32", "bf16")
LOSS_ALLOWED = 0.3  # points of accuracy: so much bf16 may lose, at the lower end of the interval, to be a default
ENOUGH_RUNS = 5


def parser() -> argparse.ArgumentParser:
    result = seeds_parser(__doc__)
    add_finished(result, KIND)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(parser(), arguments)
    from benchmarks.outcome import conclude, explained
    from train.config import load_config
    from train.screen.log import Log

    log = Log()
    with explained(log) as outcome:
        config, finished = load_config(options.config, options.overrides), finished_runs(options, KIND)
        report = measure(config, options.runs, finished, log)
        conclude(report, KIND, arguments, options, lines)
    return outcome.code


def measure(config: Config, runs: int, finished: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Do the runs that are missing in the file `finished`, and return the report over `runs` seeds in both precisions."""
    from benchmarks.accuracy import (
        Campaign,
        append,
        check_same_machine,
        comparable,
        read_environment,
        read_finished,
    )
    from train.config import ConfigError, changed, to_dict
    from train.screen.log import Log
    from train.session import Session

    if config.train.precision != "auto":
        raise ConfigError(
            f"train.precision: {config.train.precision}, but both fp32 and bf16 are measured; leave it out"
        )
    recipe = comparable(to_dict(config)) | {"measured": {"on": "test", "precisions": " and ".join(PRECISIONS)}}
    done = {(entry["seed"], entry["precision"]): entry for entry in read_finished(finished, recipe)}
    wanted = pairs(range(config.train.seed, config.train.seed + runs))
    missing = [run for run in wanted if run not in done]
    if done:
        log(f"{finished}: {len(done)} finished runs, {len(missing)} to go")
    if missing:
        with ExitStack() as stack:
            campaigns = {}
            for precision in PRECISIONS:
                of_one = changed(config, {"train.precision": precision})
                campaigns[precision] = Campaign(stack.enter_context(Session(of_one, Log(quiet=True))))
            environment = together([campaign.environment() for campaign in campaigns.values()])
            append(finished, {"recipe": recipe, "environment": environment}, only_first=True)
            check_same_machine(finished, environment)
            for seed, precision in missing:
                begun = time.process_time()
                entry = campaigns[precision].run(seed)
                entry |= {
                    "precision": precision,
                    "processor_seconds": time.process_time() - begun,
                    "step_seconds": config.train.batch_size / entry["images_per_second"],
                }
                done[seed, precision] = entry
                append(finished, entry)
                log(
                    f"seed {seed}, {precision}: {entry['accuracy']:.2f}%, {1000 * entry['step_seconds']:.0f} ms a step, "
                    f"rates {entry['lr_min']:.3g} to {entry['lr_max']:.3g}"
                )
    return summarise([done[run] for run in wanted], recipe, read_environment(finished))


def pairs(seeds: Sequence[int]) -> list[tuple[int, str]]:
    """Both runs of every seed one after the other, every other pair in reverse, so that a machine that gets slower meanwhile
    affects both alike."""
    return [(seed, name) for i, seed in enumerate(seeds) for name in (PRECISIONS if i % 2 == 0 else PRECISIONS[::-1])]


def together(environments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One environment for the runs in both precisions: where they differ in how they run, both values."""
    both = {key: ", ".join(str(found[key]) for found in environments) for key in ("precision", "compile")}
    return environments[0] | both


def summarise(entries: Sequence[dict[str, Any]], recipe: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """The report over finished pairs: what each precision gives, and the paired differences bf16 - fp32. A ratio of times is
    the geometric mean over the pairs, with the ends of its 95% interval."""
    from benchmarks.measure import statistic

    of = {name: {e["seed"]: e for e in entries if e["precision"] == name} for name in PRECISIONS}

    def paired(act: Callable[[dict[str, Any], dict[str, Any]], float]) -> dict[str, Any]:
        return statistic([act(of["bf16"][seed], of["fp32"][seed]) for seed in of["fp32"]])

    def ratio(key: str) -> dict[str, Any]:
        logs = paired(lambda bf16, fp32: math.log(fp32[key] / bf16[key]))
        width = logs["interval95"]
        ends = None if width is None else [math.exp(logs["mean"] - width), math.exp(logs["mean"] + width)]
        return {"mean": math.exp(logs["mean"]), "ends95": ends, "n": logs["n"]}

    accuracy = paired(lambda bf16, fp32: bf16["accuracy"] - fp32["accuracy"])
    width = accuracy["interval95"]
    lower = None if width is None else accuracy["mean"] - width
    enough = accuracy["n"] >= ENOUGH_RUNS
    return {
        "kind": KIND,
        "command": "",
        "recipe": recipe,
        **{key: environment.get(key) for key in ("machine", "versions", "commit")},
        "compile": environment["compile"],
        "seeds": accuracy["n"],
        **{
            name: {
                key: statistic([entry[key] for entry in of[name].values()])
                for key in ("accuracy", "tta_accuracy", "test_loss", "step_seconds", "processor_seconds")
                if all(key in entry for entry in entries)
            }
            for name in PRECISIONS
        },
        "accuracy_difference": accuracy,
        "accuracy_difference_lower95": lower,
        "loss_allowed": LOSS_ALLOWED,
        "bf16_may_be_default": enough and lower is not None and lower > -LOSS_ALLOWED,
        "step_time_ratio": ratio("step_seconds"),
        "processor_time_ratio": ratio("processor_seconds"),
        "finished": list(entries),
    }


def lines(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    found, n = report["accuracy_difference"], report["seeds"]

    def interval(statistic: dict[str, Any], unit: str, scale: float = 1.0, digits: int = 2) -> str:
        mean = f"{scale * statistic['mean']:.{digits}f}"
        half = statistic["interval95"]
        return f"{mean}{unit}" if half is None else f"{mean} +- {scale * half:.{digits}f}{unit}"

    def times(name: str) -> str:
        ratio = report[name]
        ends = "" if ratio["ends95"] is None else f" ({ratio['ends95'][0]:.2f} to {ratio['ends95'][1]:.2f})"
        return f"{ratio['mean']:.2f}{ends}"

    result = [
        f"{name:<12} {interval(report[name]['accuracy'], '%')}, "
        f"{interval(report[name]['step_seconds'], ' ms a step', 1000, 0)} (95%, n = {n})"
        for name in PRECISIONS
    ]
    result += [
        f"bf16 - fp32  {interval(found, ' points')} (95%, paired, n = {n})",
        f"fp32 / bf16  {times('step_time_ratio')} in time a step, {times('processor_time_ratio')} in processor time of a run",
    ]
    if report["accuracy_difference_lower95"] is None or n < ENOUGH_RUNS:
        result.append(f"verdict      {n} seeds, {ENOUGH_RUNS} are needed for one")
    else:
        result.append(
            f"verdict      the lower end, {report['accuracy_difference_lower95']:.2f} points, lies "
            f"{'above' if report['bf16_may_be_default'] else 'not above'} -{LOSS_ALLOWED}: bf16 "
            f"{'may' if report['bf16_may_be_default'] else 'must not'} be the default"
        )
    return result


if __name__ == "__main__":
    sys.exit(main())
