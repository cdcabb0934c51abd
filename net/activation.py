"""The activations that a recipe may choose, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def _celu() -> nn.Module:
    """With the alpha of cifar10-fast: closer to ReLU than torch's default of 1."""
    return nn.CELU(0.3)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "celu": _celu,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
