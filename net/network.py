"""From the `net:` section to a network: the only place that constructs one."""

from __future__ import annotations

from net.interface import Network
from net.options import NetOptions
from net.resnet import CustomResNet, Style


def build(options: NetOptions, num_classes: int) -> Network:
    """The network of the options, its weights drawn from torch's generator. Raises ValueError for sizes below 1."""
    style = Style(
        activation=options.activation,
        norm_momentum=options.norm_momentum,
        norm_eps=options.norm_eps,
        norm_scale_trained=options.norm_scale == "trained",
        dirac=options.residual_init == "dirac",
    )
    whitening = options.whitening_eps if options.whitening else None
    return CustomResNet(num_classes, options.width, options.logit_scale, whitening=whitening, style=style)
