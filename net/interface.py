"""What the trainer needs from a network besides its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from typing_extensions import Self

Role = Literal["filter", "matrix", "norm_scale", "norm_bias", "bias"]


class Network(nn.Module):
    """Normalised images (N, 3, H, W) to logits (N, num_classes); a network of this project derives from it.

    `images_to_prepare`: how many training images `prepare` wants to see; with 0 it is not called.

    `frozen`: the names of parts that are not trained (`freeze`).

    `steps`: how many training steps the weights have had. Whoever trains adds to it; the state dict holds it as the
    `num_batches_tracked` of every batch norm, which is written when the state dict is asked for, and read when one is loaded.
    """

    images_to_prepare = 0

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.frozen: tuple[str, ...] = ()
        self.register_state_dict_pre_hook(_write_steps)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_read_steps)  # type: ignore[no-untyped-call]

    def freeze(self, parts: Sequence[str]) -> None:
        """From here on the modules of these names keep their weights and statistics: their parameters get no gradients, and they
        stay in eval mode where the network is in train mode."""
        self.frozen = tuple(parts)
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Train or eval mode, for all that is not frozen."""
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def running_statistics(self) -> list[Tensor]:
        """Batch norm's means and variances that training changes."""
        named = self.named_buffers()
        return [b for name, b in named if b.is_floating_point() and name.partition(".")[0] not in self.frozen]

    def prepare(self, images: Tensor) -> None:
        """Initialise layers from training images (N, 3, H, W) float32, normalised, on the CPU: once, before training."""

    def role(self, name: str) -> Role:
        """What the parameter of this name is for. Optimizers have different rules for the filters of a convolution, the
        classifier's matrix, and the scales and biases of a normalisation layer."""
        parent, _, leaf = name.rpartition(".")
        owner = self.get_submodule(parent)
        if isinstance(owner, _BatchNorm):
            return "norm_scale" if leaf == "weight" else "norm_bias"
        dimensions = self.get_parameter(name).ndim
        return "filter" if dimensions > 2 else "matrix" if dimensions == 2 else "bias"

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass over an image of height x width pixels."""
        raise NotImplementedError


# hooks are functions of the module, and no methods: a copy of a network must not write into the one it was copied from
def _counters(network: nn.Module) -> list[Tensor]:
    """Batch norm's, all of one value."""
    norms = (part for part in network.modules() if isinstance(part, _BatchNorm))
    return [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]


@torch.no_grad()
def _write_steps(network: nn.Module, *unused: Any) -> None:
    assert isinstance(network, Network)
    for counter in _counters(network):
        counter.fill_(network.steps)


def _read_steps(network: nn.Module, *unused: Any) -> None:
    assert isinstance(network, Network)
    network.steps = max(map(int, _counters(network)), default=0)
