"""WindowMax and MaxPool against torch's max-pooling and against the definition written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from net.pooling import MaxPool, WindowMax
from net.resnet import CustomResNet

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}


def awkward_images(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """Few values, so that most windows have ties; zeros of both signs, minus infinity and NaN among them."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0, -float("inf"), float("nan")], dtype=dtype)
    which = torch.randint(0, len(values), shape, generator=generator)
    return values[which].to(memory_format=LAYOUTS[layout])


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    """Equal values, zeros of the same sign; a NaN is a NaN (torch's own kernels disagree about its bits)."""
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(9.0), theirs.nan_to_num(9.0))
    assert torch.equal(ours.signbit() & ~ours.isnan(), theirs.signbit() & ~theirs.isnan())


def pool_in_numpy(
    images: NDArray[np.float64], gradient: NDArray[np.float64], size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Maxima of the windows and the gradient to the pixels: the first of equal values, the last of several NaN."""
    maxima, back = np.empty_like(gradient), np.zeros_like(images)
    for n, c, row, column in np.ndindex(*gradient.shape):
        best = (n, c, row * size, column * size)
        for y, x in np.ndindex(size, size):
            pixel = (n, c, row * size + y, column * size + x)
            if images[pixel] > images[best] or np.isnan(images[pixel]):
                best = pixel
        maxima[n, c, row, column] = images[best]
        back[best] += gradient[n, c, row, column]
    return maxima, back


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "sides"), [(2, (32, 32)), (4, (16, 8)), (2, (17, 14)), (3, (10, 11))])
def test_values_gradients_and_strides_are_torchs(
    dtype: torch.dtype, layout: str, size: int, sides: tuple[int, int]
) -> None:
    images = awkward_images((4, 6, *sides), dtype, layout)
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    pooled, expected = WindowMax.apply(ours, size), F.max_pool2d(theirs, size)
    assert_same_bits(pooled, expected)
    assert pooled.stride() == expected.stride()
    gradient = torch.randn_like(expected)
    pooled.backward(gradient)
    expected.backward(gradient)
    assert_same_bits(ours.grad, theirs.grad)
    assert ours.grad.stride() == theirs.grad.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "sides"), [(2, (8, 6)), (2, (5, 7)), (4, (8, 8))])
def test_values_and_gradients_are_those_of_the_definition(layout: str, size: int, sides: tuple[int, int]) -> None:
    images = awkward_images((2, 3, *sides), torch.float64, layout).requires_grad_()
    pooled = WindowMax.apply(images, size)
    gradient = torch.randn(pooled.shape, dtype=torch.float64)
    pooled.backward(gradient)
    maxima, back = pool_in_numpy(images.detach().numpy(), gradient.numpy(), size)
    np.testing.assert_array_equal(pooled.detach().numpy(), maxima)
    np.testing.assert_array_equal(images.grad.numpy(), back)


def test_gradient_of_the_gradient_is_that_of_a_linear_map() -> None:
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: WindowMax.apply(x, 2), [images])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.long, pytest.mark.slow])])
def test_compiled_layer_has_the_gradient_of_torchs_pooling(backend: str) -> None:
    images = torch.randn(4, 3, 16, 16, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    layers = MaxPool(2), MaxPool(4)
    compiled = torch.compile(
        lambda x: layers[0](x.relu()).sum() + layers[1](x.relu()).square().sum(), dynamic=False, backend=backend
    )
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    compiled(ours).backward()
    (F.max_pool2d(theirs.relu(), 2).sum() + F.max_pool2d(theirs.relu(), 4).square().sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_only_the_compiler_sees_it_and_only_where_a_gradient_is_wanted() -> None:
    operators: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        operators[:] = [str(node.target) for node in module.graph.nodes]
        return module

    pool, images = MaxPool(2), torch.randn(2, 3, 8, 8, requires_grad=True)
    expected = F.max_pool2d(images, 2)
    compiled = torch.compile(pool, backend=backend)
    assert torch.equal(compiled(images), expected)
    assert any("autograd_function_apply" in name for name in operators)
    with torch.no_grad():
        assert torch.equal(compiled(images), expected)
    assert operators and not any("autograd_function_apply" in name for name in operators)
    assert "MaxPool2D" in type(pool(images).grad_fn).__name__


def test_state_dict_has_no_key_of_it() -> None:
    assert not MaxPool(2).state_dict()
    assert {key.split(".")[0] for key in CustomResNet(10, 2).state_dict()} == {
        "prep", "layer1", "layer2", "layer3", "classifier"
    }  # fmt: skip


@pytest.mark.parametrize("strict", [False, True])  # without and with the compiler's tracing
def test_exported_network_holds_torchs_pooling(strict: bool) -> None:
    program = torch.export.export(CustomResNet(10, 2), (torch.randn(2, 3, 32, 32),), strict=strict)
    operators = [str(node.target) for node in program.graph.nodes]
    assert sum("max_pool2d" in name for name in operators) == 4
