"""CustomResNet: the ResNet-9 known from DAWNBench (davidcpage/cifar10-fast), with the pooling before the normalisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from net.activation import ACTIVATIONS
from net.interface import Network
from net.norm import BatchNorm
from net.pooling import MaxPool
from net.whitening import Whitening


@dataclass(frozen=True, kw_only=True)
class Style:
    """What all layers have in common: the activation (a name of ACTIVATIONS), and how batch norm is set up; with
    `norm_scale_trained` false its factors stay 1. `dirac`: the convolutions of the residual branches begin as the identity."""

    activation: str = "relu"
    norm_momentum: float = 0.1
    norm_eps: float = 1e-5
    norm_scale_trained: bool = True
    dirac: bool = False

    def norm(self, channels: int) -> BatchNorm:
        norm = BatchNorm(channels, self.norm_eps, self.norm_momentum)
        norm.weight.requires_grad_(self.norm_scale_trained)
        return norm


PLAIN = Style()  # the course assignment's


class ConvBN(nn.Sequential):
    """Convolution (3x3, stride 1, padding 1, no bias), optional 2x2 max-pooling, batch norm, activation.

    Maps (N, in_channels, H, W) to (N, out_channels, H, W), or to half of H and W with `pool`. Pooling comes before the
    norm: the norm and the activation then touch a quarter of the elements. `size` is the convolution's, an odd number.
    """

    def __init__(
        self, in_channels: int, out_channels: int, pool: bool = False, *, size: int = 3, style: Style = PLAIN
    ) -> None:
        layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, size, stride=1, padding=size // 2, bias=False)]
        if pool:
            layers.append(MaxPool(2))
        layers += [style.norm(out_channels), ACTIVATIONS[style.activation]()]
        super().__init__(*layers)


class Residual(nn.Module):
    """x + ConvBN(ConvBN(x)): both activations lie inside the branch, nothing follows the sum."""

    def __init__(self, channels: int, style: Style = PLAIN) -> None:
        super().__init__()
        self.branch = nn.Sequential(ConvBN(channels, channels, style=style), ConvBN(channels, channels, style=style))
        if style.dirac:
            for part in self.branch.modules():
                if isinstance(part, nn.Conv2d):
                    nn.init.dirac_(part.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)  # type: ignore[no-any-return]


class CustomResNet(Network):
    """Images (N, 3, 32, 32), floating point and normalised, to logits (N, num_classes).

    Its layers have `width`, 2, 4 and 8 times `width` channels; with 64 and 10 classes that is the course assignment's network
    of 6,573,130 parameters. Height and width of the images may be any multiples of 8 from 32 on: the last pooling is 4x4,
    and the features are the mean over the positions that it leaves (a single one at 32x32).

    `logit_scale` multiplies the logits. 1 is the assignment's network; the default is 1 / sqrt(width), which at 64 is the 1/8
    of cifar10-fast. The classifier sees 8 * width features, each a maximum of rectified, normalised values. The curvature of
    the loss along the classifier's weights therefore grows with width * logit_scale**2, and where it is large, training is
    stable only at low learning rates.

    With `whitening` (its eps) a frozen 3x3 patch whitening comes first, with an activation after it, and the first convolution
    is 1x1: it sees the same 3x3 pixels as without. `prepare` takes the whitening from images.

    Raises ValueError for a width or a class count below 1, or a scale that is not positive.
    """

    def __init__(
        self,
        num_classes: int = 10,
        width: int = 64,
        logit_scale: float | None = None,
        *,
        whitening: float | None = None,
        style: Style = PLAIN,
    ) -> None:
        super().__init__()
        if width < 1 or num_classes < 1:
            raise ValueError(f"CustomResNet: width {width} and num_classes {num_classes} must be at least 1")
        if logit_scale is not None and not logit_scale > 0:
            raise ValueError(f"CustomResNet: logit_scale {logit_scale} must be positive")
        self.width = width
        self.logit_scale = width**-0.5 if logit_scale is None else logit_scale
        self.whitening: Whitening | None = None
        if whitening is None:
            self.prep = ConvBN(3, width, style=style)
        else:
            self.images_to_prepare = 5000
            self.whitening = Whitening(eps=whitening)
            self.whitened = ACTIVATIONS[style.activation]()
            self.prep = ConvBN(self.whitening.out_channels, width, size=1, style=style)
        self.layer1 = nn.Sequential(ConvBN(width, 2 * width, pool=True, style=style), Residual(2 * width, style))
        self.layer2 = ConvBN(2 * width, 4 * width, pool=True, style=style)
        self.layer3 = nn.Sequential(ConvBN(4 * width, 8 * width, pool=True, style=style), Residual(8 * width, style))
        self.pool = MaxPool(4)
        self.classifier = nn.Linear(8 * width, num_classes)

    def prepare(self, images: Tensor) -> None:
        if self.whitening is not None:
            self.whitening.fit(images)

    def forward(self, images: Tensor) -> Tensor:
        x = images if self.whitening is None else self.whitened(self.whitening(images))
        x = self.layer3(self.layer2(self.layer1(self.prep(x))))
        x = self.pool(x)
        if x.shape[-1] > 1 or x.shape[-2] > 1:
            x = x.mean((2, 3), keepdim=True)
        return self.classifier(torch.flatten(x, 1)) * self.logit_scale  # type: ignore[no-any-return]

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds of the convolutions and the classifier, in closed form; norms and pooling are not counted."""
        w, area = self.width, height * width
        first = 27 * w * area
        if self.whitening is not None:
            first = (27 + w) * self.whitening.out_channels * area
        maps = [(w, 2 * w, area), (2 * w, 2 * w, area // 4), (2 * w, 2 * w, area // 4)]
        maps += [(2 * w, 4 * w, area // 4), (4 * w, 8 * w, area // 16)]
        maps += [(8 * w, 8 * w, area // 64), (8 * w, 8 * w, area // 64)]
        return first + sum(9 * i * o * positions for i, o, positions in maps) + 8 * w * self.classifier.out_features


def parameter_count(num_classes: int = 10, width: int = 64) -> int:
    """Trainable parameters of CustomResNet in closed form, for checking a checkpoint against a configuration.

    With w the width: 3x3 kernels 9(3w + 2w^2 + 2(2w)^2 + 8w^2 + 32w^2 + 2(8w)^2), norms 2w(1 + 3*2 + 4 + 3*8),
    classifier 8w*num_classes + num_classes.
    """
    w = width
    kernels = 9 * (3 * w + 2 * w**2 + 2 * (2 * w) ** 2 + 8 * w**2 + 32 * w**2 + 2 * (8 * w) ** 2)
    norms = 2 * w * (1 + 3 * 2 + 4 + 3 * 8)
    return kernels + norms + 8 * w * num_classes + num_classes
