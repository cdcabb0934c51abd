"""Batch norm over all processes together (train.sync_bn): torch's SyncBatchNorm on CUDA, an equivalent elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from net.norm import BatchNorm

_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within the block HostSyncBatchNorm waits for nobody, and takes the batches of all processes to be equal to this one's: for
    steps on borrowed state, which each process takes in its own time, and of which it may take another number than the others.

    The sums lie outside of what is compiled, so that nothing is compiled anew within the block or after it.
    """
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def _sum_over_processes(values: Tensor) -> Tensor:
    if _alone:
        return values * dist.get_world_size()
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; each gets the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _sum_over_processes(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _sum_over_processes(gradient)


class HostSyncBatchNorm(BatchNorm):
    """Batch norm whose statistics in training are those of the batches of all processes together, on any device.

    torch's SyncBatchNorm does not run on the CPU. The mean is computed first, then the variance around it: two sums over the
    processes, without cancellation. The batches of all processes must have the same size.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim != 4:
            raise ValueError(f"expected (N, C, H, W), got {tuple(input.shape)}")

    @torch.compiler.disable  # type: ignore[misc, untyped-decorator]
    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        processes = dist.get_world_size()
        count = x.numel() // x.shape[1]
        mean = _SumOverProcesses.apply(x.sum((0, 2, 3)) / (count * processes))  # type: ignore[no-untyped-call]
        centred = x - mean[:, None, None]
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3)) / (count * processes))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            assert self.momentum is not None
            total = count * processes
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * (total / max(total - 1, 1)), self.momentum)
        return mean, variance

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        mean, variance = self._statistics(x)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        normalised: Tensor = (x - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return normalised.to(input.dtype)


def synchronise_batch_norm(net: nn.Module, device: torch.device) -> nn.Module:
    """The network with batch-norm statistics over all processes: torch's SyncBatchNorm on CUDA, ours elsewhere.

    The keys of its state stay the same.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-any-return]
    for name, part in net.named_children():
        if isinstance(part, nn.BatchNorm2d):
            own = HostSyncBatchNorm(part.num_features, part.eps, part.momentum, device=device, dtype=part.weight.dtype)
            own.load_state_dict(part.state_dict())
            for parameter, theirs in zip(own.parameters(), part.parameters(), strict=True):
                parameter.requires_grad_(theirs.requires_grad)
            own.train(part.training)
            setattr(net, name, own)
        else:
            synchronise_batch_norm(part, device)
    return net
