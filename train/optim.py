"""SGD's parameter groups and the OneCycle schedule as a function of the step, with no state to save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def param_groups(net: nn.Module, weight_decay: float, norm_bias_weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: kernels and matrices with `weight_decay`; batch-norm parameters and biases with their own."""
    kernels = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    return [
        {"params": kernels, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": norm_bias_weight_decay},
    ]


def make_optimizer(
    net: nn.Module,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    norm_bias_weight_decay: float,
    device: torch.device,
) -> torch.optim.SGD:
    """SGD over the two groups; one fused kernel on CUDA. The rate is set each step by the schedule."""
    groups = param_groups(net, weight_decay, norm_bias_weight_decay)
    optimizer = torch.optim.SGD(
        groups, lr=0.0, momentum=momentum, nesterov=nesterov, fused=device.type == "cuda" or None
    )
    start_momentum(optimizer)
    return optimizer


def start_momentum(optimizer: torch.optim.SGD) -> None:
    """Forget the past: momentum of zero, which gives the same first step as none.

    Not none, because the fused kernel then allocates it without writing it in a step whose gradients overflow in fp16,
    and reads it in the next one.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        if group["momentum"] > 0:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


@dataclass(frozen=True)
class OneCycle:
    """Learning rate of a step: linear from lr_min up to lr_max at `peak_step`, linear down to lr_min at the last step.

    arXiv:1708.07120, without the annihilation phase: the last rate is lr_min, not a fraction of it. Equals torch's
    OneCycleLR(anneal_strategy="linear", div_factor=lr_max/lr_min, final_div_factor=1) with the same peak.
    """

    lr_max: float
    lr_min: float
    peak_step: float
    total_steps: int

    def __call__(self, step: int) -> float:
        """The rate of step 0 .. total_steps - 1; ValueError beyond."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} of a schedule of {self.total_steps} steps")
        last = self.total_steps - 1
        peak = min(self.peak_step, last)
        if step <= peak:
            done = step / peak if peak > 0 else 1.0
        else:
            done = (last - step) / (last - peak)
        return self.lr_min + (self.lr_max - self.lr_min) * done


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
