"""Muon against NumPy's decomposition in float64, and its steps against formulas by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from net.resnet import CustomResNet
from train.config import Config, ConfigError, changed
from train.options import OptimOptions
from train.step.muon import Muon, orthogonalised
from train.step.optim import Optimizers, parameter_groups

CPU = torch.device("cpu")
SHAPES = [(3, 8, 72), (1, 24, 6), (2, 5, 5), (1, 1, 9)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_decomposition(matrix: np.ndarray) -> np.ndarray:
    """The singular vectors of NumPy, and the singular values after five rounds of the polynomial."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.sqrt((matrix**2).sum())
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_keeps_the_singular_vectors_and_maps_the_values(shape: tuple[int, int, int]) -> None:
    matrices = random(*shape)
    expected = np.stack([by_decomposition(matrix) for matrix in matrices.numpy()])
    np.testing.assert_allclose(orthogonalised(matrices, torch.float64).numpy(), expected, atol=1e-12)
    single = orthogonalised(matrices.float())
    assert single.dtype == torch.bfloat16
    # eight bits of mantissa through five rounds, relative to the norm of the whole
    error = np.linalg.norm(single.double().numpy() - expected, axis=(1, 2))
    assert (error < 0.03 * np.linalg.norm(expected, axis=(1, 2))).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_singular_values_that_are_not_tiny_come_close_to_one(dtype: torch.dtype) -> None:
    values = np.geomspace(0.01, 1, 12)
    left, right = (np.linalg.qr(random(12, 12, seed=seed).numpy())[0] for seed in (1, 2))
    found = orthogonalised(torch.from_numpy((left * values) @ right.T)[None], dtype)[0].double().numpy()
    assert (np.abs(np.linalg.svd(found, compute_uv=False) - 1) < 0.35).all()


def test_the_order_of_magnitude_of_a_gradient_does_not_matter_and_zeros_stay_zeros() -> None:
    matrices = random(2, 6, 27)
    torch.testing.assert_close(orthogonalised(matrices * 1e-8), orthogonalised(matrices), rtol=0.05, atol=0.01)
    assert torch.equal(orthogonalised(torch.zeros(1, 4, 9)), torch.zeros(1, 4, 9, dtype=torch.bfloat16))


def filters_and_gradients(steps: int) -> tuple[list[nn.Parameter], list[list[Tensor]]]:
    shapes = [(4, 3, 3, 3), (8, 4, 3, 3), (8, 4, 3, 3), (40, 4, 1, 1)]
    filters = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
    return filters, [
        [random(*p.shape, seed=10 * step + i) for i, p in enumerate(filters)] for step in range(1, 1 + steps)
    ]


@pytest.mark.parametrize("rescale", [False, True])
def test_steps_follow_nesterov_momentum_along_the_orthogonalised_direction(rescale: bool) -> None:
    filters, gradients = filters_and_gradients(3)
    weights = [p.detach().numpy().copy() for p in filters]
    momenta = [np.zeros_like(w) for w in weights]
    muon = Muon([{"params": filters}], momentum=0.6, rescale=rescale)
    for rate, of_step in zip((0.1, 0.2, 0.05), gradients, strict=True):
        muon.param_groups[0]["lr"] = rate
        for p, gradient in zip(filters, of_step, strict=True):
            p.grad = gradient.contiguous(memory_format=torch.channels_last)
        muon.step()
        for i, gradient in enumerate(of_step):
            momenta[i] = 0.6 * momenta[i] + gradient.numpy()
            direction = gradient.numpy() + 0.6 * momenta[i]
            out = len(direction)
            if rescale:
                weights[i] *= np.sqrt(out) / np.linalg.norm(weights[i])
            weights[i] -= rate * by_decomposition(direction.reshape(out, -1)).reshape(direction.shape)
    for p, expected in zip(filters, weights, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), expected, atol=0.01)  # bf16 rounds the direction


def test_filters_of_zeros_take_the_step_alone() -> None:
    filter = nn.Parameter(torch.zeros(4, 3, 3, 3))
    muon = Muon([{"params": [filter], "lr": 0.1}], momentum=0.6, rescale=True)
    filter.grad = random(4, 3, 3, 3).float()
    muon.step()
    expected = -0.1 * by_decomposition(filter.grad.double().numpy().reshape(4, -1)).reshape(filter.shape)
    np.testing.assert_allclose(filter.detach().numpy(), expected, atol=0.003)


def test_a_step_whose_gradients_overflow_changes_nothing_and_the_next_one_is_unscaled() -> None:
    filters, gradients = filters_and_gradients(1)
    twins = [nn.Parameter(p.detach().clone()) for p in filters]
    muon, plain = (Muon([{"params": ps, "lr": 0.1}], momentum=0.6, rescale=True) for ps in (filters, twins))
    before = [p.detach().clone() for p in filters]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    for factor in (float("inf"), 1.0):
        scaler.scale(torch.zeros(()))
        for p, gradient in zip(filters, gradients[0], strict=True):
            p.grad = gradient * factor * scaler.get_scale()
        scaler.step(muon)
        scaler.update()
        if factor != 1.0:
            assert all(torch.equal(p, old) for p, old in zip(filters, before, strict=True))
            assert not any(muon.state[p]["momentum_buffer"].any() for p in filters)
    for p, gradient in zip(twins, gradients[0], strict=True):
        p.grad = gradient
    plain.step()
    assert all(torch.equal(p, twin) for p, twin in zip(filters, twins, strict=True))


def test_muon_trains_the_filters_at_its_own_peak_rate_and_sgd_the_rest() -> None:
    net = CustomResNet(10, 2)
    options = OptimOptions(filters="muon", muon_lr=0.3)
    optimizers = Optimizers(parameter_groups(net, options, lr_max=0.4), options, CPU)
    filters = {name for name, p in net.named_parameters() if p.ndim == 4}
    muon, sgd = optimizers.by_kind["muon"], optimizers.by_kind["sgd"]
    assert {id(p) for p in muon.param_groups[0]["params"]} == {id(p) for n, p in net.named_parameters() if n in filters}
    assert len(filters) == 8 and sum(len(group["params"]) for group in sgd.param_groups) == 2 * 8 + 2
    for rate, of_muon in ((0.4, 0.3), (0.1, 0.075)):
        optimizers.set_rate(rate)
        assert muon.param_groups[0]["lr"] == pytest.approx(of_muon, rel=1e-12)
        assert sgd.param_groups[0]["lr"] == rate


@pytest.mark.parametrize("rates", [{"schedule.lr_max": "find"}, {"schedule.lr_min": "find"}])
def test_muon_beside_a_range_test_is_refused_with_the_keys_to_set(rates: dict[str, str]) -> None:
    given = {"optim.filters": "muon", "schedule.lr_max": 0.4, "schedule.lr_min": 0.01}
    changed(Config(), given)
    with pytest.raises(ConfigError, match=r"optim\.filters: muon needs schedule\.lr_max and schedule\.lr_min"):
        changed(Config(), {**given, **rates})
