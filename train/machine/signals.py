"""Signals that ask a run to end: before the training it ends at once, during it after the current step and a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REPEAT_SECONDS = 3.0


class Interrupted(BaseException):
    """A signal ended the run. `code` is the process's exit code; `saved` says whether there is a checkpoint to continue from.

    Like KeyboardInterrupt it is not an Exception, so that an `except Exception` around an attempt does not swallow it.
    """

    def __init__(self, number: int, saved: bool) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number
        self.saved = saved


class SignalWatch:
    """SIGINT, SIGTERM, SIGHUP and SIGUSR1 raise Interrupted at once; inside `deferring` the first one is only kept in `received`.

    A second signal has its default action and ends the process at once. That damages nothing: a checkpoint that is being
    written is a temporary file until it is complete. With `repeats` one request may arrive twice (torchrun passes on the
    Ctrl-C that the terminal has sent to all its processes already), so what arrives within REPEAT_SECONDS is not counted as
    a second signal. With `owns_process` false, for a process that does other things too, a second signal raises
    KeyboardInterrupt instead.
    """

    def __init__(self, repeats: bool = False, announce: bool = True, owns_process: bool = True) -> None:
        self.received: int | None = None
        self._repeats, self._announce, self._owns_process = repeats, announce, owns_process
        self._deferring = False
        self._since = 0.0
        self._watched: list[int] = []

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None:
            again = now - self._since >= REPEAT_SECONDS
            if not self._owns_process and (again or not self._repeats):
                raise KeyboardInterrupt(f"{signal.Signals(number).name}, the second: ended at once")
            if again:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.received, self._since = number, now
        if self._owns_process and not self._repeats:
            for watched in self._watched:
                signal.signal(watched, signal.SIG_DFL)
        if not self._deferring:
            raise Interrupted(number, saved=False)
        if self._announce:
            # print() is not safe here: the signal may have interrupted another print()
            text = (
                f"\n{signal.Signals(number).name}: ending after this step, with a checkpoint; once more ends at once\n"
            )
            with contextlib.suppress(OSError):
                os.write(2, text.encode())

    @contextmanager
    def watching(self) -> Iterator[SignalWatch]:
        """Handles the signals inside the block. Does nothing outside the main thread, as Python allows handlers only there."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        self._watched = _watched()
        before = {number: signal.signal(number, self._note) for number in self._watched}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Inside the block the first signal only sets `received`, which the training loop reads. If nobody acted on it by the
        end of the block, Interrupted is raised there."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.received is not None:
            raise Interrupted(self.received, saved=True)


def _end(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number, saved=False)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Inside the block SIGTERM, SIGHUP and SIGUSR1 raise Interrupted, as SIGINT raises KeyboardInterrupt: for the time before and
    after a training, when they would end the process without a word. Does nothing outside the main thread."""
    watched = [n for n in _watched() if signal.getsignal(n) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        watched = []
    for number in watched:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in watched:
            signal.signal(number, signal.SIG_DFL)


def _watched() -> list[int]:
    watched: list[int] = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        watched.append(signal.SIGHUP)
    # schedulers announce their time limit by it; a program around the training may have another use for it
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) in (signal.SIG_DFL, _end):
        watched.append(signal.SIGUSR1)
    # a handler that was not set from Python, as where Python is embedded, could not be given back
    return [number for number in watched if signal.getsignal(number) is not None]
