"""The optimizers of a training as one container of parameter groups, each group with its own rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from net.interface import Network
from train.options import OptimOptions


@dataclass(frozen=True, eq=False)
class ParameterGroup:
    """Parameters that are trained alike: by the optimizer `kind` (a name of KINDS), at `rate_factor` times the schedule's
    learning rate."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    weight_decay: float
    kind: str = "sgd"
    rate_factor: float = 1.0


def parameter_groups(net: Network, options: OptimOptions) -> list[ParameterGroup]:
    """Filters and matrices with weight decay; norms and biases with their own."""
    kernels: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in net.named_parameters():
        (kernels if net.role(name) in ("filter", "matrix") else vectors).append(parameter)
    return [
        ParameterGroup("kernels", tuple(kernels), options.weight_decay),
        ParameterGroup("norms and biases", tuple(vectors), options.norm_bias_weight_decay),
    ]


def _sgd(groups: list[dict[str, Any]], options: OptimOptions, device: torch.device) -> torch.optim.Optimizer:
    """One fused kernel on CUDA."""
    return torch.optim.SGD(
        groups, lr=0.0, momentum=options.momentum, nesterov=options.nesterov, fused=device.type == "cuda" or None
    )


KINDS: dict[str, Callable[[list[dict[str, Any]], OptimOptions, torch.device], torch.optim.Optimizer]] = {
    "sgd": _sgd,
}


class Optimizers:
    """The optimizers that the groups ask for, driven as one. The rate is set each step by the schedule."""

    def __init__(self, groups: Sequence[ParameterGroup], options: OptimOptions, device: torch.device) -> None:
        self._groups: dict[str, list[ParameterGroup]] = {}
        for group in groups:
            self._groups.setdefault(group.kind, []).append(group)
        self.by_kind = {
            kind: KINDS[kind](
                [{"params": list(group.parameters), "weight_decay": group.weight_decay} for group in of_kind],
                options,
                device,
            )
            for kind, of_kind in self._groups.items()
        }
        self.start_over()

    def start_over(self) -> None:
        """Forget the past: a rate of zero until the first is set, and momentum of zero, which gives the same first step as none.

        Not none, because the fused kernel of SGD then allocates it without writing it in a step whose gradients overflow
        in fp16, and reads it in the next one.
        """
        self.set_rate(0.0)
        for optimizer in self.by_kind.values():
            optimizer.state.clear()
            for group in optimizer.param_groups:
                if group.get("momentum", 0) > 0:
                    for parameter in group["params"]:
                        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def set_rate(self, rate: float) -> None:
        """The schedule's learning rate of this step."""
        for kind, optimizer in self.by_kind.items():
            for group, in_torch in zip(self._groups[kind], optimizer.param_groups, strict=True):
                in_torch["lr"] = rate * group.rate_factor

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """One update of all parameters, through the scaler, which leaves out a step whose gradients overflowed."""
        for optimizer in self.by_kind.values():
            scaler.step(optimizer)

    def zero_grad(self) -> None:
        """No gradients any more."""
        for optimizer in self.by_kind.values():
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The state of each by its kind."""
        return {kind: optimizer.state_dict() for kind, optimizer in self.by_kind.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; which kernel does a step stays as on this device. ValueError for other kinds."""
        if state.keys() != self.by_kind.keys():
            raise ValueError(f"optimizers {', '.join(state)} in the state, {', '.join(self.by_kind)} here")
        for kind, optimizer in self.by_kind.items():
            fused = [group.get("fused") for group in optimizer.param_groups]
            optimizer.load_state_dict(state[kind])
            for group, own in zip(optimizer.param_groups, fused, strict=True):
                if "fused" in group:
                    group["fused"] = own
