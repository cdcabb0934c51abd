"""The options of the network: whitening against NumPy's covariance, the Dirac start, activations and norms by formulas."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn

from net.interface import Network
from net.network import build
from net.options import NetOptions
from net.resnet import CustomResNet, Residual, Style
from net.whitening import Whitening


def images(count: int, side: int = 16) -> Tensor:
    """Correlated neighbours and channels, as in pictures, and a mean that is not zero."""
    noise = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    return noise.cumsum(2).cumsum(3) / side + noise[:, :1] + 0.3


def numpy_patches(pixels: Tensor) -> np.ndarray:
    """(patches, 27) float64, flattened as (channel, row, column)."""
    windows = sliding_window_view(pixels.double().numpy(), (3, 3), axis=(2, 3))
    return np.ascontiguousarray(windows.transpose(0, 2, 3, 1, 4, 5)).reshape(-1, 27)


def whitened(layer: Whitening, pixels: Tensor) -> np.ndarray:
    """(positions, channels) of the layer at the patches that lie whole inside their image."""
    with torch.no_grad():
        out = layer(pixels)[:, :, 1:-1, 1:-1]
    return out.double().numpy().transpose(0, 2, 3, 1).reshape(-1, out.shape[1])


def test_whitened_patches_have_the_identity_as_covariance() -> None:
    pixels, layer = images(300), Whitening(eps=1e-9)
    layer.fit(pixels)
    assert layer.weight.shape == (54, 3, 3, 3) and not layer.weight.requires_grad
    found = np.cov(whitened(layer, pixels)[:, :27].T, bias=True)
    np.testing.assert_allclose(found, np.eye(27), atol=2e-3)


def test_eps_lowers_each_variance_to_its_share() -> None:
    pixels, layer = images(300), Whitening(eps=0.05)
    layer.fit(pixels)
    variances = np.sort(np.linalg.eigvalsh(np.cov(numpy_patches(pixels).T, bias=True)))[::-1]
    found = np.cov(whitened(layer, pixels).T, bias=True)
    share = variances / (variances + 0.05)
    np.testing.assert_allclose(np.diag(found), np.tile(share, 2), atol=1e-3)
    assert share.min() < 0.5 < share.max()  # else eps would not matter
    np.testing.assert_allclose(found[:27, 27:], -found[:27, :27], atol=1e-3)  # the negatives


def test_the_same_images_give_the_same_axes_however_they_are_shuffled() -> None:
    pixels = images(300)
    once, again = Whitening(), Whitening()
    once.fit(pixels)
    again.fit(pixels.flip(0))
    torch.testing.assert_close(once.weight, again.weight, rtol=1e-3, atol=1e-4)


def test_images_without_any_variance_give_finite_weights() -> None:
    layer = Whitening()
    layer.fit(torch.ones(2, 3, 8, 8))
    assert torch.isfinite(layer.weight).all()


def test_a_whitening_that_was_not_fitted_shows_itself() -> None:
    net = CustomResNet(10, 2, whitening=5e-4).eval()
    assert net.images_to_prepare == 5000 and torch.isnan(net(torch.zeros(1, 3, 32, 32))).all()
    net.prepare(images(20, 32))
    loaded = CustomResNet(10, 2, whitening=5e-4)
    loaded.load_state_dict(net.state_dict())
    pixels = images(3, 32)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(pixels), net(pixels)) and torch.isfinite(net(pixels)).all()


def test_an_even_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="size 2 must be odd"):
        Whitening(size=2)


def test_multiply_adds_with_whitening_equal_those_of_its_two_layers() -> None:
    plain, whitening = CustomResNet(10, 4), CustomResNet(10, 4, whitening=5e-4)
    first = 32 * 32 * (54 * 27 + 4 * 54)
    assert whitening.multiply_adds(32, 32) - plain.multiply_adds(32, 32) == first - 32 * 32 * 27 * 4


def test_the_convolutions_of_a_dirac_branch_begin_as_the_identity_and_the_others_as_without() -> None:
    torch.manual_seed(0)
    branch = Residual(6, Style(dirac=True)).branch
    x = torch.randn(2, 6, 8, 8)
    for part in branch:
        assert torch.equal(part[0](x), x)
    # in eval mode a fresh norm divides by sqrt(1 + eps): the whole branch is two activations of the input
    torch.testing.assert_close(branch.eval()(x), x.relu(), rtol=1e-4, atol=1e-4)
    torch.manual_seed(3)
    plain = dict(CustomResNet(10, 4).named_parameters())
    torch.manual_seed(3)
    for name, parameter in CustomResNet(10, 4, style=Style(dirac=True)).named_parameters():
        assert torch.equal(parameter, plain[name]) != (".branch." in name and name.endswith(".0.weight")), name


ACTIVATIONS = {
    "relu": lambda x: max(x, 0.0),
    "celu": lambda x: x if x > 0 else 0.3 * math.expm1(x / 0.3),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_takes_the_place_of_every_relu(name: str) -> None:
    net = build(NetOptions(width=2, activation=name), 10)  # type: ignore[arg-type]
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    expected = torch.tensor([ACTIVATIONS[name](value) for value in x.tolist()], dtype=torch.float64)
    found = [part[-1] for part in net.modules() if isinstance(part, nn.Sequential) and isinstance(part[0], nn.Conv2d)]
    assert len(found) == 8
    for activation in found:
        torch.testing.assert_close(activation(x), expected)


def test_norms_take_their_momentum_and_eps_and_may_freeze_their_factors() -> None:
    options = NetOptions(width=2, norm_momentum=0.4, norm_eps=0.5, norm_scale="frozen")
    net = build(options, 10)
    norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(norms) == 8
    assert not any(norm.weight.requires_grad for norm in norms) and all(norm.bias.requires_grad for norm in norms)
    x = torch.randn(64, 2, 4, 4) * 2 + 3
    values = x.numpy().transpose(1, 0, 2, 3).reshape(2, -1)
    norm = norms[0].train()
    expected = (x.numpy() - values.mean(1)[:, None, None]) / np.sqrt(values.var(1) + 0.5)[:, None, None]
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.running_mean.numpy(), 0.4 * values.mean(1), rtol=1e-5)
    np.testing.assert_allclose(norm.running_var.numpy(), 0.6 + 0.4 * values.var(1, ddof=1), rtol=1e-5)


CHOICES: list[dict[str, Any]] = [
    {"activation": "gelu"},
    {"residual_init": "dirac"},
    {"norm_scale": "frozen", "norm_eps": 1e-3, "norm_momentum": 0.3},
]


def state(options: NetOptions) -> dict[str, tuple[int, ...]]:
    net: Network = build(options, 10)
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("choice", CHOICES)
def test_only_the_whitening_changes_the_state_dict(choice: dict[str, Any]) -> None:
    plain = state(NetOptions(width=2))
    assert state(NetOptions(width=2, **choice)) == plain
    found = state(NetOptions(width=2, whitening=True, **choice))
    assert found == plain | {"whitening.weight": (54, 3, 3, 3), "prep.0.weight": (2, 54, 1, 1)}
    assert asdict(NetOptions())["whitening"] is False
