"""A recipe over N seeds: mean accuracy with a 95% interval, with and without TTA, and what the time went into.

python benchmarks/accuracy.py configs/onecycle.yaml --runs 10 [--json FILE] [section.key=value ...]

The network is compiled once, and reset for every run to what a new one with its seed would be. Each finished run is a line of a
JSONL file; after an interruption the same command continues with the seeds that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # instead of this folder, whose files could hide packages of the same name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.given import add_finished, finished_runs, parsed, reading, seeds_parser
from dali_pipeline.errors import UserError

if TYPE_CHECKING:
    from dali_pipeline.dataset import Dataset
    from dali_pipeline.loader import EvalLoader
    from train.config import Config
    from train.session import Session
    from train.step.evaluation import Score
    from train.step.measures import Measure

KIND = "accuracy"
FIRST_LINE_START = '{"recipe": '  # identifies a file of finished runs
TARGET_ACCURACY = 94.0  # percent; published training times are commonly the times to it
ACCURACY_LABELS = {
    "tta_accuracy": "with flip TTA",
    "shift_accuracy": "with 6-view TTA",
    "ema_accuracy": "EMA",
    "ema_tta_accuracy": "EMA, flip TTA",
    "ema_shift_accuracy": "EMA, 6-view TTA",
}
TIMES_COVER = {
    "lr_search": "the range test, where the recipe asks for one",
    "training": "the epochs: input, augmentation, steps, and whatever the host did meanwhile",
    "evaluation": "the test set (or validation split) after each epoch, without TTA",
    "tta": "flip TTA and 6-view TTA, which share two views, once, at the end; of the average of the weights too, if there is one",
    "once": "loading the data, building, compiling: once for all runs, in no run's time",
}


class RecipeChanged(UserError):
    """The file of finished runs belongs to another recipe, or to the same one on another device or in other arithmetic."""


def parser() -> argparse.ArgumentParser:
    result = seeds_parser(__doc__)
    result.add_argument(
        "--on",
        choices=("test", "validation"),
        default="test",
        help="what to measure: the test set (default), or to choose between recipes without it the images that "
        "data.validation= holds out",
    )
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
        report = measure(config, options.runs, finished, log, options.on)
        conclude(report, KIND, arguments, options, lines)
    return outcome.code


def measure(config: Config, runs: int, finished: Path, log: Callable[[str], None], on: str = "test") -> dict[str, Any]:
    """Do the runs that are missing in the file `finished`, and return the report over all `runs`, measured on the split `on`."""
    from benchmarks.machine import crowded
    from train.config import to_dict
    from train.screen.log import Log
    from train.session import Session

    recipe = comparable(to_dict(config), on)
    first = config.train.seed
    done = {entry["seed"]: entry for entry in read_finished(finished, recipe)}
    missing = [seed for seed in range(first, first + runs) if seed not in done]
    if done:
        log(f"{finished}: {len(done)} finished runs, {len(missing)} to go")
    if missing:
        with Session(config, Log(quiet=True)) as session:
            campaign = Campaign(session, on)
            environment = campaign.environment()
            append(finished, {"recipe": recipe, "environment": environment}, only_first=True)
            check_same_machine(finished, environment)
            if warning := crowded(environment["machine"]):
                log(warning)
            for seed in missing:
                done[seed] = campaign.run(seed)
                append(finished, done[seed])
                entry = done[seed]
                log(
                    f"seed {seed}: {entry['accuracy']:.2f}%, flip TTA {entry['tta_accuracy']:.2f}%, "
                    f"training {entry['seconds']['training']:.1f} s"
                )
    return summarise([done[seed] for seed in range(first, first + runs)], recipe, read_environment(finished))


def finished_report(config: Config, runs: int, finished: Path, on: str = "test") -> dict[str, Any] | None:
    """As `measure`, over those of the runs that are in the file, without training; None where it has none of them. They may be of
    another machine or arithmetic: of the recipe only what changes more than rounding has to be the same. The report has that of
    the file."""
    from train.config import to_dict

    recipe = comparable(to_dict(config), on)
    first, last = config.train.seed, config.train.seed + runs
    done = [entry for entry in read_finished(finished, recipe, exactly=False) if first <= entry["seed"] < last]
    return summarise(done, read_first(finished)["recipe"], read_environment(finished)) if done else None


def _must_agree(name: str, exactly: bool = True) -> bool:
    """Whether runs of one file must have the same value of the key `section.key`: not of those that change nothing, and not of
    the seed. Without `exactly` it may change speed or rounding."""
    from train.config import KEYS, changes

    if name not in KEYS:  # of another version
        return True
    return name != "train.seed" and changes(name) in (("result", "rounding", "speed") if exactly else ("result",))


def comparable(recipe: dict[str, Any], on: str = "test") -> dict[str, Any]:
    """The part of a recipe that must be the same for all runs of a file, train.tta left out, as every run measures all views. It
    includes the split that is measured where that is not the test set."""

    def matters(name: str) -> bool:
        return name != "train.tta" and _must_agree(name)

    kept = {
        section: {key: value for key, value in keys.items() if matters(f"{section}.{key}")}
        for section, keys in recipe.items()
    }
    return kept if on == "test" else kept | {"measured": {"on": on}}


def read_finished(path: Path, recipe: dict[str, Any], exactly: bool = True) -> list[dict[str, Any]]:
    """The finished runs, a dict each. An incomplete last line is removed from the file. RecipeChanged where the file is of
    another recipe, or is not a file of finished runs; without `exactly` the recipes may differ in speed and rounding."""
    from train.config import KEYS, own_keys

    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    complete, _, torn = text.rpartition("\n")
    if not (text.startswith(FIRST_LINE_START) or FIRST_LINE_START.startswith(text)):
        raise RecipeChanged(f"{path} is not a file of finished runs; name another file with --finished")
    entries = []
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            entries.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            reason = f"line {number} is damaged ({error}); name another file with --finished"
            raise RecipeChanged(f"{path}: {reason}") from None
    if not entries:
        path.unlink()
        return []
    if torn:
        path.write_text(complete + "\n", encoding="utf-8")
    # a key that only one of them has counts as its default in the other: earlier versions had fewer keys, and all data sets' keys
    with reading(path, "a file of finished runs"):
        then = flat(own_keys(entries[0]["recipe"])[0])
    now = flat(recipe)
    defaults = {name: KEYS[name][0].default if name in KEYS else None for name in (*now, *then)}
    then, now = defaults | then, defaults | now
    differ = [name for name, value in now.items() if then[name] != value and _must_agree(name, exactly)]
    if changed := [f"{name}: {then[name]} -> {now[name]}" for name in differ]:
        raise RecipeChanged(
            f"{path} holds runs of another recipe ({'; '.join(changed)}); go on with that one, or name "
            "another file with --finished"
        )
    return entries[1:]


def flat(recipe: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The recipe as one dict by section.key."""
    return {f"{section}.{key}": value for section, keys in recipe.items() for key, value in keys.items()}


def read_first(path: Path) -> dict[str, Any]:
    """The first line of a file of finished runs: their recipe, and the environment of the first."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
    return found


def read_environment(path: Path) -> dict[str, Any]:
    """The environment in which the file's first run was done."""
    found: dict[str, Any] = read_first(path)["environment"]
    return found


def check_same_machine(path: Path, now: dict[str, Any]) -> None:
    """RecipeChanged where the file's runs had another device, precision or compiler, as their mean would mix both."""

    def resolved(environment: dict[str, Any]) -> dict[str, str]:
        return {
            "device": environment["device"].partition(":")[0],
            "device name": environment["device_name"] or environment["machine"]["cpu"],
            "precision": environment["precision"],
            "compile": environment["compile"],
            "step graph": "on" if environment.get("step_graph") else "off",
        }

    before = resolved(read_environment(path))
    changed = [f"{key}: {before[key]} -> {value}" for key, value in resolved(now).items() if before[key] != value]
    if changed:
        raise RecipeChanged(
            f"{path} holds runs of another machine or arithmetic ({'; '.join(changed)}); name another file with --finished"
        )


def append(path: Path, entry: dict[str, Any], only_first: bool = False) -> None:
    """Append one line; it is on the disk when this returns. With `only_first` it is written only if the file is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        if only_first and file.tell() > 0:
            return
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Campaign:
    """The trainer of an open session, compiled once, for any number of seeds."""

    def __init__(self, session: Session, on: str = "test") -> None:
        from benchmarks.measure import reset_device_peak
        from train.step.measures import Measure
        from train.step.views import VIEWS

        self.session = session
        session.build(check=lambda dataset: _check_measurable(dataset, on))
        reset_device_peak(session.runtime.device)
        self.trainer, self.on = session.trainer, on
        # the training evaluates without the views, which are measured beside it, on a clock of their own
        self.trainer.measures = self.trainer.plain_measures
        self._plain = [replace(measure, split=on) for measure in self.trainer.measures]
        self._tta = [Measure(on, m.weights, views) for m in self._plain for views in VIEWS if views != "plain"]
        session.warm_up()
        self._once = session.times

    def environment(self) -> dict[str, Any]:
        from benchmarks.machine import machine_facts

        return self.session.environment() | {
            "machine": machine_facts(self.session.runtime.device),
            "once_seconds": {"set_up": self._once.set_up, "compile": self._once.compile},
        }

    def _loader(self) -> AbstractContextManager[EvalLoader]:
        """What is measured, batch by batch."""
        trainer = self.trainer
        if self.on == trainer.measures[0].split:
            return nullcontext(trainer.eval_loader)
        return closing(self.session.eval_loader(self.on))

    def run(self, seed: int) -> dict[str, Any]:
        """Train the recipe with this seed from scratch to its last evaluation; the results as a dict of plain numbers."""
        from benchmarks.measure import device_peak_gib
        from train.disk.snapshot import Position
        from train.loop import Run
        from train.run import find_rates
        from train.screen.clock import Times
        from train.screen.notice import LongRunNotice
        from train.step.schedule import Rates, make_schedule

        session, trainer = self.session, self.trainer
        config, device = session.config, session.runtime.device
        trainer.start_over(seed)
        next(trainer.train_loader.epoch(0))  # builds and compiles what is left before the clock starts
        times = session.times = Times()
        notice = LongRunNotice(trainer.total_steps, config, session.runtime, session.log)
        rates = Rates.given(config.schedule) or find_rates(session, None, notice)
        schedule = make_schedule(config.schedule, rates, config.train.epochs, trainer.steps_per_epoch)
        position = Position()
        Run(session, schedule, None, position, notice).train()
        last = position.metrics[-1]
        with self._loader() as loader:
            if f"{self.on}_loss" in last:
                accuracies = {accuracy_name(measure): last[f"{measure.key}_accuracy"] for measure in self._plain}
                loss = last[f"{self.on}_loss"]
            else:  # once, with the weights of the last epoch
                with times.on("evaluation", device):
                    scores = trainer.evaluate_on(loader, self._plain)
                accuracies = _accuracies(scores)
                loss = next(iter(scores.values())).loss
            tta_times = Times()
            with tta_times.on("evaluation", device):
                accuracies |= _accuracies(trainer.evaluate_on(loader, self._tta))
        seconds = {"lr_search": times.lr_search, "training": times.training, "evaluation": times.evaluation}
        seconds["tta"] = tta_times.evaluation
        return {
            "seed": seed,
            **accuracies,
            f"{self.on}_loss": loss,
            "lr_max": rates.lr_max,
            "lr_min": rates.lr_min,
            "device_peak_gib": device_peak_gib(device),  # since before the warm-up
            "seconds": seconds,
            "images_per_second": config.train.epochs
            * trainer.steps_per_epoch
            * config.train.batch_size
            / sum(m["seconds"] for m in position.metrics),
            **time_to(position.metrics),
        }


def _check_measurable(dataset: Dataset, on: str) -> None:
    from train.config import ConfigError

    if on not in dataset.splits:
        raise ConfigError(f"--on {on}: no images are held out; add data.validation=5000, or another number")


def _accuracies(scores: dict[Measure, Score]) -> dict[str, float]:
    return {accuracy_name(measure): score.accuracy for measure, score in scores.items()}


def accuracy_name(measure: Measure) -> str:
    """The key of a measure's accuracy in a run's line: accuracy, tta_accuracy, ema_accuracy. As in metrics.jsonl, but without the
    name of the split."""
    key = replace(measure, split="").key
    return f"{key}_accuracy" if key else "accuracy"


def time_to(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """When the accuracy after an epoch (on the validation split, where there is one) first reached TARGET_ACCURACY: the epoch,
    the training seconds up to its end, and the same with all evaluations up to then. None where it was never reached."""
    from train.step.measures import recorded

    training = evaluation = 0.0
    for epoch in metrics:
        training += epoch["seconds"]
        evaluation += epoch["eval_seconds"]
        if epoch[f"{recorded(epoch)[0].key}_accuracy"] >= TARGET_ACCURACY:
            return {
                "epoch_of_94": epoch["epoch"],
                "training_seconds_to_94": training,
                "seconds_to_94": training + evaluation,
            }
    return {"epoch_of_94": None, "training_seconds_to_94": None, "seconds_to_94": None}


def summarise(
    entries: list[dict[str, Any]], recipe: dict[str, Any], environment: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The report over finished runs: means, standard deviations and 95% intervals."""
    from benchmarks.measure import statistic
    from train.machine.environment import git_commit

    reached = [r["seconds_to_94"] for r in entries if r["seconds_to_94"] is not None]
    trained = [r["training_seconds_to_94"] for r in entries if r["training_seconds_to_94"] is not None]
    environment = environment or {}
    accuracies = [name for name in entries[0] if name.endswith("accuracy") and all(name in r for r in entries)]
    return {
        "kind": KIND,
        "command": "",
        "recipe": recipe,
        "machine": environment.get("machine"),
        "versions": environment.get("versions"),
        "commit": environment.get("commit") or git_commit(),
        **{key: environment.get(key) for key in ("precision", "compile", "step_graph", "backend")},
        "runs": len(entries),
        "on": recipe.get("measured", {}).get("on", "test"),
        **{name: statistic([r[name] for r in entries]) for name in accuracies},
        "seconds": {name: statistic([r["seconds"][name] for r in entries]) for name in entries[0]["seconds"]},
        "covers": TIMES_COVER,
        "once_seconds": environment.get("once_seconds"),
        "images_per_second": statistic([r["images_per_second"] for r in entries]),
        "device_peak_gib": max((r["device_peak_gib"] for r in entries if r.get("device_peak_gib")), default=None),
        "reached_94": len(reached),
        "seconds_to_94": statistic(reached) if reached else None,
        "training_seconds_to_94": statistic(trained) if trained else None,
        "finished": entries,
    }


def lines(report: dict[str, Any]) -> list[str]:
    """The report for a person."""

    def accuracy(name: str) -> str:
        found = report[name]
        if found["std"] is None:
            return f"{found['mean']:.2f}% (n = 1)"
        return f"{found['mean']:.2f}% +- {found['interval95']:.2f} (95%, n = {found['n']}), std {found['std']:.2f}"

    what = report.get("on", "test")
    seconds = report["seconds"]
    result = [
        "",
        f"{f'{what} accuracy':<19} {accuracy('accuracy')}",
        *(f"{ACCURACY_LABELS.get(name, name):<19} {accuracy(name)}" for name in report if name.endswith("_accuracy")),
        f"time of a run       {sum(seconds[name]['mean'] for name in seconds):.1f} s: "
        + ", ".join(f"{name.replace('_', ' ')} {seconds[name]['mean']:.1f} s" for name in seconds),
        f"                    not in it: {TIMES_COVER['once']}",
        f"throughput          {report['images_per_second']['mean']:,.0f} images/s in training",
    ]
    if report["device_peak_gib"] is not None:
        result.append(f"GPU memory          {report['device_peak_gib']:.2f} GiB at the peak")
    if report["reached_94"]:
        result.append(
            f"time to {TARGET_ACCURACY:.0f}%         {report['seconds_to_94']['mean']:.1f} s with the evaluations, "
            f"{report['training_seconds_to_94']['mean']:.1f} s without ({report['reached_94']} of {report['runs']} runs)"
        )
    else:
        result.append(f"time to {TARGET_ACCURACY:.0f}%         not reached")
    return result


if __name__ == "__main__":
    sys.exit(main())
