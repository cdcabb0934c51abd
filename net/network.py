"""From the `net:` section to a network: the only place that constructs one."""

from __future__ import annotations

from net.interface import Network
from net.options import NetOptions
from net.resnet import CustomResNet


def build(options: NetOptions, num_classes: int) -> Network:
    """The network of the options, freshly initialised from torch's generator; ValueError for sizes that cannot be."""
    return CustomResNet(num_classes, options.width, options.logit_scale)
