"""The summary of a run: the accuracies it reached, what its time went into, how much memory it took."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.machine.environment import peak_memory
from train.screen.progress import duration
from train.step.evaluation import Score
from train.step.measures import Measure

if TYPE_CHECKING:
    from train.loop import Run


Final = dict[str, dict[Measure, Score]]  # scores on the test set, by the name of the checkpoint


def summary_lines(run: Run, path: Path | None, final: Final | None = None) -> tuple[dict[str, Any], list[str]]:
    """The summary as the content of summary.json and as lines for a person. Where a validation split chose best.pt, `final` holds
    the scores on the test set, measured at the end.

    best_accuracy and last_accuracy are accuracies on the test set, of best.pt and of the last epoch. Without a validation split
    best.pt is the epoch with the highest test accuracy.
    """
    trainer, position, times = run.trainer, run.position, run.times
    last = position.metrics[-1]
    images = sum(round(m["seconds"] * m["images_per_second"]) for m in position.metrics)
    seconds = sum(m["seconds"] for m in position.metrics)
    leading = trainer.measures[0]
    chosen_on_test = leading.split == "test"
    # None where best.pt was lost, and no epoch came after that
    best = position.best_accuracy if position.best_epoch else None
    if final is None:
        measured = {measure: last[f"{measure.key}_accuracy"] for measure in trainer.measures}
        reached = {"best.pt": best, "last.pt": last[f"{leading.key}_accuracy"]}
    else:
        measured = {measure: score.accuracy for measure, score in final["last.pt"].items()}
        reached = {name: next(iter(scores.values())).accuracy for name, scores in final.items()}
    summary: dict[str, Any] = {
        "epochs": position.epoch,
        "best_accuracy": reached.get("best.pt"),
        "best_epoch": position.best_epoch or None,
        "last_accuracy": reached["last.pt"],
        "chosen_on": leading.split,
        "lr_max": run.schedule.lr_max,
        "lr_min": run.schedule.lr_min,
        "seconds": times.seconds(),
        "images_per_second": images / seconds,
        "peak_memory": peak_memory(trainer.runtime.device),
    }
    if final is not None:
        summary["best_validation_accuracy"] = best
        summary["last_validation_accuracy"] = last[f"{leading.key}_accuracy"]
        epochs = {"best.pt": position.best_epoch, "last.pt": position.epoch}
        summary["test"] = {name: {"epoch": epochs[name], "accuracy": value} for name, value in reached.items()}
    parts = {"set-up": times.set_up, "compile": times.compile, "LR search": times.lr_search}
    parts |= {"training": times.training, "evaluation": times.evaluation, "saving": times.saving}
    memory = ", ".join(f"{gib:.2f} GiB {name.removesuffix('_gib')}" for name, gib in summary["peak_memory"].items())
    lines = [
        "",
        f"test accuracy  {reached['last.pt']:.2f}% after the last epoch ({position.epoch})",
        f"best.pt        {_best(best, position.best_epoch, chosen_on_test, reached.get('best.pt'))}",
        f"time           {duration(sum(parts.values()))}: "
        + ", ".join(f"{name} {duration(spent)}" for name, spent in parts.items()),
        f"throughput     {summary['images_per_second']:,.0f} images/s in training",
        f"peak memory    {memory}",
    ]
    extra = list(measured.items())[1:]
    if extra:
        lines.insert(2, "also, at the end  " + ", ".join(f"{m.kind} {accuracy:.2f}%" for m, accuracy in extra))
        summary |= {f"last_{measure.key}_accuracy": accuracy for measure, accuracy in extra}
    if path is not None:
        lines.append(f"run folder     {path}")
        if not run.config.run.analyse:
            lines.append(f"next           python -m analysis {path}")
    return summary, lines


def _best(best: float | None, epoch: int, chosen_on_test: bool, on_test: float | None) -> str:
    """What there is to say of best.pt."""
    if best is None:
        return "lost, and no epoch came after that"
    if chosen_on_test:
        return f"epoch {epoch}, chosen on the test set itself: {best:.2f}%, which flatters"
    reached = "" if on_test is None else f": test accuracy {on_test:.2f}%"
    return f"epoch {epoch}, chosen on the validation split ({best:.2f}%){reached}"
