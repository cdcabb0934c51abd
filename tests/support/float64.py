"""Training in float64, where rounding is too small to turn the decision of a max-pooling or a ReLU within an epoch."""

from __future__ import annotations

from collections.abc import Callable

import net
from train.step.steps import EvalStep, TrainStep


def train_in_float64(replace: Callable[[object, str, object], None] = setattr) -> None:
    """From here on networks are made in float64, and see their images normalised in it. They begin with the weights of
    float32."""
    build = net.build
    replace(net, "build", lambda *arguments: build(*arguments).double())
    for step in (TrainStep, EvalStep):
        replace(step, "logits", lambda self, images: self.net((images.double() - self.mean) * self.scale))
