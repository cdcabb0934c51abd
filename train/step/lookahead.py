"""Lookahead (arXiv:1907.08610): slow weights that go a part of the way the others went, every few steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Lookahead:
    """Every `every` steps the slow weights go `part` of the way to the parameters, and the parameters are set to them."""

    def __init__(self, parameters: Sequence[Tensor], every: int, part: float) -> None:
        self.parameters, self.every, self.part = list(parameters), every, part
        self.start_over()

    def start_over(self) -> None:
        """Begin at the parameters as they are now."""
        self.steps = 0
        self.slow = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """To be called after each step of the optimizers."""
        self.steps += 1
        if self.steps % self.every == 0:
            torch._foreach_lerp_(self.slow, self.parameters, self.part)
            torch._foreach_copy_(self.parameters, self.slow)

    def state_dict(self) -> dict[str, Any]:
        """The slow weights, in the order of the parameters, and the number of steps so far."""
        return {"steps": self.steps, "slow": self.slow}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.steps = state["steps"]
        for slow, saved in zip(self.slow, state["slow"], strict=True):
            slow.copy_(saved)
