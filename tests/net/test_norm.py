"""Batch norm's counters: off the step, and in the state dict what torch would have counted."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from net.norm import BatchNorm
from net.resnet import CustomResNet
from train.step.steps import TrainStep


def with_torchs_norm(net: nn.Module) -> nn.Module:
    """A copy whose batch norms are torch's, with the same parameters and statistics."""
    copied = copy.deepcopy(net)
    for part in [part for part in copied.modules() if not isinstance(part, BatchNorm)]:
        for name, norm in part.named_children():
            if isinstance(norm, BatchNorm):
                theirs = nn.BatchNorm2d(norm.num_features)
                theirs.load_state_dict(norm.state_dict())
                setattr(part, name, theirs)
    return copied


def tensors_of(net: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers themselves, which no hook has written into."""
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def train(net: nn.Module, steps: int) -> None:
    """Plain SGD on noise."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        images = torch.randn(4, 3, 32, 32, generator=generator)
        net(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_training_leaves_the_state_dict_of_a_training_with_torchs_layer() -> None:
    net = CustomResNet(10, 2)
    theirs = with_torchs_norm(net)
    train(net, 3)
    net.steps += 3
    train(theirs, 3)
    ours, expected = net.state_dict(), tensors_of(theirs)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value) and ours[name].dtype == value.dtype, name
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(net.eval()(images), theirs.eval()(images))


def test_a_state_that_torchs_layer_counted_is_loaded_and_goes_on() -> None:
    theirs = with_torchs_norm(CustomResNet(10, 2))
    train(theirs, 2)
    state = {name: value.detach().clone() for name, value in tensors_of(theirs).items()}
    net = CustomResNet(10, 2)
    net.load_state_dict(state)
    assert net.steps == 2
    again = net.state_dict()
    assert all(torch.equal(again[name], value) for name, value in state.items())
    net.steps += 5
    assert net.state_dict()["layer3.1.branch.0.1.num_batches_tracked"] == 7


def test_a_step_writes_no_counter() -> None:
    for net, written in ((CustomResNet(10, 2), 0), (with_torchs_norm(CustomResNet(10, 2)), 1)):
        counters = [buffer for name, buffer in net.named_buffers() if name.endswith("num_batches_tracked")]
        before = [counter._version for counter in counters]
        train(net, 1)
        assert [counter._version - version for counter, version in zip(counters, before, strict=True)] == [written] * 8


def test_a_copy_counts_for_itself() -> None:
    net = CustomResNet(10, 2)
    net.steps = 3
    copied = copy.deepcopy(net)
    copied.steps = 8
    assert copied.state_dict()["prep.1.num_batches_tracked"] == 8
    assert net.state_dict()["prep.1.num_batches_tracked"] == 3


def test_counting_steps_compiles_nothing_anew() -> None:
    torch._dynamo.reset()
    net = CustomResNet(10, 2)
    step = torch.compile(TrainStep(net, (0.5,) * 3, (0.25,) * 3), backend="eager", dynamic=False)
    images, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    step(images, labels)
    with torch.compiler.set_stance("fail_on_recompile"):
        net.steps += 1
        step(images, labels)
        net.state_dict()
        step(images, labels)


def test_images_of_the_wrong_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        BatchNorm(3)(torch.zeros(2, 3))
