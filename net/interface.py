"""What the trainer needs from a network besides its logits."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Role = Literal["filter", "matrix", "norm_scale", "norm_bias", "bias"]


class Network(nn.Module):
    """Normalised images (N, 3, H, W) to logits (N, num_classes); a network of this project derives from it.

    `images_to_prepare`: how many training images `prepare` wants to see; with 0 it is not called.
    """

    images_to_prepare = 0

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
