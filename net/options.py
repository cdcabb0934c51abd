"""The `net:` section of a recipe. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class NetOptions:
    """CustomResNet (net/resnet.py)."""

    width: int = field(
        default=64,
        metadata={
            "help": "channels of the first layer; 64 is the 6.57M-parameter network",
            "at_least": 1,
            "at_most": 1024,
        },
    )
    logit_scale: float | None = field(
        default=None,
        metadata={
            "help": "factor on the logits; null is 1/sqrt(width), which suits high learning rates, 1 is none",
            "above": 0.0,
            "at_most": 1000.0,
        },
    )
