"""The counts by which processes notice that one of them is gone: who goes on in time is not lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from train.machine import heartbeat
from train.machine.heartbeat import Heartbeat

ENOUGH = 20.0  # seconds, for what takes hundredths of one


class Store:
    """The part of torch's store that is used, in this process. While `stopped`, it answers nobody."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._goes_on, self._asked = threading.Event(), threading.Event()
        self._goes_on.set()

    def set(self, key: str, value: str) -> None:
        self._asked.set()
        self._goes_on.wait()
        self._values[key] = value.encode()

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self._values[key] for key in keys]

    def stop(self) -> None:
        """Returns once somebody waits for an answer."""
        self._goes_on.clear()
        self._asked.clear()
        assert self._asked.wait(ENOUGH)

    def go_on(self) -> None:
        self._goes_on.set()


def test_a_process_that_was_stopped_and_goes_on_is_not_lost_and_one_that_does_not_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To a process that was stopped and is continued the clock has leapt: everybody else seems to have been silent."""
    now = 1000.0
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 1.0)
    store, lost, told = Store(), [], threading.Event()

    def tell(line: str) -> None:
        lost.append(line)
        told.set()

    hearts = [Heartbeat(store, rank, ["one", "other"], "the store", limit=30.0, lost=tell) for rank in (0, 1)]
    try:
        for heart in hearts:
            heart.start()
        store.stop()
        now += 100.0
        time.sleep(0.2)  # the leap is noticed
        store.go_on()
        time.sleep(1.2)  # the time of grace is over
        assert lost == []
        store.stop()
        now += 100.0
        assert told.wait(ENOUGH)
        assert set(lost) == {"the store"}
    finally:
        store.go_on()
        for heart in hearts:
            heart.stop()
