"""Evaluates a split, each image once: loss and accuracy, and on request the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from train.failpoints import failpoint
from train.step.views import VIEWS, Views, answers_to


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy and correct predictions over `count` images."""

    loss: float
    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.correct / self.count

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, accuracy {self.correct}/{self.count} ({self.accuracy:.2f}%)"


@dataclass(frozen=True)
class Evaluation:
    """A score for each set of views, in their order; and the logits of the first set, if they were kept."""

    scores: tuple[Score, ...]
    logits: Tensor | None = None  # (N, C) float32 on the CPU, in the order of the loader
    labels: Tensor | None = None  # (N,) int64 on the CPU


def evaluate(
    step: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    views: Sequence[Views] = (VIEWS["plain"],),
    keep_logits: bool = False,
    after_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run `step` (EvalStep) over batches (images, labels, valid), once for each view that any of the sets `views` has. Rows that
    are not `valid` are padding and are not counted.

    Totals stay on the device until the end, and are summed over the processes where torch.distributed runs. The network is
    in eval mode meanwhile, and afterwards in the mode it had. `after_batch(done)` is called on the host after each batch,
    and may raise to end the evaluation.
    """
    modes = [(module, module.training) for module in step.modules()]
    step.eval()
    try:
        totals, kept = _totals(step, loader, views, keep_logits, after_batch)
    finally:
        for module, mode in modes:
            module.training = mode
    if totals is None:
        raise ValueError("nothing to evaluate: the loader gave no batch")
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals)
    return Evaluation(
        scores=tuple(Score(loss / count, round(correct), round(count)) for loss, correct, count in totals.t().tolist()),
        logits=torch.cat([logits for logits, _ in kept]) if kept else None,
        labels=torch.cat([labels for _, labels in kept]) if kept else None,
    )


def _totals(
    step: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor, Tensor]],
    views: Sequence[Views],
    keep_logits: bool,
    after_batch: Callable[[int], None] | None,
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
    """Sums of loss, correct predictions and images, with one column for each set of views; and (logits, labels) of every batch
    if they are kept."""
    totals: Tensor | None = None
    kept: list[tuple[Tensor, Tensor]] = []

    def ask(images: Tensor) -> Tensor:
        if step._compiled_call_impl is not None:  # the next line imports the compiler
            torch.compiler.cudagraph_mark_step_begin()
        logits: Tensor = step(images)
        return logits

    with torch.no_grad():
        for done, (images, labels, valid) in enumerate(loader, 1):
            failpoint("evaluate")
            answers = answers_to(views, images, ask)
            losses = torch.stack([F.cross_entropy(logits, labels, reduction="none") for logits in answers])
            hits = (answers.argmax(2) == labels) & valid
            # a padded row may hold NaN, so it is replaced and not multiplied by zero
            batch = torch.stack([torch.where(valid, losses, 0.0).sum(1), hits.sum(1)])
            count = valid.sum().expand(1, batch.shape[1])
            batch = torch.cat([batch, count]).to(torch.float32 if batch.device.type == "mps" else torch.float64)
            totals = batch if totals is None else totals + batch
            if keep_logits:
                kept.append((answers[0][valid].cpu(), labels[valid].cpu()))
            if after_batch is not None:
                after_batch(done)
    return totals, kept
