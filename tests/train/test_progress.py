"""How far an evaluation has come: the lines of a log file and the bar of a terminal."""

from __future__ import annotations

import io
import sys

import pytest
from training import Lines

from train.config import Config, changed
from train.run import fit
from train.screen.log import Log
from train.screen.progress import EvaluationDisplay


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_a_line_now_and_then_and_none_at_the_end() -> None:
    log = Lines()
    often = EvaluationDisplay(log, "epoch 2/3, test", 4, line_seconds=0.0)
    seldom = EvaluationDisplay(log, "never", 4, line_seconds=60.0)
    for _ in range(4):
        often.advance()
        seldom.advance()
    assert [line.partition(",")[0] for line in log.lines] == ["epoch 2/3"] * 3
    assert [line.split("batch ")[1].partition(",")[0] for line in log.lines] == ["1/4", "2/4", "3/4"]
    assert all(line.endswith(" s to go") for line in log.lines)


def test_a_terminal_gets_a_bar_that_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", shown)
    display = EvaluationDisplay(Log(), "epoch 1/3, test", 2)
    assert display.bar is not None
    display.bar.delay = display.bar.mininterval = 0
    display.advance()
    assert "epoch 1/3, test:  50%" in shown.getvalue() and "1/2" in shown.getvalue()
    display.close()
    *_, last, end = shown.getvalue().split("\r")
    assert last.strip() == end == ""  # the line is empty again, and the next one begins at its start


def test_all_passes_of_an_evaluation_are_counted(quick_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the weights and by their average, on the validation split after each epoch and on the test set at the end."""
    displays: list[EvaluationDisplay] = []

    class Noted(EvaluationDisplay):
        def __init__(self, log: Log, title: str, batches: int) -> None:
            super().__init__(log, title, batches)
            displays.append(self)

    monkeypatch.setattr("train.loop.EvaluationDisplay", Noted)
    asked = {"train.ema_decay": 0.9, "train.tta": True, "data.validation": 200, "train.eval_batch_size": 100}
    fit(changed(quick_config, asked), None, log=Lines())
    titles = ["epoch 1/2, validation", "epoch 2/2, validation", "test set, last.pt"]
    assert [display.title for display in displays] == titles
    assert [display.batches for display in displays] == [2 * 2, 2 * 2, 2 * 4]
    assert all(display.done == display.batches for display in displays)
