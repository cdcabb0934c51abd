"""Loss and correct predictions of every step, kept on the device and read without a wait."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from dali_pipeline.errors import UserError


class NonFiniteLoss(UserError):
    """The loss became NaN or infinite: `epoch` and `step` (from 0, within the epoch) say where."""

    exit_code = 3

    def __init__(self, epoch: int, step: int, loss: float) -> None:
        super().__init__(f"loss {loss} in epoch {epoch + 1}, step {step}")
        self.epoch, self.step, self.loss = epoch, step, loss


class StepMeter:
    """Loss and correct predictions of every step of an epoch, kept on the device.

    On the CPU the values are available at once. On a GPU `poll` copies them to the host asynchronously and reads the copy once
    it has arrived: no step waits for it, and a non-finite loss is noticed a fraction of a second later.
    """

    def __init__(self, epoch: int, steps: int, device: torch.device, poll_seconds: float = 0.25) -> None:
        self.epoch, self.device, self.poll_seconds = epoch, device, poll_seconds
        self.losses = torch.zeros(steps, device=device)
        self.correct = torch.zeros(steps, dtype=torch.int64, device=device)
        self._asynchronous = device.type == "cuda"
        if self._asynchronous:
            self._host_losses = torch.zeros(steps, pin_memory=True)
            self._host_correct = torch.zeros(steps, dtype=torch.int64, pin_memory=True)
            self._event = torch.cuda.Event()
        else:
            self._host_losses, self._host_correct = self.losses, self.correct
        self._pending: int | None = None  # steps covered by the copy under way
        self._last_poll = time.perf_counter()
        self.seen = 0  # steps whose values are on the host and finite

    def record(self, step: int, loss: Tensor, correct: Tensor) -> None:
        self.losses[step].copy_(loss.detach())
        self.correct[step].copy_(correct)

    def poll(self, done: int) -> bool:
        """Read those values of the first `done` steps that have arrived; True if there are new ones. Raises NonFiniteLoss."""
        if not self._asynchronous:
            return self._take(done)
        if self._pending is not None:
            if not self._event.query():
                return False
            arrived, self._pending = self._pending, None
            return self._take(arrived)
        if time.perf_counter() - self._last_poll >= self.poll_seconds:
            self._host_losses.copy_(self.losses, non_blocking=True)
            self._host_correct.copy_(self.correct, non_blocking=True)
            self._event.record()
            self._pending = done
            self._last_poll = time.perf_counter()
        return False

    def finish(self, done: int) -> None:
        """Wait for the values of the first `done` steps and read them. Raises NonFiniteLoss."""
        if self._asynchronous:
            self._host_losses.copy_(self.losses)
            self._host_correct.copy_(self.correct)
            self._pending = None
        self._take(done)

    def _take(self, done: int) -> bool:
        if done <= self.seen:
            return False
        new = self._host_losses[self.seen : done]
        if not bool(torch.isfinite(new).all()):
            step = self.seen + int((~torch.isfinite(new)).nonzero()[0, 0])
            raise NonFiniteLoss(self.epoch, step, float(self._host_losses[step]))
        self.seen = done
        return True

    def means(self, batch_size: int) -> tuple[float, float]:
        """Mean loss and accuracy in percent over the steps seen so far."""
        if self.seen == 0:
            return math.nan, math.nan
        loss = float(self._host_losses[: self.seen].double().mean())
        return loss, 100 * int(self._host_correct[: self.seen].sum()) / (self.seen * batch_size)
