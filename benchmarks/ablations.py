"""One thing varied at a time, against the recipe; and the picture of it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Rate, Stage, interleave
from benchmarks.stages import Pipeline, Training
from dali_pipeline import dali_graph
from dali_pipeline.datasets import Dataset
from dali_pipeline.loader import choose_backend
from train.config import Config
from train.runtime import find_compiler, prepare

BATCH_SIZES = (128, 256, 512, 1024, 2048, 4096)
PIPELINES = (1, 2, 3, 4)
PREFETCH_DEPTHS = (1, 2, 3, 4, 8)
STAGES = ("pipeline", "step", "end_to_end")

Rows = list[dict[str, Any]]


def run_ablations(
    names: Sequence[str],
    config: Config,
    dataset: Dataset,
    repeats: int,
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, Rows]:
    """Tables by name: rows of the setting, and of the stages' rates or the reason why there are none."""
    train = config.train
    device = prepare(device=train.device, compile="off").device
    takes_dali = choose_backend(config.data.backend, device).name == "dali"
    tables: dict[str, Rows] = {}
    for name in names:
        say(f"\n{name:<28}" + "".join(f"{stage.replace('_', ' '):>14}" for stage in STAGES) + "  images/s")
        rows: Rows = []
        if name in ("pipelines", "prefetch", "graph") and not takes_dali:
            say("left out: the pipeline is torch's")
            continue
        variants: Iterator[tuple[str, Callable[[], dict[str, Rate]]]]
        if name == "pipelines":
            variants = _pipelines(config, dataset, device, repeats, seconds)
        elif name == "prefetch":
            variants = _prefetch(config, dataset, device, repeats, seconds)
        elif name == "graph":
            variants = _graphs(config, dataset, device, repeats, seconds)
        else:
            variants = _trainings(name, config, dataset, device, repeats, seconds)
        for setting, run in variants:
            row: dict[str, Any] = {"setting": setting}
            begun = time.perf_counter()
            try:
                rates = run()
            except Exception as error:  # a setting that this machine cannot run is a row of the table
                row["left_out"] = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
                say(f"{setting:<28}{row['left_out']}")
            else:
                row |= {stage: rate.record() for stage, rate in rates.items()}
                cells = (f"{rates[stage].median:,.0f}" if stage in rates else "" for stage in STAGES)
                say(f"{setting:<28}" + "".join(f"{cell:>14}" for cell in cells))
            row["seconds"] = time.perf_counter() - begun
            rows.append(row)
        tables[name] = rows
    return tables


def _trainings(
    name: str, config: Config, dataset: Dataset, device: torch.device, repeats: int, seconds: float
) -> Iterator[tuple[str, Callable[[], dict[str, Rate]]]]:
    on_gpu = device.type == "cuda"
    able, _ = find_compiler(device)
    values: dict[str, Sequence[Any]] = {
        "channels_last": ("on", "off"),
        "compile": ("off", *(("default",) if able else ()), *(("reduce-overhead", "max-autotune") if on_gpu else ())),
        "precision": ("fp32", "bf16", *(("fp16",) if on_gpu else ())),
        "batch": [size for size in BATCH_SIZES if size <= len(dataset.train)],
    }
    key = {"batch": "batch_size"}.get(name, name)
    for value in values[name]:
        varied = copy.deepcopy(config)
        setattr(varied.train, key, value)

        def run(varied: Config = varied) -> dict[str, Rate]:
            training = Training(varied, dataset)
            try:
                return interleave([training.stage(stage, seconds) for stage in STAGES], repeats)
            finally:
                training.close()
                torch._dynamo.reset()  # else settings share the limit on recompilations

        yield f"{key} {value}", run


def _pipelines(
    config: Config, dataset: Dataset, device: torch.device, repeats: int, seconds: float
) -> Iterator[tuple[str, Callable[[], dict[str, Rate]]]]:
    """Several pipelines served in turn: while one is waited for, the others prefetch."""
    for number in PIPELINES:

        def run(number: int = number) -> dict[str, Rate]:
            with ExitStack() as stack:
                several = [_dali(config, dataset, device) for _ in range(number)]
                for pipeline in several:
                    stack.callback(pipeline.close)

                def turns(steps: int) -> float:
                    return sum(several[step % number].run(1) for step in range(steps))

                return interleave([Stage("pipeline", turns, device, seconds, len(dataset.train) // 512)], repeats)

        yield f"{number} pipelines", run


def _prefetch(
    config: Config, dataset: Dataset, device: torch.device, repeats: int, seconds: float
) -> Iterator[tuple[str, Callable[[], dict[str, Rate]]]]:
    for depth in PREFETCH_DEPTHS:

        def run(depth: int = depth) -> dict[str, Rate]:
            with _replaced(dali_graph, "PREFETCH_DEPTH", depth):
                pipeline = _dali(config, dataset, device)
            try:
                return interleave([pipeline.stage("pipeline", seconds)], repeats)
            finally:
                pipeline.close()

        yield f"prefetch depth {depth}", run


def _graphs(
    config: Config, dataset: Dataset, device: torch.device, repeats: int, seconds: float
) -> Iterator[tuple[str, Callable[[], dict[str, Rate]]]]:
    """The choices that the DALI graph leaves: what paints the cutout, and whether borders lie on the device."""
    graph = dali_graph.DaliGraph
    for cutout_by in ("paste", "erase"):
        for padded in (False, True):

            def run(cutout_by: str = cutout_by, padded: bool = padded) -> dict[str, Rate]:
                with _replaced(dali_graph, "DaliGraph", partial(graph, cutout_by=cutout_by, padded=padded)):
                    pipeline = _dali(config, dataset, device)
                try:
                    return interleave([pipeline.stage("pipeline", seconds)], repeats)
                finally:
                    pipeline.close()

            yield f"cutout by {cutout_by}, {'resident' if padded else 'no'} border", run


def _dali(config: Config, dataset: Dataset, device: torch.device) -> Pipeline:
    return Pipeline(dataset, batch_size=config.train.batch_size, device=device, backend="dali")


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of every pipeline and peer, and a panel for each ablation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tables = {name: [row for row in rows if "left_out" not in row] for name, rows in report["ablations"].items()}
    tables = {name: rows for name, rows in tables.items() if rows}
    figure, axes = plt.subplots(1 + len(tables), 1, figsize=(8, 3.5 + 2.4 * len(tables)), squeeze=False)
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
    top.legend(loc="lower right")
    for axis, (name, rows) in zip(axes[1:, 0], tables.items(), strict=True):
        for stage in STAGES:
            points = [(row["setting"], row[stage]["median"]) for row in rows if stage in row]
            if points:
                axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=stage.replace("_", " "))
        axis.set_yscale("log")
        axis.set_title(name.replace("_", "-"))
        axis.legend()
    for axis in axes[:, 0]:
        axis.grid(alpha=0.3)
    axes[0, 0].set_xlabel("images/s")
    for axis in axes[1:, 0]:
        axis.set_ylabel("images/s")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
