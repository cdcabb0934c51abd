"""Schedule and parameter groups against torch's own OneCycleLR and a count by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from net.resnet import CustomResNet
from train.optim import OneCycle, make_optimizer, param_groups, set_learning_rate, start_momentum


def torch_one_cycle(lr_max: float, lr_min: float, peak: int, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=lr_max,
        total_steps=total,
        pct_start=(peak + 1) / total,  # torch's first phase ends at pct_start * total - 1
        anneal_strategy="linear",
        cycle_momentum=False,
        div_factor=lr_max / lr_min,
        final_div_factor=1.0,
    )
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(total):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if len(rates) < total:
                schedule.step()
    return rates


@pytest.mark.parametrize(("peak", "total"), [(485, 2328), (1, 10), (8, 10), (50, 97)])
def test_equals_torch_one_cycle_with_linear_slopes_and_no_annihilation(peak: int, total: int) -> None:
    ours = OneCycle(lr_max=0.4, lr_min=0.003, peak_step=peak, total_steps=total)
    assert [ours(step) for step in range(total)] == pytest.approx(torch_one_cycle(0.4, 0.003, peak, total), rel=1e-9)


def test_starts_and_ends_at_lr_min_and_peaks_once() -> None:
    schedule = OneCycle(0.5, 0.01, peak_step=5 * 97, total_steps=24 * 97)
    rates = [schedule(step) for step in range(24 * 97)]
    assert rates[0] == rates[-1] == 0.01
    assert max(rates) == rates[5 * 97] == 0.5
    assert rates.count(0.5) == 1


@given(st.integers(1, 500), st.floats(0, 600), st.floats(1e-5, 1), st.floats(1, 1000))
def test_never_leaves_the_range(total: int, peak: float, low: float, factor: float) -> None:
    schedule = OneCycle(low * factor, low, peak, total)
    for step in range(total):
        assert low * (1 - 1e-12) <= schedule(step) <= low * factor * (1 + 1e-12)


def test_steps_outside_the_schedule_are_refused() -> None:
    schedule = OneCycle(0.4, 0.01, 2, 5)
    for step in (-1, 5):
        with pytest.raises(ValueError, match="of a schedule of 5 steps"):
            schedule(step)


def test_norms_and_biases_have_their_own_group() -> None:
    net = CustomResNet(10, 4)
    kernels, vectors = param_groups(net, 5e-4, 0.0)
    assert kernels["weight_decay"] == 5e-4 and vectors["weight_decay"] == 0.0
    assert len(kernels["params"]) == 8 + 1 and len(vectors["params"]) == 2 * 8 + 1
    assert {id(p) for p in net.parameters()} == {id(p) for g in (kernels, vectors) for p in g["params"]}
    named = dict(net.named_parameters())
    assert all(
        "weight" in name and named[name].ndim >= 2 for name in named if any(named[name] is p for p in kernels["params"])
    )


def test_a_first_step_that_overflows_leaves_no_trace_in_the_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel skips such a step; the momentum that it would have made then it must not read in the next one."""
    weight = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9, nesterov=True, fused=True)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: torch.full_like(tensor, float("nan"), **options))
    start_momentum(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for gradient in (float("inf"), 1.0):
        scaler.scale(torch.zeros(()))  # as a step of training begins
        weight.grad = torch.full_like(weight, gradient * scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(weight.detach(), torch.full((3, 3), 1 - 0.5 * 1.9))


def test_weight_decay_reaches_the_kernels_only() -> None:
    net = CustomResNet(10, 2)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = make_optimizer(
        net, momentum=0.0, nesterov=False, weight_decay=0.1, norm_bias_weight_decay=0.0, device=torch.device("cpu")
    )
    set_learning_rate(optimizer, 0.5)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim > 1 else 1.0))
