"""CustomResNet against its closed form, published figures and a functional re-statement of the assignment."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from net.resnet import CustomResNet, parameter_count


def test_ten_class_network_has_6573130_parameters() -> None:
    assert sum(p.numel() for p in CustomResNet().parameters()) == 6_573_130


@pytest.mark.parametrize(("classes", "width"), [(10, 64), (10, 16), (100, 64), (2, 1), (17, 3)])
def test_closed_form_counts_the_parameters(classes: int, width: int) -> None:
    assert parameter_count(classes, width) == sum(p.numel() for p in CustomResNet(classes, width).parameters())


def test_multiply_adds_equal_those_counted_in_a_forward_pass() -> None:
    counted = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal counted
        if isinstance(module, torch.nn.Conv2d):
            counted += output.numel() * module.in_channels * 9
        elif isinstance(module, torch.nn.Linear):
            counted += output.numel() * module.in_features

    net = CustomResNet().eval()
    for module in net.modules():
        module.register_forward_hook(count)
    net(torch.zeros(1, 3, 32, 32))
    assert counted == net.multiply_adds(32, 32) == 379_261_952


def test_forward_is_the_assignment_written_out_in_functions() -> None:
    torch.manual_seed(0)
    net = CustomResNet(10, 4, logit_scale=1).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    state = iter(net.state_dict().values())

    def conv(x: torch.Tensor, pool: bool = False) -> torch.Tensor:
        x = F.conv2d(x, next(state), stride=1, padding=1)
        x = F.max_pool2d(x, 2) if pool else x
        weight, bias, mean, variance, _ = (next(state) for _ in range(5))
        return F.relu(F.batch_norm(x, mean, variance, weight, bias))

    images = torch.randn(5, 3, 32, 32)
    x = conv(images)
    x = conv(x, pool=True)
    x = x + conv(conv(x))
    x = conv(x, pool=True)
    x = conv(x, pool=True)
    x = x + conv(conv(x))
    expected = F.linear(F.max_pool2d(x, 4).flatten(1), next(state), next(state))
    with torch.no_grad():
        torch.testing.assert_close(net(images), expected)


def test_logit_scale_multiplies_the_logits() -> None:
    plain, scaled, default = (CustomResNet(10, 4, logit_scale=scale).eval() for scale in (1, 0.125, None))
    scaled.load_state_dict(plain.state_dict())
    default.load_state_dict(plain.state_dict())
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(scaled(images), plain(images) / 8)
        assert torch.equal(default(images), plain(images) / 2)
    assert CustomResNet(10, 64).logit_scale == 1 / 8


def test_larger_images_give_one_row_of_logits_each() -> None:
    assert CustomResNet(7, 2)(torch.zeros(3, 3, 64, 64)).shape == (3, 7)


@pytest.mark.parametrize("arguments", [(0, 64), (10, 0), (10, 64, 0.0), (10, 64, float("nan"))])
def test_impossible_sizes_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|must be positive"):
        CustomResNet(*arguments)
