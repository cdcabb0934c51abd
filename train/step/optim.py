"""The optimizers of a training behind one interface; each parameter group has its own rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from net.interface import Network
from train.options import OptimOptions
from train.step.decoupled import DecoupledSGD
from train.step.lookahead import Lookahead
from train.step.muon import Muon


@dataclass(frozen=True, eq=False)
class ParameterGroup:
    """Parameters that are trained alike: by the optimizer `kind` (a name of KINDS), at `rate_factor` times the schedule's
    learning rate."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    weight_decay: float
    kind: str = "sgd"
    rate_factor: float = 1.0


def parameter_groups(net: Network, options: OptimOptions, lr_max: float | None = None) -> list[ParameterGroup]:
    """The trained parameters: filters and matrices in a group with weight decay, normalisation layers and biases in one with
    their own. Norm biases with a rate of their own are a group apart, and so are filters that another optimizer trains, whose
    rate is to peak at its own value where the schedule's peaks at `lr_max`."""
    of: dict[str, list[nn.Parameter]] = {"kernels": [], "filters": [], "norms and biases": [], "norm biases": []}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        role = net.role(name)
        if role == "filter" and options.filters != "sgd":
            of["filters"].append(parameter)
        elif role == "norm_bias" and options.norm_bias_rate != 1:
            of["norm biases"].append(parameter)
        else:
            of["kernels" if role in ("filter", "matrix") else "norms and biases"].append(parameter)
    groups = [
        ParameterGroup("kernels", tuple(of["kernels"]), options.weight_decay),
        ParameterGroup("norms and biases", tuple(of["norms and biases"]), options.norm_bias_weight_decay),
    ]
    if options.norm_bias_rate != 1:
        decay, factor = options.norm_bias_weight_decay, options.norm_bias_rate
        groups.append(ParameterGroup("norm biases", tuple(of["norm biases"]), decay, rate_factor=factor))
    if options.filters != "sgd":
        assert lr_max is not None, "the configuration is refused without"
        factor = options.muon_lr / lr_max
        groups.append(ParameterGroup("filters", tuple(of["filters"]), 0.0, options.filters, factor))
    return [group for group in groups if group.parameters]


def _sgd(groups: list[dict[str, Any]], options: OptimOptions, device: torch.device) -> torch.optim.Optimizer:
    """SGD; on CUDA as one fused kernel."""
    make = DecoupledSGD if options.decoupled_weight_decay else torch.optim.SGD
    return make(
        groups, lr=0.0, momentum=options.momentum, nesterov=options.nesterov, fused=device.type == "cuda" or None
    )


def _muon(groups: list[dict[str, Any]], options: OptimOptions, device: torch.device) -> torch.optim.Optimizer:
    """Muon, which has no weight decay: that of the groups must be zero."""
    assert not any(group["weight_decay"] for group in groups)
    return Muon([{"params": group["params"]} for group in groups], options.muon_momentum, options.muon_rescale)


KINDS: dict[str, Callable[[list[dict[str, Any]], OptimOptions, torch.device], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "muon": _muon,
}


def _momentum_buffers(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    found = {parameter: of_it.get("momentum_buffer") for parameter, of_it in optimizer.state.items()}
    return {parameter: buffer for parameter, buffer in found.items() if buffer is not None}


class Optimizers:
    """The optimizers that the groups need, used as one. The schedule sets the learning rate at each step."""

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
        self.lookahead: Lookahead | None = None
        if options.lookahead_every:
            everything = [parameter for group in groups for parameter in group.parameters]
            self.lookahead = Lookahead(everything, options.lookahead_every, options.lookahead_part)
        self.start_over()

    def start_over(self) -> None:
        """Reset the optimizers: a learning rate of zero until one is set, and momentum buffers of zeros, in the memory of the old
        ones, so that a captured graph that uses them stays valid.

        Without buffers the first step would be the same. But SGD's fused kernel allocates missing buffers in the first step,
        leaves them unwritten if gradients overflow in fp16 there, and reads them in the next step.
        """
        self.set_rate(0.0)
        for optimizer in self.by_kind.values():
            buffers = _momentum_buffers(optimizer)
            optimizer.state.clear()
            for group in optimizer.param_groups:
                if group.get("momentum", 0) > 0:
                    for parameter in group["params"]:
                        old = buffers.get(parameter)
                        buffer = torch.zeros_like(parameter) if old is None else old.zero_()
                        optimizer.state[parameter]["momentum_buffer"] = buffer
        if self.lookahead is not None:
            self.lookahead.start_over()

    def set_rate(self, rate: float | Tensor) -> None:
        """Set the schedule's learning rate for this step, a number or a scalar on the device; each group uses it times its
        `rate_factor`."""
        for kind, optimizer in self.by_kind.items():
            for group, in_torch in zip(self._groups[kind], optimizer.param_groups, strict=True):
                in_torch["lr"] = rate if group.rate_factor == 1 else rate * group.rate_factor

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """One update of all parameters, before `look_ahead`. The scaler skips it where gradients have overflowed in fp16."""
        for optimizer in self.by_kind.values():
            scaler.step(optimizer)

    def look_ahead(self) -> None:
        """What is done after a step, and in some steps only: the host counts them."""
        if self.lookahead is not None:
            self.lookahead.step()

    def zero_grad(self) -> None:
        """Remove all gradients."""
        for optimizer in self.by_kind.values():
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The state of each optimizer, by its kind, and that of Lookahead where there is one."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def _parts(self) -> dict[str, torch.optim.Optimizer | Lookahead]:
        return {**self.by_kind, **({} if self.lookahead is None else {"lookahead": self.lookahead})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`; the kernel stays the one for this device, and the momentum buffers where they are in memory.
        ValueError for other kinds of optimizers."""
        if state.keys() != self._parts().keys():
            raise ValueError(f"optimizers {', '.join(state)} in the state, {', '.join(self._parts())} here")
        if self.lookahead is not None:
            self.lookahead.load_state_dict(state["lookahead"])
        for kind, optimizer in self.by_kind.items():
            fused = [group.get("fused") for group in optimizer.param_groups]
            buffers = _momentum_buffers(optimizer)
            optimizer.load_state_dict(state[kind])
            for parameter, loaded in _momentum_buffers(optimizer).items():
                if parameter in buffers:
                    optimizer.state[parameter]["momentum_buffer"] = buffers[parameter].copy_(loaded)
            for group, own in zip(optimizer.param_groups, fused, strict=True):
                if "fused" in group:
                    group["fused"] = own
