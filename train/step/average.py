"""The exponential moving average of the weights."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class WeightAverage(AveragedModel):
    """A copy of a network, `.module`, whose weights and batch-norm statistics follow the network's slowly.

    AveragedModel's own update would make the host wait: it copies its counter to the device each time.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        super().__init__(net)
        self.decay = decay

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """average = decay * average + (1 - decay) * now, of weights and batch-norm statistics; the first update copies."""
        now = list(chain(net.parameters(), net.buffers()))
        averages = list(chain(self.module.parameters(), self.module.buffers()))
        floats = [i for i, tensor in enumerate(now) if tensor.is_floating_point()]
        if int(self.n_averaged) > 0:  # on the CPU
            torch._foreach_lerp_([averages[i] for i in floats], [now[i] for i in floats], 1 - self.decay)
            counters = [i for i, tensor in enumerate(now) if not tensor.is_floating_point()]
            torch._foreach_copy_([averages[i] for i in counters], [now[i] for i in counters])
        else:
            torch._foreach_copy_(averages, now)
        self.n_averaged += 1

    @torch.no_grad()
    def start_over(self, net: nn.Module) -> None:
        """Reset to what a new average of this network would be, keeping the memory of the tensors."""
        self.module.load_state_dict(net.state_dict())
        self.n_averaged.zero_()
