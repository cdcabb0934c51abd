"""The modules that are compiled: normalise, forward and loss of a training batch; normalise and forward in an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.step.views import VIEWS, Views, mean_over


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


class TrainStep(_Normalised):
    """(images uint8 (N, 3, H, W), labels (N,)) to (mean cross-entropy, number of correct predictions), both scalars."""

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        label_smoothing: float = 0.0,
        autocast_dtype: torch.dtype | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__(net, mean, std, autocast_dtype, channels_last)
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return loss, (logits.detach().argmax(1) == labels).sum()


class EvalStep(_Normalised):
    """Images uint8 (N, 3, H, W) to logits (N, C) float32, the mean over the views; with several sets of `views` to logits
    (sets, N, C). The network must be in eval mode; call it under `torch.no_grad()`."""

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        views: Sequence[Views] = (VIEWS["plain"],),
        autocast_dtype: torch.dtype | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__(net, mean, std, autocast_dtype, channels_last)
        self.views = tuple(views)

    def forward(self, images: Tensor) -> Tensor:
        looks = {(view.mirror, view.shift): view for views in self.views for view in views}
        answers = {place: self.logits(view.of(images)) for place, view in looks.items()}
        means = [mean_over(views, answers) for views in self.views]
        return means[0] if len(means) == 1 else torch.stack(means)
