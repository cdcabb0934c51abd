"""Test-time augmentation: the logits are the weighted mean of the network's logits for several views of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class View:
    """A view of an image: mirrored left to right or not, shifted by (rows, columns) with a reflected border; and its weight."""

    weight: float = 1.0
    mirror: bool = False
    shift: tuple[int, int] = (0, 0)

    def of(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) as this view shows them, laid out in memory as they are: a step that was compiled for those takes
        these too."""
        shown = images.flip(3) if self.mirror else images
        down, right = self.shift
        if down or right:
            reach = max(abs(down), abs(right))
            height, width = images.shape[2:]
            padded = F.pad(shown.float(), (reach,) * 4, mode="reflect")
            shown = padded[:, :, reach - down : reach - down + height, reach - right : reach - right + width]
        return shown if shown is images else torch.empty_like(images).copy_(shown)


Views = tuple[View, ...]
# by the name under which metrics.jsonl and the checkpoints report them; the weights of each sum to one
VIEWS: dict[str, Views] = {
    "plain": (View(),),
    "tta": (View(0.5), View(0.5, mirror=True)),
    # those of airbench94: half of the weight for the image and its mirror, half for the image moved by a pixel up left and down
    # right and the mirrors of these, which a mirrored image shows when it moves the other way
    "shift": (
        View(0.25),
        View(0.25, mirror=True),
        *(View(0.125, shift=(k, k)) for k in (-1, 1)),
        *(View(0.125, mirror=True, shift=(k, -k)) for k in (-1, 1)),
    ),
}
LABELS = {"plain": "", "tta": "flip TTA", "shift": "flip and shift TTA"}


def answers_to(sets: Sequence[Views], images: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean logits (sets, N, C) for each set of views of the images (N, 3, H, W). `ask` gives the logits (N, C) for images,
    and may use their memory again at its next call; it is called once for each look that any set has."""
    looks = {(view.mirror, view.shift): view for views in sets for view in views}
    answers = {look: ask(view.of(images)).clone() for look, view in looks.items()}
    return torch.stack([_mean_over(views, answers) for views in sets])


def _mean_over(views: Views, answers: dict[tuple[bool, tuple[int, int]], Tensor]) -> Tensor:
    """The weighted mean of the logits (N, C) of the views; `answers` has them by (mirror, shift)."""
    if len(views) == 1:
        return answers[views[0].mirror, views[0].shift]
    total, *others = (answers[view.mirror, view.shift] * view.weight for view in views)
    for other in others:
        total = total + other
    return total
