"""With train.compile=auto on a CPU: decides whether to compile, from the time that it takes and saves. The first process decides
for all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from train.config import to_dict
from train.machine.weighing import (
    CompileHistory,
    Weighed,
    compiled_from_cache,
    graphs_compiled,
    weigh_by_arithmetic,
    weigh_seen,
)
from train.step.trainer import Trainer

GAIN_PAIRS = 3  # pairs of an eager and a compiled step that measure the gain
STEPS_PER_PAIR = 50  # a pair is measured only for so many steps that are left: it takes a few percent of their time


class Choice:
    """The choice on a CPU. All processes call `weigh` together; `learn` adds what was measured to the history for later runs."""

    def __init__(self, trainer: Trainer, mode: str) -> None:
        self.trainer, self.mode = trainer, mode
        self.deterministic = trainer.config.train.deterministic
        self._steps_left: int | None = None  # where the clock was asked
        self._history = CompileHistory()
        self._compiled_before = graphs_compiled()  # by earlier trainings of this process

    def weigh(self, steps_left: int | None, began: Mapping[str, Any] | None = None) -> Weighed:
        """Whether to compile for this number of steps; None means enough steps for compiling to pay. `began` is what the
        checkpoint of a resumed run says about the machine: a run that began on a CPU goes on as it began, compiled or not,
        so that it computes the same bits."""
        trainer, group = self.trainer, self.trainer.group
        if began is not None and began.get("device") == "cpu" and began.get("compile") in ("off", self.mode):
            return Weighed(began["compile"] == self.mode, "as the run began")
        if steps_left is None:
            return Weighed(True, "for as many steps as it takes")
        if self.deterministic:
            height, width = trainer.dataset.height, trainer.dataset.width
            flops = 6.0 * trainer.net.multiply_adds(height, width) * trainer.local_batch
            # the first one's processor decides: the others may lie on machines of another kind
            return group.from_first(lambda: weigh_by_arithmetic(flops, steps_left))
        with group.together():
            seconds = trainer.step_seconds()
        self._steps_left = steps_left
        graph = self._graph()
        return group.from_first(
            lambda: weigh_seen(seconds, steps_left, self._history.compile_seconds(graph), self._history.gain(graph))
        )

    def learn(self, compile_seconds: float) -> Weighed | None:
        """After compiling: measure the gain, and add it and the time taken to the history. The answer says whether to keep the
        compiled steps, which may have turned out slower; it is None where the gain was not measured."""
        if self._steps_left is None:
            return None
        group, pairs = self.trainer.group, min(GAIN_PAIRS, self._steps_left // STEPS_PER_PAIR)
        gain = None
        if pairs:
            with group.together():
                gain = self.trainer.compiled_gain(pairs)
            gain = group.gather(gain)[0]
        if group.first:
            warm = compiled_from_cache(self._compiled_before)
            self._history.add(self._graph(), compile_seconds, warm=warm, gain=gain)
        if gain is None:
            return None
        return Weighed(gain >= 1, f"tried: a compiled step has {gain:.2f} times the speed of an eager one")

    def _graph(self) -> str:
        """A digest of everything that changes what is compiled, or how fast it is."""
        trainer, config = self.trainer, to_dict(self.trainer.config)
        train = ("batch_size", "eval_batch_size", "ema_decay", "sync_bn")
        facts = {
            "net": config["net"],
            "augment": config["augment"] if trainer.backend.name == "torch" else None,
            "label_smoothing": config["optim"]["label_smoothing"],
            "train": [config["train"][key] for key in train],
            "images": [trainer.dataset.height, trainer.dataset.width, trainer.dataset.num_classes],
            "precision": trainer.runtime.precision,
            "channels_last": trainer.runtime.channels_last,
            "processes": trainer.group.world_size,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
