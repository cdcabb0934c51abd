"""SGD whose weight decay is apart from its momentum (arXiv:1711.05101)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class DecoupledSGD(torch.optim.SGD):
    """Each step first scales the weights of a group by 1 - lr * weight_decay, and then steps along the momentum of the gradients
    alone. A step whose gradients have overflowed in fp16 changes nothing."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        apart = [{**group, "weight_decay": 0.0, "decoupled_weight_decay": group["weight_decay"]} for group in groups]
        super().__init__(apart, **options)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        # set by GradScaler for a fused kernel, which then changes nothing
        overflowed = getattr(self, "found_inf", None)
        for group in self.param_groups:
            decay = group["lr"] * group["decoupled_weight_decay"]
            weights = [p.detach() for p in group["params"] if p.grad is not None]
            if group["decoupled_weight_decay"] and weights:
                torch._foreach_mul_(weights, 1 - decay if overflowed is None else 1 - decay * (1 - overflowed))
        loss: float | None = super().step(closure)
        return loss
