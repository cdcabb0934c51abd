"""The modules that are compiled: normalise, forward and loss of a training batch; normalise and forward in an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Normalised(nn.Module):
    """Casts, normalises and lays out uint8 images as the network wants them; the cast fuses into the first layer."""

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        autocast_dtype: torch.dtype | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.net = net
        self.autocast_dtype = autocast_dtype
        self.channels_last = channels_last
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", 1 / torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to (N, C) float32."""
        x = (images.float() - self.mean) * self.scale
        if not self.channels_last:
            x = x.contiguous()
        with self.autocast(images.device.type):
            return self.net(x).float()  # type: ignore[no-any-return]

    def autocast(self, device_type: str) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.autocast_dtype)


# From how many arrays an intermediate result may be computed before the compiler writes it to memory, instead of computing it
# again in each kernel that uses it; inductor's own number is 4. With 8 the gradients of activations need not be written
# (docs/rehearsal.md has the figures).
READS_BEFORE_WRITING = 8


def compile_in_place(step: nn.Module, mode: str) -> None:
    """Have the step compiled at its first call, by a mode of torch.compile and with READS_BEFORE_WRITING."""
    from torch._inductor import list_mode_options

    # torch.compile takes a mode or options: these are the mode's
    options = {**list_mode_options(mode, dynamic=False), "realize_reads_threshold": READS_BEFORE_WRITING}
    step.compile(options=options, dynamic=False)


def balanced_weights(labels: npt.NDArray[np.int64], num_classes: int) -> list[float]:
    """For each class c n / (C * n_c), with n labels in all and n_c of that class: a class of half the mean size weighs 2, and
    the mean weight over all labels is 1. A class without labels has weight 0."""
    counts = np.bincount(labels, minlength=num_classes)
    return [len(labels) / (num_classes * count) if count else 0.0 for count in counts.tolist()]


class TrainStep(_Normalised):
    """(images uint8 (N, 3, H, W), labels (N,)) to (mean cross-entropy, number of correct predictions), both scalars.

    With `class_weights`, a number a class, the loss is the mean over the batch of each image's cross-entropy times the weight
    of its class. It is not divided by the weights of the batch: their mean over the data set is 1, and the gradients of several
    processes then average to those of the whole batch.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        autocast_dtype: torch.dtype | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__(net, mean, std, autocast_dtype, channels_last)
        self.label_smoothing = label_smoothing
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(images)
        if self.class_weights is None:
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        else:
            losses = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="none")
            loss = (losses * self.class_weights[labels]).mean()
        return loss, (logits.detach().argmax(1) == labels).sum()


class EvalStep(_Normalised):
    """Images uint8 (N, 3, H, W) to logits (N, C) float32. The network must be in eval mode; call it under `torch.no_grad()`."""

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images)
