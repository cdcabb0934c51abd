"""Notices a process of the group that is gone although nothing says so: killed, hung, or behind a link that was cut.

Every process writes a count into the group's store once a second, and reads those of the others. A collective operation cannot
tell a peer that is late from one that is gone, and waits for either until its time limit; the counts can.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

BEAT_SECONDS = 1.0
# after this many beats that did not come, a peer is suspected where something has failed already
MISSED_BEATS = 4
# The least limit of silence: a count stands still for up to a beat until its process writes it, and for another one until it is
# read. Within less, a healthy process, or the store, would be called lost.
LEAST_LIMIT = 2 * BEAT_SECONDS
# for the main thread to end by itself, with its own words, once a peer is lost
GRACE_SECONDS = 5.0
_LEFT = "left"


class Heartbeat:
    """Beats from `start` to `stop`, in two threads: the store may never answer again, so one talks to it and the other watches
    the clock. `store` is torch's. `names` are the processes' names by rank, `store_name` is what the store's place is called in
    a message. Where a peer, or the store, has been silent for `limit` seconds, `lost` is called with a line that names it,
    unless within GRACE_SECONDS it is heard again, or the process has ended or stopped the beats.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        names: Sequence[str],
        store_name: str,
        *,
        limit: float,
        lost: Callable[[str], object],
    ) -> None:
        self.names, self._store, self._rank, self._store_name = names, store, rank, store_name
        self._limit, self._lost = limit, lost
        self._keys = [f"beat/{number}" for number in range(len(names))]
        self._stopped = threading.Event()
        self._ending = False
        self.doing_now = "starting"
        now = time.monotonic()
        self._answered = now  # when the store last answered
        self._store_gone = False
        self._beats: list[tuple[str, str, float]] = [
            ("", "", now) for _ in names
        ]  # count, doing, when they last changed
        self._beat(0)

    def start(self) -> None:
        """To be called once all processes have made their Heartbeat."""
        for work in (self._talk, self._watch):
            threading.Thread(target=work, name="heartbeat", daemon=True).start()

    def doing(self, what: str) -> None:
        """What this process does from now on, for the others' messages."""
        self.doing_now = what

    def ending(self) -> None:
        """From now on nobody is called lost: the processes end one after the other."""
        self._ending = True

    def stop(self) -> None:
        """End the beats, and tell the others that this is no loss."""
        if not self._stopped.is_set():
            self._stopped.set()
            # in a thread of its own: the store may never answer
            farewell = threading.Thread(target=self._say_left, daemon=True)
            farewell.start()
            farewell.join(BEAT_SECONDS)

    def who(self, wait: float = 0.0) -> str | None:
        """Which peers have missed beats, in words; None where none has. Something has failed already, so it is looked for up to
        `wait` seconds."""
        end = time.monotonic() + wait
        while True:
            found = self._store_name if self._store_gone else self._silent(MISSED_BEATS * BEAT_SECONDS)
            if found is not None or time.monotonic() >= end:
                return found
            time.sleep(0.1)

    def others(self) -> str:
        """What the peers that are there are doing."""
        seen = [
            f"{name} {doing or 'starting'}"
            for number, (name, (count, doing, _)) in enumerate(zip(self.names, self._beats, strict=True))
            if number != self._rank and count != _LEFT
        ]
        return "; ".join(seen)

    def _silent(self, seconds: float) -> str | None:
        now = time.monotonic()
        if now - self._answered >= seconds:
            return self._store_name
        silent = [
            f"{name} (silent for {now - since:.0f} s, last {doing or 'starting'})"
            for number, (name, (count, doing, since)) in enumerate(zip(self.names, self._beats, strict=True))
            if number != self._rank and count != _LEFT and now - since >= seconds
        ]
        return ", ".join(silent) or None

    def _beat(self, count: int) -> None:
        self._store.set(self._keys[self._rank], f"{count}|{self.doing_now}")

    def _say_left(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(self._keys[self._rank], f"{_LEFT}|")

    def _talk(self) -> None:
        count = 0
        while not self._stopped.wait(BEAT_SECONDS):
            count += 1
            try:
                self._beat(count)
                found = self._store.multi_get(self._keys)
            except (
                RuntimeError
            ):  # the store's process is gone, torchrun or the first one; what is under way may still be saved
                self._store_gone = True
                return
            now = self._answered = time.monotonic()
            for number, raw in enumerate(found):
                beat, _, doing = raw.decode().partition("|")
                if beat != self._beats[number][0]:
                    self._beats[number] = beat, doing, now

    def _watch(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS / 2):
            if self._silent(self._limit) is None or self._ending:
                continue
            if self._stopped.wait(GRACE_SECONDS):
                return
            # who was only stopped (Ctrl-Z, a machine asleep) and goes on has beaten again meanwhile
            if (found := self._silent(self._limit)) is not None and not self._ending:
                self._lost(found)
                return


def end_process(line: str) -> None:
    """Print the line as an error and end this process at once, from any thread: the main one may wait for a peer that is gone,
    in a call that nothing interrupts. What is being written has another name until it is whole."""
    with contextlib.suppress(OSError):
        os.write(2, f"error: {line}\n".encode(errors="backslashreplace"))
    os._exit(1)
