"""The end of a run: what it reached, what the time went into, how much memory it took."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.machine.environment import peak_memory
from train.screen.progress import duration

if TYPE_CHECKING:
    from train.loop import Run


def summary_lines(run: Run, path: Path | None) -> tuple[dict[str, Any], list[str]]:
    """The end of a run, as summary.json and as lines for a person."""
    trainer, position, times = run.trainer, run.position, run.times
    last = position.metrics[-1]
    images = sum(round(m["seconds"] * m["images_per_second"]) for m in position.metrics)
    seconds = sum(m["seconds"] for m in position.metrics)
    summary: dict[str, Any] = {
        "epochs": position.epoch,
        "best_accuracy": position.best_accuracy,
        "best_epoch": position.best_epoch,
        "last_accuracy": last["test_accuracy"],
        "lr_max": run.schedule.lr_max,
        "lr_min": run.schedule.lr_min,
        "seconds": vars(times).copy(),
        "images_per_second": images / seconds,
        "peak_memory": peak_memory(trainer.runtime.device),
    }
    parts = {"set-up": times.set_up, "compile": times.compile, "LR search": times.lr_search}
    parts |= {"training": times.training, "evaluation": times.evaluation, "saving": times.saving}
    memory = ", ".join(f"{gib:.2f} GiB {name.removesuffix('_gib')}" for name, gib in summary["peak_memory"].items())
    lines = [
        "",
        f"best accuracy  {position.best_accuracy:.2f}% (epoch {position.best_epoch}), last {last['test_accuracy']:.2f}%",
        f"time           {duration(sum(parts.values()))}: "
        + ", ".join(f"{name} {duration(spent)}" for name, spent in parts.items()),
        f"throughput     {summary['images_per_second']:,.0f} images/s in training",
        f"peak memory    {memory}",
    ]
    extra = [(measure, last[f"{measure.key}_accuracy"]) for measure in trainer.measures[1:]]
    if extra:
        lines.insert(2, "also, at the end  " + ", ".join(f"{m.kind} {accuracy:.2f}%" for m, accuracy in extra))
        summary |= {f"last_{measure.key}_accuracy": accuracy for measure, accuracy in extra}
    if path is not None:
        lines.append(f"run folder     {path}")
        if not run.config.run.analyse:
            lines.append(f"next           python -m analysis {path}")
    return summary, lines
