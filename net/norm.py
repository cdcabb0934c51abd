"""Batch norm that leaves the counting of its batches to the network."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that does not add 1 to `num_batches_tracked` in every step.

    The sum is a kernel of its own for each layer, and nothing reads it, as the momentum is fixed. The buffer stays, and
    the network writes its `steps` into it (net/interface.py).
    """

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        assert self.momentum is not None  # None would be the mean over all batches, which takes their number
        mean, variance, scale, bias = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(input, mean, variance, scale, bias, self.training, self.momentum, self.eps)
