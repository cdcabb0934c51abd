"""The activations that a recipe may choose, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from net.pooling import exporting


class ReLUOfInput(torch.autograd.Function):
    """`apply(x)`: torch's ReLU, whose gradient asks for the sign of its input instead of its output; bit for bit the same.

    The input of an activation is the output of a batch norm, which the compiler computes again from what the batch norm's own
    gradient reads anyway. torch's ReLU reads its saved output too, a whole array more.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x <= 0, 0, gradient)


class ReLU(nn.ReLU):
    """`nn.ReLU` that uses ReLUOfInput where that moves fewer bytes: inside torch.compile, where a gradient is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        wanted = torch.is_grad_enabled() and x.requires_grad
        if wanted and torch.compiler.is_compiling() and not exporting():
            return ReLUOfInput.apply(x)  # type: ignore[no-any-return]
        return super().forward(x)


def _celu() -> nn.Module:
    """With the alpha of cifar10-fast: closer to ReLU than torch's default of 1."""
    return nn.CELU(0.3)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": ReLU,
    "celu": _celu,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
