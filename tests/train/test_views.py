"""Views of an image, and the mean of the answers to them, against NumPy's padding, slicing and mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from net.resnet import CustomResNet
from train.step.steps import EvalStep
from train.step.views import VIEWS, View, Views, answers_to

MEAN, STD = (120.0, 100.0, 90.0), (60.0, 50.0, 40.0)


def uint8_images(count: int, height: int = 32, width: int = 32) -> Tensor:
    pixels = torch.randint(
        0, 256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return pixels.permute(0, 3, 1, 2)


def as_numpy_shows(images: Tensor, mirror: bool, shift: tuple[int, int]) -> np.ndarray:
    """Padded by reflection, far enough for the shift, and the window cut that holds the image moved down and right."""
    pixels = images.numpy()[:, :, :, ::-1] if mirror else images.numpy()
    (down, right), (height, width) = shift, images.shape[2:]
    reach = 7
    padded = np.pad(pixels, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="reflect")
    return padded[:, :, reach - down : reach - down + height, reach - right : reach - right + width]


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("shift", [(0, 0), (1, 1), (-1, 1), (2, -3), (0, 4), (-7, 0)])
def test_a_view_is_numpys_padded_crop(mirror: bool, shift: tuple[int, int]) -> None:
    images = uint8_images(5, 16, 24)
    shown = View(mirror=mirror, shift=shift).of(images)
    assert shown.dtype == torch.uint8
    np.testing.assert_array_equal(shown.numpy(), as_numpy_shows(images, mirror, shift))


def test_a_view_moves_the_image_down_and_right() -> None:
    images = uint8_images(2)
    shown = View(shift=(3, 1)).of(images)
    assert torch.equal(shown[:, :, 3:, 1:], images[:, :, :-3, :-1])


class LeftHalf(nn.Module):
    """A network whose logits NumPy computes easily, not symmetric under a flip: channel means of the left half, weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, :, :, :16].mean((2, 3)))

    def numpy(self, pixels: np.ndarray) -> np.ndarray:
        x = (pixels.astype(np.float64) - np.reshape(MEAN, (1, 3, 1, 1))) / np.reshape(STD, (1, 3, 1, 1))
        weight, bias = self.linear.weight.detach().double().numpy(), self.linear.bias.detach().double().numpy()
        return x[:, :, :, :16].mean((2, 3)) @ weight.T + bias


def test_the_answer_is_numpys_weighted_mean_over_the_views() -> None:
    torch.manual_seed(0)
    net, images = LeftHalf(), uint8_images(9)
    views: Views = (
        View(0.5),
        View(0.25, mirror=True),
        View(0.15, shift=(-2, 3)),
        View(0.1, mirror=True, shift=(1, -1)),
    )
    answers = np.stack([net.numpy(as_numpy_shows(images, view.mirror, view.shift)) for view in views])
    expected = np.average(answers, axis=0, weights=[view.weight for view in views])
    with torch.no_grad():
        plain, found = answers_to([VIEWS["plain"], views], images, EvalStep(net, MEAN, STD))
        (alone,) = answers_to([views], images, EvalStep(net, MEAN, STD))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(plain.numpy(), answers[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(alone, found)
    assert np.abs(expected - answers[0]).max() > 1e-3  # else the views would not matter


def test_flip_tta_is_half_the_sum_of_the_two_answers_to_the_bit() -> None:
    torch.manual_seed(0)
    net, images = CustomResNet(10, 4).eval(), uint8_images(16)
    with torch.no_grad():
        one = EvalStep(net, MEAN, STD)
        a, b = one(images), one(images.flip(3))
        plain, both = answers_to([VIEWS["plain"], VIEWS["tta"]], images, one)
    assert torch.equal(plain, a)
    assert torch.equal(both, (a + b) / 2)


def test_flip_and_shift_is_the_mean_of_six_crops_of_the_reflected_image() -> None:
    torch.manual_seed(0)
    net, images = LeftHalf(), uint8_images(9)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    crops = [padded[:, :, k : k + 32, k : k + 32] for k in (1, 0, 2)]  # as it is, and moved by one pixel each way
    both = [(net.numpy(crop) + net.numpy(crop[..., ::-1])) / 2 for crop in crops]
    with torch.no_grad():
        _, flip, six = answers_to(list(VIEWS.values()), images, EvalStep(net, MEAN, STD))
    np.testing.assert_allclose(flip.numpy(), both[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(six.numpy(), both[0] / 2 + (both[1] + both[2]) / 4, rtol=1e-5, atol=1e-6)


def test_views_that_share_a_look_ask_the_network_once() -> None:
    net = LeftHalf()
    asked: list[object] = []
    net.register_forward_hook(lambda *call: asked.append(call))
    with torch.no_grad():
        answers_to([VIEWS["plain"], VIEWS["tta"]], uint8_images(2), EvalStep(net, MEAN, STD))
    assert len(asked) == 2


def test_answers_may_lie_in_memory_that_the_next_one_takes() -> None:
    """As those of CUDA graphs do."""
    torch.manual_seed(0)
    net, images, place = LeftHalf(), uint8_images(5), torch.empty(5, 4)
    with torch.no_grad():
        own = answers_to(list(VIEWS.values()), images, EvalStep(net, MEAN, STD))
        (plain,) = answers_to([VIEWS["plain"]], images, lambda shown: place.copy_(EvalStep(net, MEAN, STD)(shown)))
        shared = answers_to(list(VIEWS.values()), images, lambda shown: place.copy_(EvalStep(net, MEAN, STD)(shown)))
    assert torch.equal(plain, own[0])
    assert torch.equal(shared, own)


@pytest.mark.parametrize("view", [View(), View(mirror=True), View(shift=(1, -1)), View(mirror=True, shift=(-1, 1))])
def test_a_view_lies_in_memory_as_the_image_does(view: View) -> None:
    """A step that was compiled for the images is compiled again for other strides."""
    for images in (uint8_images(3), uint8_images(3).contiguous(), torch.zeros(0, 3, 8, 8, dtype=torch.uint8)):
        assert view.of(images).stride() == images.stride()


@pytest.mark.parametrize("name", VIEWS)
def test_the_weights_of_a_set_of_views_sum_to_one(name: str) -> None:
    assert sum(view.weight for view in VIEWS[name]) == 1.0
