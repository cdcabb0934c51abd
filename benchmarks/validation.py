"""How well the accuracy on held-out training images follows the test accuracy, epoch by epoch, over several seeds.

python benchmarks/validation.py configs/cpu.yaml data.validation=5000 --runs 3 --json FILE [--picture FILE]

Here the test set is measured after every epoch, which a training with data.validation never does: this evaluates the method and
chooses nothing by it. Each finished run is a line of a JSONL file; the same command continues with the seeds that are missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder, whose files could hide packages of the same name

from benchmarks.given import add_finished, finished_runs, parsed, seeds_parser  # noqa: E402

if TYPE_CHECKING:
    from train.session import Session

KIND = "validation"


def parser() -> argparse.ArgumentParser:
    result = seeds_parser(__doc__, "data.validation= among them")
    add_finished(result, KIND)
    result.add_argument("--picture", type=Path, metavar="FILE", help="draw both accuracies by epoch")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(parser(), arguments)
    from benchmarks.accuracy import append, check_same_machine, comparable, read_environment, read_finished
    from benchmarks.machine import machine_facts
    from benchmarks.outcome import conclude, explained
    from train.config import ConfigError, load_config, to_dict
    from train.screen.log import Log
    from train.session import Session

    finished = finished_runs(options, KIND)
    log = Log()
    with explained(log) as outcome:
        config = load_config(options.config, options.overrides)
        if config.data.validation is None:
            raise ConfigError(
                "data.validation: null, no images are held out; add data.validation=5000, or another number"
            )
        recipe = comparable(to_dict(config), "validation and test, each epoch")
        seeds = range(config.train.seed, config.train.seed + options.runs)
        done = {entry["seed"]: entry for entry in read_finished(finished, recipe)}
        missing = [seed for seed in seeds if seed not in done]
        if missing:
            with Session(config, Log(quiet=True)) as session:
                session.build()
                session.warm_up()
                environment = session.environment() | {"machine": machine_facts(session.runtime.device)}
                append(finished, {"recipe": recipe, "environment": environment}, only_first=True)
                check_same_machine(finished, environment)
                for seed in missing:
                    done[seed] = {"seed": seed, "epochs": by_epoch(session, seed)}
                    append(finished, done[seed])
                    log(f"seed {seed}: {sentence(done[seed]['epochs'])}")
        report = summarise([done[seed] for seed in seeds], recipe, read_environment(finished))
        conclude(report, KIND, arguments, options, draw=draw)
    return outcome.code


def by_epoch(session: Session, seed: int) -> list[dict[str, float]]:
    """A training with this seed: validation and test accuracy after each of its epochs, in percent."""
    from train.disk.snapshot import Position
    from train.loop import Run
    from train.run import find_rates
    from train.screen.notice import LongRunNotice
    from train.step.measures import Measure
    from train.step.schedule import Rates, make_schedule

    trainer, config = session.trainer, session.config
    trainer.start_over(seed)
    notice = LongRunNotice(trainer.total_steps, config, session.runtime, session.log)
    rates = Rates.given(config.schedule) or find_rates(session, None, notice)
    found: list[dict[str, float]] = []
    evaluate, loader = trainer.evaluate, session.eval_loader("test")

    def both(*rest: Any) -> Any:
        scores = evaluate(*rest)
        (tested,) = trainer.evaluate_on(loader, [Measure("test")]).values()
        found.append({"validation": next(iter(scores.values())).accuracy, "test": tested.accuracy})
        print(f"seed {seed}, epoch {len(found)}: {found[-1]}", file=sys.stderr, flush=True)
        return scores

    trainer.evaluate = both  # type: ignore[method-assign]
    try:
        schedule = make_schedule(config.schedule, rates, config.train.epochs, trainer.steps_per_epoch)
        Run(session, schedule, None, Position(), notice).train()
    finally:
        trainer.evaluate = evaluate  # type: ignore[method-assign]
        loader.close()
    return found


def sentence(epochs: list[dict[str, float]]) -> str:
    """A sentence: the test accuracy of the epoch chosen by validation, that of the last epoch, and the highest."""
    chosen = max(range(len(epochs)), key=lambda i: epochs[i]["validation"])
    best = max(range(len(epochs)), key=lambda i: epochs[i]["test"])
    return (
        f"last epoch {epochs[-1]['test']:.2f}% of the test set; epoch {chosen + 1}, best of validation "
        f"({epochs[chosen]['validation']:.2f}%): {epochs[chosen]['test']:.2f}%; epoch {best + 1}, best of the test set itself: "
        f"{epochs[best]['test']:.2f}%"
    )


def summarise(runs: list[dict[str, Any]], recipe: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """Over the runs: test accuracy of the last epoch, of the epoch that validation chooses and of the one that the test set
    chooses, and the difference between validation and test accuracy over all epochs."""
    from benchmarks.measure import statistic

    tables = [run["epochs"] for run in runs]
    return {
        "kind": KIND,
        "command": "",
        "recipe": recipe,
        **{key: environment.get(key) for key in ("machine", "versions", "commit")},
        "runs": len(runs),
        "last": statistic([epochs[-1]["test"] for epochs in tables]),
        "chosen_on_validation": statistic([max(epochs, key=lambda e: e["validation"])["test"] for epochs in tables]),
        "chosen_on_test": statistic([max(e["test"] for e in epochs) for epochs in tables]),
        "difference_after_the_last_epoch": statistic([e[-1]["validation"] - e[-1]["test"] for e in tables]),
        "finished": runs,
    }


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw both accuracies by epoch, with a line for each seed."""
    from analysis.plotting import drawn

    drawn(_draw)(report, path)


def _draw(report: dict[str, Any], path: Path) -> None:
    from analysis.plotting import MaxNLocator
    from analysis.style import BLUE, VERMILLION, new_figure, save

    data, width = report["recipe"]["data"], report["recipe"]["net"]["width"]
    caption = f"{data['name']}, width {width}, data.validation={data['validation']}, n = {report['runs']}"
    figure = new_figure(9.6, 4.2, "Accuracy on held-out training images and on the test set", caption)
    whole, near = figure.subplots(1, 2)
    for axes in (whole, near):
        for number, run in enumerate(report["finished"]):
            epochs = range(1, len(run["epochs"]) + 1)
            for what, colour, style in (("validation", BLUE, "-"), ("test", VERMILLION, "--")):
                values = [epoch[what] for epoch in run["epochs"]]
                label = what if number == 0 else None
                axes.plot(epochs, values, color=colour, linestyle=style, linewidth=1.2, label=label)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, linewidth=0.5)
    count = len(report["finished"][0]["epochs"])
    first = 2 * count // 3  # of the epochs that the second panel shows
    late = [value for run in report["finished"] for epoch in run["epochs"][first:] for value in epoch.values()]
    near.set_xlim(first + 0.8, count + 0.2)
    near.set_ylim(min(late) - 0.5, max(late) + 0.5)
    near.set_title("the last epochs, closer", fontsize=10)
    whole.set_ylabel("accuracy (%)")
    whole.legend(loc="lower right", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
