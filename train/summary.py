"""The end of a run: what it reached, what the time went into, how much memory it took."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from train.loop import Run
from train.progress import duration


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory in GiB: of this process on the host, and of torch's allocator on the GPU."""
    peak = {}
    try:
        import resource

        scale = 1 if sys.platform == "darwin" else 1024
        peak["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30
    except ImportError:  # Windows
        pass
    if device.type == "cuda":
        peak["device_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return peak


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
    extra = [(k, last[f"{k}_accuracy"]) for k in ("test_tta", "ema_test", "ema_test_tta") if f"{k}_accuracy" in last]
    if extra:
        names = {"test_tta": "flip TTA", "ema_test": "EMA", "ema_test_tta": "EMA and flip TTA"}
        lines.insert(2, "also, at the end  " + ", ".join(f"{names[k]} {accuracy:.2f}%" for k, accuracy in extra))
        summary |= {f"last_{k}_accuracy": accuracy for k, accuracy in extra}
    if path is not None:
        lines.append(f"run folder     {path}")
        if not trainer.config.run.analyse:
            lines.append(f"next           python -m analysis {path}")
    return summary, lines
