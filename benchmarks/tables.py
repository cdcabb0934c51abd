"""The tables of the README and of documents from the files in benchmarks/results/.

python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of this folder, whose files could hide packages of the same name

from benchmarks.given import read_json, reading  # noqa: E402
from dali_pipeline.errors import UserError  # noqa: E402
from dali_pipeline.words import to_stderr  # noqa: E402
from train.screen.streams import Parser, say_error, standard_streams  # noqa: E402

BEGIN, END = "<!-- results: python benchmarks/tables.py -->", "<!-- /results -->"
REFERENCE_PEER = "torchvision_pil_2_workers"


def load_results(folder: Path, kind: str) -> dict[Path, dict[str, Any]]:
    """The reports of one kind ("throughput", "image_folder", "accuracy", ...), in order of their file names. Raises
    UserError, which names a file that is damaged."""
    reports = {path: read_json(path) for path in sorted(folder.glob("*.json"))}
    for path, report in reports.items():
        if not isinstance(report, dict):
            raise UserError(f"{path}: holds a {type(report).__name__}, expected the report of a benchmark")
    return {path: report for path, report in reports.items() if report.get("kind") == kind}


def _rows(folder: Path, kind: str, table: Callable[[list[dict[str, Any]]], list[str]]) -> list[str]:
    """The table of all reports of a kind. UserError names the one that lacks something."""
    reports = load_results(folder, kind)
    for path, report in reports.items():
        with reading(path, f"a whole report of benchmarks/{kind}.py"):
            table([report])
    return table(list(reports.values())) if reports else []


def throughput_block(folder: Path) -> str:
    """What docs/throughput.md has between the two markers, markers included."""
    files = _rows(
        folder, "image_folder", lambda found: [row for report in found for row in ("", *folder_table(report))]
    )
    rows = [*_rows(folder, "throughput", throughput_table), *files]
    return _block(rows if rows[:1] != [""] else rows[1:])


def accuracy_block(folder: Path) -> str:
    """What the README has between the two markers, markers included."""
    return _block(_rows(folder, "accuracy", accuracy_table))


def validation_block(folder: Path) -> str:
    """What docs/configuration.md has between the two markers, markers included."""
    return _block(
        _rows(folder, "validation", lambda found: [row for report in found for row in validation_table(report)])
    )


def recipes_block(folder: Path) -> str:
    """What docs/recipes.md has between the two markers, markers included."""
    from benchmarks import recipes, roofline

    def each(table: Callable[[dict[str, Any]], list[str]]) -> Callable[[list[dict[str, Any]]], list[str]]:
        return lambda found: [row for report in found for row in ("", *table(report))]

    measured = _rows(folder, "recipes", each(recipes.table))
    return _block([*measured, *_rows(folder, "roofline", each(roofline.table))][1:])


# by document, the function that makes its block
BLOCKS = {
    "docs/throughput.md": throughput_block,
    "README.md": accuracy_block,
    "docs/configuration.md": validation_block,
    "docs/recipes.md": recipes_block,
}


def _block(rows: list[str]) -> str:
    return "\n".join([BEGIN, "", *rows, "", END] if rows else [BEGIN, END])


def throughput_table(reports: list[dict[str, Any]]) -> list[str]:
    """A table with a column for each machine and a row for each stage or peer; below it the commands, and how to read it."""
    columns = [machine_of(report) for report in reports]
    label = "images/s, median; ratios: median of paired ratios"
    rows = [f"| {label} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    names: dict[str, str] = {}
    for report in reports:
        for name in (*report["stages"], *report["peers"]):
            if not name.startswith("augment_"):
                names.setdefault(name, _label(name))
    best = {name: max(_median(report, name) or 0 for report in reports) for name in names}
    order = sorted(names, key=lambda name: (_group(name, reports), -best[name]))
    for name in order:
        cells = [_cell(report, name) for report in reports]
        rows.append(f"| {names[name]} | {' | '.join(cells)} |")
    quoted = [ratios(report) for report in reports]
    for name in quoted[0]:
        if any(found[name] for found in quoted):
            rows.append(f"| {name} | {' | '.join(found[name] for found in quoted)} |")
    rows.append("")
    for report in reports:
        settings = report["settings"]
        graph = ", a step as one CUDA graph" if settings.get("step_graph") else ""
        rows.append(
            f"- {machine_of(report)}: width {settings['width']}, batch {settings['batch_size']}, {settings['precision']}, "
            f"compile {settings['compile']}{graph}, {settings['images']:,} images ({settings['data']}), "
            f"torch {report['versions']['torch']}; load average {_load(report)}. "
            f"{report['verdict'][0].upper()}{report['verdict'][1:]}. {_note(report)}`{report['command']}`"
        )
    return rows


def ratios(report: dict[str, Any]) -> dict[str, str]:
    """The ratios of a report of throughput.py that documents quote, by their name in words; those not measured are left out."""
    fastest = fastest_reference(report)
    if fastest == REFERENCE_PEER:
        fastest = None  # it has a line already
    found: dict[str, str] = {}
    for name, words in (("dali", "DALI"), ("torch_compiled", "torch compiled")):
        found[f"{words} over DataLoader, PIL, 2 workers"] = _ratio(report, f"{name}_over_{REFERENCE_PEER}", "{:.0f}x")
        times = _ratio(report, f"{name}_over_{fastest}", "{:.0f}x")
        found[f"{words} over DataLoader, PIL, the fastest"] = (
            times and f"{times} ({_label(str(fastest)).split(', ')[-1]})"
        )
    return found | {
        "DALI over torch compiled": _ratio(report, "dali_over_torch_compiled", "{:.2f}x"),
        "end to end over the slower stage": _ratio(report, "overlap", "{:.1%}"),
        "share of the training thread that the pipeline takes": _ratio(
            report, "pipeline_share_of_training_thread", "{:.2%}"
        ),
        "model FLOP utilisation, of the machine's matrix products": _ratio(report, "model_flop_utilisation", "{:.1%}"),
    }


def folder_table(report: dict[str, Any]) -> list[str]:
    """Of a report of throughput.py --folder, a row for each stage with its ratios, and below it the command."""
    from benchmarks.image_folder import LABELS

    found, settings = report["ratios"], report["settings"]
    rows = [
        f"| {settings['images']:,} image files, images/s, median; ratios: median of paired ratios | {machine_of(report)} | "
        "over ImageFolder, not augmented | over ImageFolder, augmented |",
        "|---|---:|---:|---:|",
    ]
    for name, words in LABELS.items():
        over = [found.get(f"{name}_over_{theirs}") for theirs in ("image_folder_plain", "image_folder")]
        cells = " | ".join(
            "" if ratio is None else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x" for ratio in over
        )
        rows.append(f"| {words} | {_cell(report, name)} | {cells} |")
    height, width = settings["image_size"]
    seconds = settings["images"] / report["stages"]["later_start"]["median"]
    return [
        *rows,
        "",
        f"- {settings['training_images']:,} training images of {height} x {width}, batch {settings['batch_size']}, "
        f"{settings['backend']} pipeline, torch {report['versions']['torch']}, torchvision {report['versions']['torchvision']}; "
        f"n = {report['stages']['decode']['repeats']}; load average {_load(report)}. A later start takes {seconds:.2f} s. Pixels "
        f"of both ways differ by at most {settings['largest_difference']} of 255. `{report['command']}`",
    ]


def fastest_reference(report: dict[str, Any]) -> str | None:
    """The fastest measured DataLoader with torchvision's PIL transforms, with any number of workers."""
    rates = {name: rate["median"] for name, rate in report["peers"].items() if name.startswith("torchvision_pil_")}
    return max(rates, key=lambda name: rates[name], default=None)


def _ratio(report: dict[str, Any], name: str, form: str) -> str:
    value = report["ratios"].get(name)
    return "" if value is None else form.format(value)


def accuracy_table(reports: list[dict[str, Any]]) -> list[str]:
    rows = [
        "| recipe | machine | accuracy (n) | flip TTA | 6-view TTA | training | with evaluations | to 94% |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        seconds = report["seconds"]
        both = seconds["training"]["mean"] + seconds["evaluation"]["mean"]
        times = [f"{seconds['training']['mean']:.1f} s", f"{both:.1f} s", _to_94(report)]
        if report.get("shared"):  # written by hand, as a note is: the times are no measure of the machine
            times = ["", "", "" if report["reached_94"] else "not reached"]
        rows.append(
            f"| `{report['command']}` | {machine_of(report)} | {_accuracy(report['accuracy'])} | "
            f"{_accuracy(report['tta_accuracy'])} | {_accuracy(report.get('shift_accuracy'))} | "
            f"{' | '.join(times)} |"
        )
    notes = dict.fromkeys(f"{machine_of(report)}: {note.strip()}" for report in reports if (note := _note(report)))
    return [
        *rows,
        "",
        *(line for note in notes for line in (note, "")),
        "Times are without loading the data, compiling and the range test, which happen before the first epoch.",
    ]


def validation_table(report: dict[str, Any]) -> list[str]:
    """A table with a row for each epoch, and below it what choosing by either split gives and the command."""
    from benchmarks.measure import statistic

    rows = ["| epoch | validation | test | validation - test |", "|---:|---:|---:|---:|"]
    for number, scores in enumerate(zip(*(run["epochs"] for run in report["finished"]), strict=True), start=1):
        validation, test = (statistic([score[split] for score in scores])["mean"] for split in ("validation", "test"))
        difference = _accuracy(statistic([score["validation"] - score["test"] for score in scores]))
        rows.append(f"| {number} | {validation:.2f} | {test:.2f} | {difference} |")
    return [
        *rows,
        "",
        f"Test accuracy of the last epoch {_accuracy(report['last'])}, of the epoch that validation chooses "
        f"{_accuracy(report['chosen_on_validation'])}, of the epoch that the test set chooses "
        f"{_accuracy(report['chosen_on_test'])}. {report['recipe']['train']['precision']}, {machine_of(report)}, torch "
        f"{report['versions']['torch']}; mean ± 95% interval (number of seeds). `{report['command']}`",
    ]


def _to_94(report: dict[str, Any]) -> str:
    """The mean time to 94% over the runs that reached it, and how many of all runs did."""
    found = report["seconds_to_94"]
    return "not reached" if found is None else f"{found['mean']:.1f} s ({report['reached_94']} of {report['runs']})"


def _note(report: dict[str, Any]) -> str:
    """What somebody has written into a report by hand, as `note`: a condition of the measurement that no program knew of."""
    note = report.get("note")
    return f"{note} " if note else ""


def _accuracy(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if found["std"] is None:
        return f"{found['mean']:.2f} (1)"
    return f"{found['mean']:.2f} ± {found['interval95']:.2f} ({found['n']})"


def machine_of(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return machine.get("gpu") or f"{machine['cpus_usable']} cores, {machine['cpu']}"


def _load(report: dict[str, Any]) -> str:
    before = report["machine"].get("load_average_before")
    return "unknown" if not before else f"{before[0]:.1f} before"


def _group(name: str, reports: list[dict[str, Any]]) -> int:
    if any(name in report["peers"] for report in reports):
        return 2
    return 0 if name.startswith("pipeline_") else 1


def _median(report: dict[str, Any], name: str) -> float | None:
    found = report["stages"].get(name) or report["peers"].get(name)
    return None if found is None else float(found["median"])


def _cell(report: dict[str, Any], name: str) -> str:
    found = report["stages"].get(name) or report["peers"].get(name)
    if found is None:
        return ""
    return f"{found['median']:,.0f} ± {found['spread'] / 2 / found['median']:.0%}"


LABELS = {
    "pipeline": "pipeline, as training uses it",
    "step": "training step alone",
    "end_to_end": "training end to end",
    "evaluation": "evaluation",
    "kornia": "kornia, resident images",
    "airbench": "airbench CifarLoader, resident images",
}


def _label(name: str) -> str:
    if name in LABELS:
        return LABELS[name]
    if name.startswith("pipeline_"):
        _, backend, *rest = name.split("_")
        return f"{'DALI' if backend == 'dali' else backend} pipeline, {' '.join(rest)}"
    for prefix, words in (("torchvision_pil", "torchvision PIL"), ("torchvision_v2", "torchvision v2")):
        name = name.replace(prefix, f"DataLoader, {words},")
    return name.replace("albumentations_", "DataLoader, albumentations, ").replace("_", " ").replace(",  ", ", ")


def replaced(text: str, block: str) -> str:
    """A document with the block in place of the one between the markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END}")
    return before + block + after


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a document is out of date")
    parser.add_argument("--results", type=Path, metavar="DIR", help="the reports (benchmarks/results)")
    with standard_streams():
        options = parser.parse_args(arguments)
        outdated = False
        try:
            # all blocks before a document is changed
            blocks = {name: block(options.results or ROOT / "benchmarks" / "results") for name, block in BLOCKS.items()}
        except UserError as error:
            say_error(str(error))
            return error.exit_code
        for name, block in blocks.items():
            before = (ROOT / name).read_text(encoding="utf-8")
            after = replaced(before, block)
            if after != before and options.check:
                to_stderr(f"{name} is not what benchmarks/tables.py makes")
                outdated = True
            elif after != before:
                (ROOT / name).write_text(after, encoding="utf-8")
        return int(outdated)


if __name__ == "__main__":
    sys.exit(main())
