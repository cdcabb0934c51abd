"""The exponential moving average of the weights."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from net.interface import Network


class WeightAverage(AveragedModel):
    """A copy of a network, `.module`, whose weights and batch-norm statistics follow the network's slowly.

    AveragedModel's own update would make the host wait: it copies its counter to the device each time.
    """

    module: Network

    def __init__(self, net: Network, decay: float) -> None:
        super().__init__(net)
        self.decay = decay

    @torch.no_grad()
    def update(self, net: Network) -> None:
        """average = decay * average + (1 - decay) * now, of weights and batch-norm statistics; the first update copies."""
        averages, now = _followed(self.module), _followed(net)
        if int(self.n_averaged) > 0:  # on the CPU
            torch._foreach_lerp_(averages, now, 1 - self.decay)
        else:
            torch._foreach_copy_(averages, now)
        self.module.steps = net.steps
        self.n_averaged += 1

    @torch.no_grad()
    def start_over(self, net: Network) -> None:
        """As a new one of this network, in the memory of the old one."""
        self.module.load_state_dict(net.state_dict())
        self.n_averaged.zero_()


def _followed(net: Network) -> list[Tensor]:
    """Weights and statistics; batch norm's counters are the network's `steps`."""
    return [tensor for tensor in chain(net.parameters(), net.buffers()) if tensor.is_floating_point()]
