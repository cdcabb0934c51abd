"""A recipe over N seeds: accuracy with its interval, with and without flip TTA, and what the time went into.

python benchmarks/accuracy.py configs/onecycle.yaml --runs 10 [--json FILE] [section.key=value ...]

Compiles once; every run starts from the state of a fresh one with its seed. Each finished run is a line of a JSONL file:
after an interruption the same command goes on with the seeds that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder, whose files could hide packages of the same name

if TYPE_CHECKING:
    from train.config import Config
    from train.fit import Setup
    from train.trainer import Trainer

KIND = "accuracy"
BEGIN = '{"recipe": '  # of the file of finished runs
TARGET = 94.0  # percent; what the field's times are given for
COVERS = {
    "lr_search": "the range test, where the recipe asks for one",
    "training": "the epochs: input, augmentation, steps, and whatever the host did meanwhile",
    "evaluation": "the test set after each epoch, without TTA unless the recipe has it",
    "tta": "flip TTA once, at the end",
    "once": "loading the data, building, compiling: once for all runs, in no run's time",
}


class RecipeChanged(Exception):
    """The file of finished runs belongs to another recipe, or to the same one on another device or in other arithmetic."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("config", help="the recipe, a YAML file of configs/")
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    result.add_argument("--runs", type=int, required=True, metavar="N", help="how many seeds, counted from train.seed")
    result.add_argument("--finished", type=Path, metavar="FILE", help="JSONL of the runs (runs/accuracy/RECIPE.jsonl)")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the last line of the output here too")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    if options.runs < 1:
        print(f"error: --runs {options.runs}, expected 1 or more", file=sys.stderr)
        return 2
    from benchmarks.machine import command
    from train.checkpoint import write_atomic
    from train.config import ConfigError, load_config
    from train.failures import explained

    try:
        config = load_config(options.config, options.overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from train.record import Log

    log = Log()
    finished = options.finished or Path("runs/accuracy") / f"{Path(options.config).stem}.jsonl"
    with explained(config, log) as outcome:
        try:
            report = measure(config, options.runs, finished, log)
        except RecipeChanged as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        report["command"] = command("accuracy", sys.argv[1:] if arguments is None else arguments)
        for line in lines(report):
            print(line)
        print(json.dumps(report))
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(options.json, (json.dumps(report, indent=1) + "\n").encode())
    return outcome.code


def measure(config: Config, runs: int, finished: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Do the runs that are missing in `finished`, and give the report over all `runs`."""
    from train.config import to_dict

    recipe = to_dict(config)
    first = config.train.seed
    done = read_finished(finished, recipe)
    missing = [seed for seed in range(first, first + runs) if seed not in done]
    if done:
        log(f"{finished}: {len(done)} finished runs, {len(missing)} to go")
    if missing:
        with Campaign(config) as campaign:
            environment = campaign.environment()
            append(finished, {"recipe": comparable(recipe), "environment": environment}, only_first=True)
            check_same_machine(finished, environment)
            for seed in missing:
                done[seed] = campaign.run(seed)
                append(finished, done[seed])
                record = done[seed]
                log(
                    f"seed {seed}: {record['accuracy']:.2f}%, flip TTA {record['tta_accuracy']:.2f}%, "
                    f"training {record['seconds']['training']:.1f} s"
                )
    return summarise(
        [done[seed] for seed in range(first, first + runs)], comparable(recipe), read_environment(finished)
    )


def comparable(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without what changes no result: where it runs, where things lie, and the seed, which is counted up."""
    harmless = {"data": ("root", "download"), "train": ("seed",), "run": tuple(recipe["run"])}
    return {
        section: {key: value for key, value in keys.items() if key not in harmless.get(section, ())}
        for section, keys in recipe.items()
    }


def read_finished(path: Path, recipe: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The finished runs by seed; a last line that was cut off is removed. RecipeChanged where another recipe wrote them, or
    another program."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole, _, torn = text.rpartition("\n")
    if not (text.startswith(BEGIN) or BEGIN.startswith(text)):
        raise RecipeChanged(f"{path} is no record of finished runs; name another file with --finished")
    records = [json.loads(line) for line in whole.splitlines()]
    if not records:
        path.unlink()
        return {}
    if torn:
        path.write_text(whole + "\n", encoding="utf-8")
    then, now = records[0]["recipe"], comparable(recipe)
    if then != now:
        changed = [
            f"{section}.{key}: {then.get(section, {}).get(key)} -> {value}"
            for section, keys in now.items()
            for key, value in keys.items()
            if then.get(section, {}).get(key) != value
        ]
        raise RecipeChanged(
            f"{path} holds runs of another recipe ({'; '.join(changed) or 'keys differ'}); go on with that one, or name "
            "another file with --finished"
        )
    return {record["seed"]: record for record in records[1:]}


def read_environment(path: Path) -> dict[str, Any]:
    """Of the session that began the file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8").partition("\n")[0])["environment"]
    return found


def check_same_machine(path: Path, now: dict[str, Any]) -> None:
    """RecipeChanged where the file's runs had another device, precision or compiler: one mean is of one kind of runs."""

    def resolved(environment: dict[str, Any]) -> dict[str, str]:
        return {
            "device": environment["device"].partition(":")[0],
            "device name": environment["device_name"] or environment["machine"]["cpu"],
            "precision": environment["precision"],
            "compile": environment["compile"],
        }

    before = resolved(read_environment(path))
    changed = [f"{key}: {before[key]} -> {value}" for key, value in resolved(now).items() if before[key] != value]
    if changed:
        raise RecipeChanged(
            f"{path} holds runs of another machine or arithmetic ({'; '.join(changed)}); name another file with --finished"
        )


def append(path: Path, record: dict[str, Any], only_first: bool = False) -> None:
    """One line, on the disk when this returns; `only_first` writes to an empty file alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        if only_first and file.tell() > 0:
            return
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Campaign:
    """One trainer, compiled once, for any number of seeds."""

    def __init__(self, config: Config) -> None:
        from benchmarks.measure import reset_device_peak
        from train.distributed import Group
        from train.fit import Setup
        from train.loop import Times
        from train.record import Log
        from train.steps import EvalStep

        self.config = config
        self._times = Times()
        self._quiet = Log(quiet=True)
        with self._times.on("set_up"):
            self.setup: Setup = Setup(config, self._quiet, self._times, Group())
            self.dataset = self.setup.load_data()
            self.trainer: Trainer = self.setup.build(self.dataset)
        reset_device_peak(self.setup.runtime.device)
        self.setup.warm_up(self.trainer)
        runtime = self.setup.runtime
        self._tta_step: EvalStep | None = None
        if not config.train.tta:
            self._tta_step = EvalStep(
                self.trainer.net,
                self.dataset.mean,
                self.dataset.std,
                tta=True,
                autocast_dtype=runtime.autocast_dtype,
                channels_last=runtime.channels_last,
            ).to(runtime.device)
            if runtime.compile_mode is not None:
                self._tta_step.compile(mode=runtime.compile_mode, dynamic=False)
                with self._times.on("compile", runtime.device):
                    self._flip_tta()

    def __enter__(self) -> Campaign:
        return self

    def __exit__(self, *_: object) -> None:
        self.trainer.close()

    def _flip_tta(self) -> float:
        from train.evaluation import evaluate

        assert self._tta_step is not None
        score = evaluate(self._tta_step, self.trainer.eval_loader).flip
        assert score is not None
        return score.accuracy

    def environment(self) -> dict[str, Any]:
        from benchmarks.machine import machine_record
        from train.fit import environment

        found = environment(self.setup, self.dataset)
        return found | {
            "machine": machine_record(self.setup.runtime.device),
            "once_seconds": {"set_up": self._times.set_up, "compile": self._times.compile},
        }

    def run(self, seed: int) -> dict[str, Any]:
        """The recipe with this seed, from scratch to its last evaluation, as a record of plain numbers."""
        from benchmarks.measure import device_peak_gib
        from train.estimate import LongRunNotice
        from train.fit import find_rates
        from train.loop import Position, Run, Times
        from train.optim import OneCycle
        from train.signals import SignalWatch

        trainer, config, schedule = self.trainer, self.config, self.config.schedule
        reset(trainer, self.setup, seed)
        times = self.setup.times = Times()
        notice = LongRunNotice(trainer.total_steps, config, self.setup.runtime, self._quiet)
        if "find" in (schedule.lr_max, schedule.lr_min):
            lr_max, lr_min = find_rates(self.setup, trainer, None, notice, overwrite=False)
        else:
            assert isinstance(schedule.lr_max, float) and isinstance(schedule.lr_min, float)
            lr_max, lr_min = schedule.lr_max, schedule.lr_min
        one_cycle = OneCycle(lr_max, lr_min, schedule.peak_epoch * trainer.steps_per_epoch, trainer.total_steps)
        position = Position()
        Run(trainer, one_cycle, None, self._quiet, times, position, SignalWatch(), notice).train()
        last = position.metrics[-1]
        seconds = {"lr_search": times.lr_search, "training": times.training, "evaluation": times.evaluation, "tta": 0.0}
        if self._tta_step is None:
            tta_accuracy = last["test_tta_accuracy"]
        else:
            tta_times = Times()
            with tta_times.on("evaluation", trainer.runtime.device):
                tta_accuracy = self._flip_tta()
            seconds["tta"] = tta_times.evaluation
        record = {
            "seed": seed,
            "accuracy": last["test_accuracy"],
            "tta_accuracy": tta_accuracy,
            "test_loss": last["test_loss"],
            "lr_max": lr_max,
            "lr_min": lr_min,
            "device_peak_gib": device_peak_gib(trainer.runtime.device),  # since before the warm-up
            "seconds": seconds,
            "images_per_second": trainer.config.train.epochs
            * trainer.steps_per_epoch
            * config.train.batch_size
            / sum(m["seconds"] for m in position.metrics),
            **time_to(position.metrics),
        }
        if "ema_test_accuracy" in last:
            record["ema_accuracy"] = last["ema_test_accuracy"]
        return record


def time_to(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """When the test accuracy first was TARGET: the epoch, the training seconds until its end, and with all evaluations
    until then; None where it never was."""
    training = evaluation = 0.0
    for epoch in metrics:
        training += epoch["seconds"]
        evaluation += epoch["eval_seconds"]
        if epoch["test_accuracy"] >= TARGET:
            return {
                "epoch_of_94": epoch["epoch"],
                "training_seconds_to_94": training,
                "seconds_to_94": training + evaluation,
            }
    return {"epoch_of_94": None, "training_seconds_to_94": None, "seconds_to_94": None}


def reset(trainer: Trainer, setup: Setup, seed: int) -> None:
    """Put a used trainer where a new one with this seed would stand. Every tensor keeps its memory, so that what was
    compiled or captured stays valid."""
    import torch

    from net.resnet import CustomResNet
    from train.optim import start_momentum
    from train.runtime import seed_everything
    from train.trainer import make_train_loader

    config, dataset = trainer.config, trainer.dataset
    config.train.seed = seed
    seed_everything(seed, config.train.deterministic)
    drawn = CustomResNet(dataset.num_classes, config.net.width, config.net.logit_scale)
    trainer.net.load_state_dict(drawn.state_dict())
    trainer.net.train()
    if trainer.ema is not None:
        trainer.ema.module.load_state_dict(drawn.state_dict())
        trainer.ema.n_averaged.zero_()
    trainer.optimizer.zero_grad(set_to_none=True)
    start_momentum(trainer.optimizer)
    if trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(torch.amp.GradScaler(setup.runtime.device.type).state_dict())
    trainer.train_loader.close()
    compiled = setup.runtime.compile_mode is not None
    trainer.train_loader = make_train_loader(config, dataset, setup.runtime.device, setup.backend, compiled=compiled)
    next(trainer.train_loader.epoch(0))  # builds and compiles what is left before the clock starts


def summarise(
    records: list[dict[str, Any]], recipe: dict[str, Any], environment: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The report over finished runs: means, standard deviations, 95% intervals."""
    from benchmarks.measure import mean_and_interval
    from train.record import git_commit

    def statistic(values: list[float]) -> dict[str, Any]:
        mean, deviation, half_width = mean_and_interval(values)
        return {"mean": mean, "std": deviation, "interval95": half_width, "n": len(values)}

    reached = [r["seconds_to_94"] for r in records if r["seconds_to_94"] is not None]
    trained = [r["training_seconds_to_94"] for r in records if r["training_seconds_to_94"] is not None]
    environment = environment or {}
    return {
        "kind": KIND,
        "command": "",
        "recipe": recipe,
        "machine": environment.get("machine"),
        "versions": environment.get("versions"),
        "commit": environment.get("commit") or git_commit(),
        "runs": len(records),
        "accuracy": statistic([r["accuracy"] for r in records]),
        "tta_accuracy": statistic([r["tta_accuracy"] for r in records]),
        "seconds": {name: statistic([r["seconds"][name] for r in records]) for name in records[0]["seconds"]},
        "covers": COVERS,
        "once_seconds": environment.get("once_seconds"),
        "images_per_second": statistic([r["images_per_second"] for r in records]),
        "device_peak_gib": max((r["device_peak_gib"] for r in records if r.get("device_peak_gib")), default=None),
        "reached_94": len(reached),
        "seconds_to_94": statistic(reached) if reached else None,
        "training_seconds_to_94": statistic(trained) if trained else None,
        "finished": records,
    }


def lines(report: dict[str, Any]) -> list[str]:
    """The report for a person."""

    def accuracy(name: str) -> str:
        found = report[name]
        if found["std"] is None:
            return f"{found['mean']:.2f}% (n = 1)"
        return f"{found['mean']:.2f}% +- {found['interval95']:.2f} (95%, n = {found['n']}), std {found['std']:.2f}"

    seconds = report["seconds"]
    result = [
        "",
        f"accuracy            {accuracy('accuracy')}",
        f"with flip TTA       {accuracy('tta_accuracy')}",
        f"time of a run       {sum(seconds[name]['mean'] for name in seconds):.1f} s: "
        + ", ".join(f"{name.replace('_', ' ')} {seconds[name]['mean']:.1f} s" for name in seconds),
        f"                    not in it: {COVERS['once']}",
        f"throughput          {report['images_per_second']['mean']:,.0f} images/s in training",
    ]
    if report["device_peak_gib"] is not None:
        result.append(f"GPU memory          {report['device_peak_gib']:.2f} GiB at the peak")
    if report["reached_94"]:
        result.append(
            f"time to {TARGET:.0f}%         {report['seconds_to_94']['mean']:.1f} s with the evaluations, "
            f"{report['training_seconds_to_94']['mean']:.1f} s without ({report['reached_94']} of {report['runs']} runs)"
        )
    else:
        result.append(f"time to {TARGET:.0f}%         not reached")
    return result


if __name__ == "__main__":
    sys.exit(main())
