"""Ablations: one setting of the recipe is varied at a time; and a picture of the results."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.measure import Rate, Stage, device_peak_gib, interleave
from benchmarks.stages import Kind, Pipeline, Training
from dali_pipeline import dali_graph
from dali_pipeline.backend import choose_backend
from dali_pipeline.dataset import Dataset
from dali_pipeline.loader import GRAPHS
from train.config import Config, changed
from train.disk.atomic import write_atomic
from train.machine.compiler import find_compiler
from train.machine.runtime import prepare
from train.screen.log import Log
from train.session import Session

BATCH_SIZES = (128, 256, 512, 1024, 2048, 4096)
PIPELINES = (1, 2, 3, 4)
PREFETCH_DEPTHS = (1, 2, 3, 4, 8)
STRIPS = (4, 8, 16, 32, 64, 128)
STAGES = ("pipeline", "step", "end_to_end")

Variants = Iterator[tuple[str, Callable[[], dict[str, Rate]]]]


def ablate(
    name: str, config: Config, dataset: Dataset, repeats: int, seconds: float, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The rows of one table: each has a setting, and the rates of the stages or the reason why it could not be measured."""
    train = config.train
    device = prepare(device=train.device, compile="off").device
    say(f"\n{name:<32}" + "".join(f"{stage.replace('_', ' '):>14}" for stage in STAGES) + "  images/s")
    if name in DALI_ABLATIONS and choose_backend(config.data.backend, device).name != "dali":
        say("left out: the pipeline is torch's")
        return
    variants = DALI_ABLATIONS.get(name, partial(_trainings, name))(config, dataset, device, repeats, seconds)
    for setting, run in variants:
        row: dict[str, Any] = {"setting": setting}
        try:
            rates = run()
        except Exception as error:  # a setting that this machine cannot run is a row of the table
            row["left_out"] = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
            say(f"{setting:<32}{row['left_out']}")
        else:
            row |= {stage: rate.record() for stage, rate in rates.items()}
            if device.type == "cuda" and name not in DALI_ABLATIONS:
                row["device_peak_gib"] = device_peak_gib(device)
            cells = (f"{rates[stage].median:,.0f}" if stage in rates else "" for stage in STAGES)
            say(f"{setting:<32}" + "".join(f"{cell:>14}" for cell in cells))
        yield row


def _trainings(
    name: str, config: Config, dataset: Dataset, device: torch.device, repeats: int, seconds: float
) -> Variants:
    on_gpu = device.type == "cuda"
    able, _ = find_compiler(device)
    values: dict[str, Sequence[Any]] = {
        "channels_last": ("on", "off"),
        "compile": ("off", *(("default",) if able else ()), *(("reduce-overhead", "max-autotune") if on_gpu else ())),
        "step_graph": ("off", "on") if on_gpu else ("off",),
        "precision": ("fp32", "bf16", *(("fp16",) if on_gpu else ())),
        "batch": [size for size in BATCH_SIZES if size <= len(dataset.train)],
    }
    key = {"batch": "batch_size"}.get(name, name)
    for value in values[name]:

        def run(value: Any = value) -> dict[str, Rate]:
            try:
                with Session(changed(config, {f"train.{key}": value}), Log(quiet=True)) as session:
                    training = Training(session, dataset)
                    return interleave([training.stage(stage, seconds) for stage in STAGES], repeats)
            finally:
                torch._dynamo.reset()  # else settings share the limit on recompilations

        yield f"{key} {value}", run


def _pipelines(config: Config, dataset: Dataset, device: torch.device, repeats: int, seconds: float) -> Variants:
    """Several pipelines used in turn, so that the others prefetch while one is waited for."""
    for number in PIPELINES:

        def run(number: int = number) -> dict[str, Rate]:
            with ExitStack() as stack:
                several = [_dali(config, dataset, device) for _ in range(number)]
                for pipeline in several:
                    stack.callback(pipeline.close)

                def turns(steps: int) -> float:
                    return sum(several[step % number].run(1) for step in range(steps))

                return interleave(
                    [Stage("pipeline", turns, device, seconds, len(dataset.train) // config.train.batch_size)], repeats
                )

        yield f"{number} pipelines", run


def _prefetch(config: Config, dataset: Dataset, device: torch.device, repeats: int, seconds: float) -> Variants:
    for depth in PREFETCH_DEPTHS:

        def run(depth: int = depth) -> dict[str, Rate]:
            with patch.object(dali_graph, "PREFETCH_DEPTH", depth):
                pipeline = _dali(config, dataset, device)
            try:
                return interleave([pipeline.stage("pipeline", seconds)], repeats)
            finally:
                pipeline.close()

        yield f"prefetch depth {depth}", run


def _strips(config: Config, dataset: Dataset, device: torch.device, repeats: int, seconds: float) -> Variants:
    """The number of strips of a batch, at most."""
    for number in STRIPS:
        graph = partial(dali_graph.DaliGraph, most_strips=number)
        yield f"strips {number}", partial(_of_graph, graph, config, dataset, device, repeats, seconds)


def _graphs(config: Config, dataset: Dataset, device: torch.device, repeats: int, seconds: float) -> Variants:
    """The options of the DALI graph: how it paints the cutout, and whether images are stored with borders. By default it pastes,
    and stores borders on a GPU."""
    for cutout_by in ("paste", "erase"):
        for padded in (False, True):
            graph = partial(dali_graph.DaliGraph, cutout_by=cutout_by, padded=padded)
            name = f"cutout by {cutout_by}, {'resident' if padded else 'no'} border"
            yield name, partial(_of_graph, graph, config, dataset, device, repeats, seconds)


def _of_graph(
    graph: Any, config: Config, dataset: Dataset, device: torch.device, repeats: int, seconds: float
) -> dict[str, Rate]:
    with patch.dict(GRAPHS, {"dali": graph}):
        pipeline = _dali(config, dataset, device)
    try:
        return interleave([pipeline.stage("pipeline", seconds)], repeats)
    finally:
        pipeline.close()


def _dali(config: Config, dataset: Dataset, device: torch.device) -> Pipeline:
    return Pipeline(dataset, Kind("dali", device), batch_size=config.train.batch_size, augment=config.augment)


DALI_ABLATIONS = {"pipelines": _pipelines, "prefetch": _prefetch, "strips": _strips, "graph": _graphs}


def _short(setting: str, ablation: str) -> str:
    """The setting without the name that its panel's title gives already: "batch_size 512" becomes "512" in the panel "batch"."""
    first, _, rest = setting.partition(" ")
    return rest if rest and first.startswith(ablation) else setting.removesuffix(f" {ablation}")


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw bars for every pipeline and peer, and a panel for each ablation."""
    from analysis.plotting import drawn

    drawn(_draw)(report, path)


def _draw(report: dict[str, Any], path: Path) -> None:
    from analysis.plotting import Figure

    tables = {name: [row for row in rows if "left_out" not in row] for name, rows in report["ablations"].items()}
    tables = {name: rows for name, rows in tables.items() if rows}
    figure = Figure(figsize=(8, 3.5 + 2.4 * len(tables)))
    axes = figure.subplots(1 + len(tables), 1, squeeze=False)
    bars = {**report["peers"], **{k: v for k, v in report["stages"].items() if k.startswith("pipeline_")}}
    ordered = sorted(bars, key=lambda name: bars[name]["median"])
    top = axes[0, 0]
    top.barh(
        [name.removeprefix("pipeline_").replace("_", " ") for name in ordered],
        [bars[name]["median"] for name in ordered],
        xerr=[bars[name]["spread"] / 2 for name in ordered],
        color=["tab:blue" if name.startswith("pipeline_") else "tab:gray" for name in ordered],
    )
    top.axvline(report["stages"]["step"]["median"], color="black", linestyle="--", label="what the network takes")
    top.set_xscale("log")
    top.set_title("input pipelines alone (blue: this project's)")
    top.legend(loc="lower center", bbox_to_anchor=(0.5, -0.42))
    for axis, (name, rows) in zip(axes[1:, 0], tables.items(), strict=True):
        for stage in STAGES:
            points = [
                (_short(row["setting"], name).replace(", ", "\n"), row[stage]["median"]) for row in rows if stage in row
            ]
            if points:
                axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=stage.replace("_", " "))
        axis.set_yscale("log")
        axis.set_title(name.replace("_", "-"))
        axis.legend()
    for axis in axes[:, 0]:
        axis.grid(alpha=0.3)
    axes[0, 0].set_xlabel("images/s", loc="right")
    for axis in axes[1:, 0]:
        axis.set_ylabel("images/s")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format=path.suffix.removeprefix(".") or "png")
    write_atomic(path, content.getvalue())
