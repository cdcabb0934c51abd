"""Patch whitening: a frozen first convolution whose outputs are uncorrelated and of variance one (arXiv:2404.00498)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGES_A_TIME = 250


class Whitening(nn.Module):
    """Images (N, channels, H, W) to (N, 2 * channels * size^2, H, W): each patch in the coordinates of the patches' principal
    axes, each divided by the root of its variance plus `eps`, and the negatives of them.

    The weights are no trained parameters. They are NaN until `fit`, or until a state is loaded.
    """

    def __init__(self, channels: int = 3, size: int = 3, eps: float = 5e-4) -> None:
        super().__init__()
        if size % 2 == 0 or size < 1:
            raise ValueError(f"Whitening: size {size} must be odd, so that the patch has a middle")
        self.size, self.eps = size, eps
        self.out_channels = 2 * channels * size**2
        shape = self.out_channels, channels, size, size
        self.weight = nn.Parameter(torch.full(shape, float("nan")), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.weight, padding=self.size // 2)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Take the weights from all patches of images (N, channels, H, W), each patch whole inside its image.

        The axis of the largest variance comes first. The sign of an axis, which the decomposition leaves open, is such that
        its largest component is positive.
        """
        variances, axes = torch.linalg.eigh(patch_covariance(images, self.size))
        variances, axes = variances.flip(0), axes.flip(1).T
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        filters = axes * largest.sign() / (variances.clamp_min(0) + self.eps).sqrt()[:, None]
        self.weight.copy_(torch.cat([filters, -filters]).view(self.weight.shape))


def patch_covariance(images: Tensor, size: int) -> Tensor:
    """(C * size^2, C * size^2) float64: the covariance of all patches of images (N, C, H, W), flattened as a filter is."""
    length = images.shape[1] * size**2
    total, products, count = torch.zeros(length).double(), torch.zeros(length, length).double(), 0
    for some in images.split(IMAGES_A_TIME):
        patches = F.unfold(some.double(), size).transpose(0, 1).reshape(length, -1)
        total += patches.sum(1)
        products += patches @ patches.T
        count += patches.shape[1]
    mean = total / count
    return products / count - mean[:, None] * mean
