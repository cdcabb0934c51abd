"""Which options pay: candidates with the same seeds, on held-out training images, and how much each gains.

python benchmarks/recipes.py STAGE --runs N [--work DIR] [--as-is] [--json FILE] [--picture FILE] [section.key=value ...]
python benchmarks/recipes.py STAGE --runs N --only NAME [--only NAME ...] [--work DIR] [section.key=value ...]

STAGE is `kinds` (options grouped by kind, alone and together, 8 epochs at width 8), `left-out` (all of them, and without each
one, 8 epochs at width 16), `further` (all of them, and with one more each, 8 epochs at width 64) or `epochs` (base and all of
them over more and more epochs, width 16). Every candidate is done with the first seed before any with the second. --only does
all seeds of the candidates named, each compiled once, and reports nothing: on a GPU, where compiling takes longer than a run,
and for several processes at a time, each with candidates of its own. Each finished run is a line of a JSONL file in --work, one
file a candidate, as benchmarks/accuracy.py writes them; after an interruption the same command continues with the runs that
are missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder, whose files could hide packages of the same name

from benchmarks.given import parsed, seeds_parser  # noqa: E402
from dali_pipeline.errors import UserError  # noqa: E402

KIND = "recipes"
RECIPE = "onecycle"
COMMON = ("data.validation=10000", "schedule.lr_max=0.4", "schedule.lr_min=0.004", "run.analyse=false")
PEAK = 0.2  # of the epochs
RUNS_OF_A_BASE = 3  # enough for others to be compared to it
# what a candidate may have beside the base, by name
OPTIONS: dict[str, tuple[str, ...]] = {
    "muon": ("optim.filters=muon", "optim.muon_lr=0.2"),
    "whitening": ("net.whitening=true",),
    "dirac": ("net.residual_init=dirac",),
    "gelu": ("net.activation=gelu",),
    "smoothing": ("optim.label_smoothing=0.2",),
    "alternating flip": ("augment.flip_rule=alternating",),
    "reflect": ("augment.padding_mode=reflect",),
    "no cutout": ("augment.cutout=0",),
}
# beside all of those, or instead of their values
FURTHER: dict[str, tuple[str, ...]] = {
    "pad 2": ("augment.pad=2",),
    "smoothing 0.1": ("optim.label_smoothing=0.1",),
    "muon 0.1": ("optim.muon_lr=0.1",),
    "muon 0.4": ("optim.muon_lr=0.4",),
    "norm bias rate 64": ("optim.norm_bias_rate=64",),
    "lookahead 5": ("optim.lookahead_every=5",),
    "triangle": ("schedule.shape=triangle",),
}
ACCURACIES = {"accuracy": "plain", "tta_accuracy": "flip", "shift_accuracy": "6 views"}


@dataclass(frozen=True)
class Candidate:
    """A recipe to compare: what it has beside the base, and for how many epochs it trains."""

    name: str
    words: tuple[str, ...]
    epochs: int

    @property
    def title(self) -> str:
        """Its name with its epochs: `all-8`."""
        return f"{self.name}-{self.epochs}"

    @property
    def file(self) -> str:
        """The name of its file of finished runs."""
        return f"{self.title.replace(' ', '_')}.jsonl"


def having(*names: str) -> tuple[str, ...]:
    return tuple(word for name in names for word in OPTIONS[name])


def kinds() -> list[Candidate]:
    """Options grouped by kind, alone and all together."""
    network, data = ("whitening", "dirac", "gelu"), ("smoothing", "alternating flip", "reflect", "no cutout")
    found = {"base": (), "muon 0.2": having("muon"), "all": having(*OPTIONS)}
    found |= {f"muon {rate}": (OPTIONS["muon"][0], f"optim.muon_lr={rate}") for rate in ("0.1", "0.4")}
    found |= {"network": having(*network), "data": having(*data)}
    return [Candidate(name, words, 8) for name, words in found.items()]


def left_out() -> list[Candidate]:
    """The base, all options, and all but one."""
    without = [Candidate(f"without {name}", having(*(n for n in OPTIONS if n != name)), 8) for name in OPTIONS]
    return [Candidate("base", (), 8), Candidate("all", having(*OPTIONS), 8), *without]


def epochs() -> list[Candidate]:
    """The base and all options over more and more epochs, up to as many: how few of them reach what the base does in 24?"""
    bases = [Candidate("base", (), count) for count in (8, 12, 24)]
    return bases + [Candidate("all", having(*OPTIONS), count) for count in (6, 8, 10, 24)]


def further() -> list[Candidate]:
    """All options, and with one more each, or one of them at another value."""

    def all_and(*words: str) -> tuple[str, ...]:
        given = {word.partition("=")[0] for word in words}
        return (*(word for word in having(*OPTIONS) if word.partition("=")[0] not in given), *words)

    return [Candidate(name, all_and(*words), 8) for name, words in {"all": (), **FURTHER}.items()]


STAGES = {"kinds": (8, kinds), "left-out": (16, left_out), "further": (64, further), "epochs": (16, epochs)}


def parser() -> argparse.ArgumentParser:
    result = seeds_parser(__doc__, "laid over every candidate", dest="stage", choices=STAGES)
    result.add_argument("--work", type=Path, metavar="DIR", help="the files of finished runs (runs/recipes/STAGE)")
    result.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="do all runs of this candidate (repeatable), named as in the table or with its epochs (all-8), without a report",
    )
    result.add_argument(
        "--as-is",
        action="store_true",
        help="train nothing: report the runs that are finished, also those of another machine",
    )
    result.add_argument("--picture", type=Path, metavar="FILE", help="draw the accuracies against the epochs")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(parser(), arguments)
    from benchmarks.accuracy import finished_report, measure
    from benchmarks.outcome import conclude, explained
    from train.config import Config, load_config
    from train.screen.log import Log

    log = Log()
    width, candidates_of = STAGES[options.stage]
    work = options.work or Path("runs/recipes") / options.stage

    def config(candidate: Candidate) -> Config:
        words = [f"net.width={width}", f"train.epochs={candidate.epochs}"]
        words += [f"schedule.peak_epoch={PEAK * candidate.epochs:g}", *COMMON, *candidate.words]
        given = {word.partition("=")[0] for word in options.overrides}
        return load_config(RECIPE, [w for w in words if w.partition("=")[0] not in given] + options.overrides)

    with explained(log) as outcome:
        configs = {candidate: config(candidate) for candidate in candidates_of()}
        if options.only and (options.as_is or options.json or options.picture):
            raise UserError("--only reports nothing: leave out --as-is, --json and --picture")
        known = {name for candidate in configs for name in (candidate.name, candidate.title)}
        if unknown := [name for name in options.only if name not in known]:
            names = ", ".join(dict.fromkeys(candidate.name for candidate in configs))
            raise UserError(f"--only {unknown[0]}: no candidate of {options.stage}, which has {names}")
        for candidate, chosen in configs.items():
            if candidate.name in options.only or candidate.title in options.only:
                log(f"{candidate.name}, {chosen.train.epochs} epochs, {options.runs} runs")
                measure(chosen, options.runs, work / candidate.file, log, "validation")
        if options.only:
            return outcome.code
        reports: dict[Candidate, dict[str, Any]] = {}
        if options.as_is:
            found = {
                c: finished_report(config, options.runs, work / c.file, "validation") for c, config in configs.items()
            }
            reports = {candidate: report for candidate, report in found.items() if report is not None}
            if not {"base", "all"} & {candidate.name for candidate in reports}:
                raise UserError(f"--as-is: {work} has no finished run of base or of all")
        for runs in () if options.as_is else range(1, options.runs + 1):
            for candidate, chosen in configs.items():
                log(f"{candidate.name}, {chosen.train.epochs} epochs, {runs} of {options.runs} runs")
                reports[candidate] = measure(chosen, runs, work / candidate.file, log, "validation")
        report = summarise(options.stage, reports)
        conclude(report, KIND, arguments, options, table, draw)
    return outcome.code


def summarise(stage: str, reports: dict[Candidate, dict[str, Any]]) -> dict[str, Any]:
    """For each candidate its accuracies, and their differences, seed by seed, to the base that trains longest of those with three
    runs or with most, or to all options where there is no base: means with 95% intervals, in points. A seed that only one of two
    has is in no difference."""
    from benchmarks.measure import statistic

    rows = []
    name_of_base = "base" if any(candidate.name == "base" for candidate in reports) else "all"
    bases = {candidate: report["runs"] for candidate, report in reports.items() if candidate.name == name_of_base}
    longest = max(bases, key=lambda base: (min(bases[base], RUNS_OF_A_BASE), base.epochs, bases[base]))
    base = {run["seed"]: run for run in reports[longest]["finished"]}

    def against_all(candidate: Candidate, report: dict[str, Any]) -> dict[str, Any] | None:
        found = next((r for c, r in reports.items() if (c.name, c.epochs) == ("all", candidate.epochs)), None)
        everything = {run["seed"]: run["accuracy"] for run in found["finished"]} if found else {}
        pairs = [(run["accuracy"], everything[run["seed"]]) for run in report["finished"] if run["seed"] in everything]
        return statistic([a - b for a, b in pairs]) if pairs else None

    for candidate, report in reports.items():
        pairs = [(run, base[run["seed"]]) for run in report["finished"] if run["seed"] in base]
        rows.append(
            {
                "name": candidate.name,
                "options": list(candidate.words),
                "epochs": report["recipe"]["train"]["epochs"],
                "on": _on(report),
                "accuracies": {name: report[name] for name in ACCURACIES},
                "differences": {name: statistic([a[name] - b[name] for a, b in pairs]) for name in ACCURACIES if pairs},
                **({"against_all": against_all(candidate, report)} if candidate.name.startswith("without ") else {}),
                "training_seconds": report["seconds"]["training"]["mean"],
            }
        )
    first = next(iter(reports.values()))
    return {
        "kind": KIND,
        "command": "",
        "stage": stage,
        "base": name_of_base,
        "base_epochs": longest.epochs,
        **{key: first[key] for key in ("recipe", "machine", "versions", "commit")},
        "precision": " and ".join(dict.fromkeys(row["on"][-1] for row in rows)),
        "machines": list(dict.fromkeys(", ".join(row["on"][:-1]) for row in rows)),
        "runs": max(report["runs"] for report in reports.values()),
        "rows": rows,
    }


def _on(report: dict[str, Any]) -> list[str]:
    """The machine, the version of torch and the precision of runs."""
    from benchmarks.tables import machine_of

    precision = report["precision"] or report["recipe"]["train"]["precision"]
    return [machine_of(report), f"torch {report['versions']['torch']}", precision]


def _points(found: dict[str, Any], sign: str = "") -> str:
    interval = "" if found["std"] is None else f" ± {found['interval95']:.2f}"
    return f"{found['mean']:{sign}.2f}{interval}"


def table(report: dict[str, Any]) -> list[str]:
    """A Markdown table with a row for each candidate, and below it what was measured and how."""
    recipe = report["recipe"]
    labels, base = list(ACCURACIES.values()), report.get("base", "base")
    rows = [
        f"| candidate | epochs | n | {' | '.join(labels)} | {' | '.join(f'gain, {label}' for label in labels)} |",
        "|---|---:|---:|" + "---:|" * (2 * len(labels)),
    ]
    precision = report["precision"] or recipe["train"]["precision"]
    left_out = any(row.get("against_all") for row in report["rows"])
    if left_out:
        rows = [rows[0] + " against all, plain |", rows[1] + "---:|"]
    places = {tuple(row.get("on", ())) for row in report["rows"]}
    differing = [place for place, values in enumerate(zip(*places, strict=True)) if len(set(values)) > 1]
    if differing:
        rows = [rows[0] + " on |", rows[1] + "---|"]
    for row in report["rows"]:
        cells = [_points(row["accuracies"][name]) for name in ACCURACIES]
        is_base = row["name"] == base and row["epochs"] == report["base_epochs"]
        differences = {} if is_base else row["differences"]
        cells += [_points(differences[name], "+") if name in differences else "" for name in ACCURACIES]
        if left_out:
            cells.append(_points(row["against_all"], "+") if row.get("against_all") else "")
        if differing:
            cells.append(", ".join(row["on"][place] for place in differing))
        rows.append(f"| {row['name']} | {row['epochs']} | {row['accuracies']['accuracy']['n']} | {' | '.join(cells)} |")
    return [
        *rows,
        "",
        f"Width {recipe['net']['width']}, batch {recipe['train']['batch_size']}, {precision}, accuracy on "
        f"{recipe['data']['validation']:,} held-out training images in percent; gains in points over {base}, "
        f"{report['base_epochs']} epochs, over the seeds that both have; mean ± 95% interval "
        f"over n seeds. {'; '.join(report['machines'])}. `{report['command']}`",
    ]


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the accuracy of each candidate against the epochs that it trains, without and with six views."""
    from analysis.plotting import drawn

    drawn(_draw)(report, path)


def _draw(report: dict[str, Any], path: Path) -> None:
    from analysis.style import BLUE, GREEN, ORANGE, VERMILLION, new_figure, save

    count = {row["accuracies"]["accuracy"]["n"] for row in report["rows"]}
    n = "n = " + " to ".join(str(number) for number in sorted({min(count), max(count)}))
    caption = f"width {report['recipe']['net']['width']}, held-out training images, {n}"
    figure = new_figure(7.4, 4.4, "Accuracy against the epochs of the training", caption)
    axes = figure.subplots()
    names = list(dict.fromkeys(row["name"] for row in report["rows"]))
    colours = (BLUE, VERMILLION, GREEN, ORANGE)
    for number, name in enumerate(names):
        rows = sorted((row for row in report["rows"] if row["name"] == name), key=lambda row: row["epochs"])
        for accuracy, line in (("accuracy", "-"), ("shift_accuracy", "--")):
            found = [row["accuracies"][accuracy] for row in rows]
            axes.errorbar(
                [row["epochs"] for row in rows],
                [value["mean"] for value in found],
                yerr=[value["interval95"] or 0.0 for value in found],
                color=colours[number % len(colours)],
                linestyle=line,
                marker="o",
                markersize=4,
                capsize=2,
                label=f"{name}, {ACCURACIES[accuracy]}",
            )
    axes.set_xticks(sorted({row["epochs"] for row in report["rows"]}))
    axes.set_xlabel("epochs of the training")
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(loc="lower right", fontsize=8, handlelength=4)  # long enough to show the dashes
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
