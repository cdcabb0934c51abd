"""From the `net:` section to a network: the only place that constructs one."""

from __future__ import annotations

from net.interface import Network
from net.options import NetOptions
from net.resnet import CustomResNet


def build(options: NetOptions, num_classes: int) -> Network:
    """The network of the options, its weights drawn from torch's generator. Raises ValueError for sizes below 1."""
    return CustomResNet(num_classes, options.width, options.logit_scale)
