"""The `net:` section of a recipe. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# of CustomResNet, from the image on; what net.freeze may name
PARTS = ("prep", "layer1", "layer2", "layer3", "classifier")


def parts_of(freeze: str | None) -> tuple[str, ...]:
    """The names that a value of net.freeze lists, each once, as they are written."""
    words = [] if freeze is None else [word.strip() for word in freeze.split(",")]
    return tuple(dict.fromkeys(word for word in words if word))


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
    activation: Literal["relu", "celu", "gelu", "silu"] = field(
        default="relu", metadata={"help": "activation after each batch norm; celu has alpha 0.3"}
    )
    whitening: bool = field(
        default=False,
        metadata={"help": "a frozen first layer that whitens 3x3 patches, taken from 5,000 training images"},
    )
    whitening_eps: float = field(
        default=5e-4,
        metadata={"help": "added to the patches' variances by net.whitening", "above": 0.0, "at_most": 1000.0},
    )
    residual_init: Literal["random", "dirac"] = field(
        default="random", metadata={"help": "how the residual convolutions begin: random, or dirac, the identity"}
    )
    norm_scale: Literal["trained", "frozen"] = field(
        default="trained", metadata={"help": "whether batch norm's factors are trained, or frozen at 1"}
    )
    norm_momentum: float = field(
        default=0.1,
        metadata={
            "help": "weight of a batch in batch norm's running statistics",
            "above": 0.0,
            "at_most": 1.0,
        },
    )
    norm_eps: float = field(
        default=1e-5, metadata={"help": "added to the variance by batch norm", "above": 0.0, "at_most": 1.0}
    )
    init: str | None = field(
        default=None,
        metadata={"help": "begin with the weights of another run: its folder (best.pt) or a checkpoint's file"},
    )
    freeze: str | None = field(
        default=None,
        metadata={
            "help": f"parts that keep their weights and batch-norm statistics, such as prep,layer1: {', '.join(PARTS)}"
        },
    )
