"""Our ReLU against torch's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from net.activation import ReLU, ReLUOfInput


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_by_the_input_is_torchs(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal / 4
    values = [-2.0, -smallest, -0.0, 0.0, smallest, 2.0, float("inf"), -float("inf"), float("nan")]
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(0, len(values), (4, 6, 8, 8), generator=generator)
    images = torch.tensor(values, dtype=dtype)[which].to(memory_format=torch.channels_last)
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    found, expected = ReLUOfInput.apply(ours), F.relu(theirs)
    gradient = torch.randn(images.shape, generator=generator).to(dtype)
    gradient[0, 0, 0, 0] = float("nan")
    found.backward(gradient)
    expected.backward(gradient)
    assert ours.grad is not None and theirs.grad is not None
    for mine, other in ((found, expected), (ours.grad, theirs.grad)):
        assert mine.dtype == dtype and mine.stride() == other.stride()
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def test_compiled_gradients_of_norm_and_activation_are_torchs() -> None:
    images, results = torch.randn(4, 3, 8, 8), []
    for layer in (ReLU(), torch.nn.ReLU()):
        x = images.clone().requires_grad_()
        norm = torch.nn.BatchNorm2d(3)
        step = torch.compile(lambda x, norm=norm, layer=layer: layer(norm(x)).square().sum(), backend="aot_eager")
        step(x).backward()
        results.append(x.grad)
    assert results[0] is not None and torch.equal(*results)


def test_uncompiled_and_for_export_it_is_torchs_operator() -> None:
    exported = torch.export.export(ReLU(), (torch.randn(2, 3).requires_grad_(),))
    operators = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert operators == ["aten.relu.default"]
    assert type(ReLU()(torch.randn(2, requires_grad=True)).grad_fn).__name__ == "ReluBackward0"
