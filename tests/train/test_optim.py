"""The schedule against torch's own OneCycleLR; groups and steps of the optimizers against a count and a formula by hand."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from training import assert_same

from net.resnet import CustomResNet
from train.options import OptimOptions, ScheduleOptions
from train.step import optim
from train.step.decoupled import DecoupledSGD
from train.step.optim import Optimizers, ParameterGroup, parameter_groups
from train.step.schedule import OneCycle, Rates, Trapezoid, make_schedule


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


def test_a_schedule_is_laid_over_whole_epochs() -> None:
    rates, between = Rates(0.4, 0.01), (0.4, 0.01, 5 * 97, 24 * 97)
    assert make_schedule(ScheduleOptions(peak_epoch=5.0), rates, 24, 97) == OneCycle(*between)
    triangle = ScheduleOptions(peak_epoch=5.0, shape="triangle")
    assert make_schedule(triangle, rates, 24, 97) == Trapezoid(*between, hold_steps=0)
    trapezoid = ScheduleOptions(peak_epoch=5.0, shape="trapezoid", hold_epochs=7.5)
    assert make_schedule(trapezoid, rates, 24, 97) == Trapezoid(*between, hold_steps=7.5 * 97)


@pytest.mark.parametrize(
    ("peak", "hold", "total"), [(20, 0, 100), (20, 30, 100), (1.5, 3.25, 11), (100, 0, 100), (40, 60, 100)]
)
def test_a_trapezoid_interpolates_between_its_corners(peak: float, hold: float, total: int) -> None:
    schedule = Trapezoid(0.4, 0.1, peak, total, hold_steps=hold)
    last = min(peak, total - 1)
    corners = sorted({(0.0, 0.1), (last, 0.4), (peak + hold, 0.4), (float(total), 0.0 if peak + hold < total else 0.4)})
    places, values = zip(*corners, strict=True)
    expected = np.interp(np.arange(total), places, values)
    np.testing.assert_allclose([schedule(step) for step in range(total)], expected, rtol=1e-12)
    for step in (-1, total):
        with pytest.raises(ValueError, match=f"of a schedule of {total} steps"):
            schedule(step)


CPU = torch.device("cpu")
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def test_norms_and_biases_have_their_own_group() -> None:
    net = CustomResNet(10, 4)
    kernels, vectors = parameter_groups(net, OptimOptions(weight_decay=5e-4, norm_bias_weight_decay=0.0))
    assert kernels.weight_decay == 5e-4 and vectors.weight_decay == 0.0
    assert len(kernels.parameters) == 8 + 1 and len(vectors.parameters) == 2 * 8 + 1
    assert {id(p) for p in net.parameters()} == {id(p) for g in (kernels, vectors) for p in g.parameters}
    named = dict(net.named_parameters())
    assert all(
        "weight" in name and named[name].ndim >= 2
        for name in named
        if any(named[name] is p for p in kernels.parameters)
    )


def test_a_first_step_that_overflows_leaves_no_trace_in_the_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel skips such a step; the momentum that it would have made then it must not read in the next one."""
    monkeypatch.setitem(
        optim.KINDS,
        "fused",
        lambda groups, options, device: torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, fused=True),
    )
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: torch.full_like(tensor, float("nan"), **options))
    weight = nn.Parameter(torch.ones(3, 3))
    optimizers = Optimizers([ParameterGroup("all", (weight,), 0.0, "fused")], OptimOptions(), CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizers.set_rate(0.5)
    for gradient in (float("inf"), 1.0):
        scaler.scale(torch.zeros(()))  # as a step of training begins
        weight.grad = torch.full_like(weight, gradient * scaler.get_scale())
        optimizers.step(scaler)
        scaler.update()
    torch.testing.assert_close(weight.detach(), torch.full((3, 3), 1 - 0.5 * 1.9))


def test_weight_decay_reaches_the_kernels_only() -> None:
    net = CustomResNet(10, 2)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    options = OptimOptions(momentum=0.0, nesterov=False, weight_decay=0.1, norm_bias_weight_decay=0.0)
    optimizers = Optimizers(parameter_groups(net, options), options, CPU)
    optimizers.set_rate(0.5)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizers.step(NO_SCALER)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim > 1 else 1.0))


def two_groups(options: OptimOptions, kinds: tuple[str, str] = ("sgd", "sgd")) -> tuple[Optimizers, list[nn.Parameter]]:
    """Two weights of one, the second at twice the rate."""
    weights = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
    groups = [
        ParameterGroup("slow", (weights[0],), 0.0, kinds[0]),
        ParameterGroup("fast", (weights[1],), 0.0, kinds[1], rate_factor=2.0),
    ]
    return Optimizers(groups, options, CPU), weights


def take_steps(optimizers: Optimizers, weights: list[nn.Parameter], rates: list[float], gradient: float = 3.0) -> None:
    for rate in rates:
        for weight in weights:
            weight.grad = torch.full_like(weight, gradient)
        optimizers.set_rate(rate)
        optimizers.step(NO_SCALER)
        optimizers.look_ahead()
        optimizers.zero_grad()


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_group_at_twice_the_rate_goes_twice_as_far(nesterov: bool) -> None:
    """The momentum of a constant gradient g after step n is g (1 - m^n) / (1 - m); Nesterov's form steps along g plus m
    times that."""
    momentum, gradient, rates = 0.8, 3.0, [0.01, 0.02, 0.005, 0.005]
    optimizers, weights = two_groups(OptimOptions(momentum=momentum, nesterov=nesterov))
    take_steps(optimizers, weights, rates, gradient)
    way = 0.0
    for n, rate in enumerate(rates, 1):
        velocity = gradient * (1 - momentum**n) / (1 - momentum)
        way += rate * (gradient + momentum * velocity if nesterov else velocity)
    for weight, factor in zip(weights, (1, 2), strict=True):
        torch.testing.assert_close(weight.detach(), torch.full((2,), 1 - factor * way, dtype=torch.float64))
        assert weight.grad is None


def test_groups_of_two_kinds_are_trained_each_by_its_own_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(optim.KINDS, "sign", lambda groups, options, device: torch.optim.Adam(groups, lr=0.0, eps=0.0))
    optimizers, weights = two_groups(OptimOptions(momentum=0.0, nesterov=False), ("sgd", "sign"))
    assert list(optimizers.by_kind) == ["sgd", "sign"]
    take_steps(optimizers, weights, [0.1], gradient=3.0)
    torch.testing.assert_close(weights[0].detach(), torch.full((2,), 1 - 0.1 * 3.0, dtype=torch.float64))
    # the first step of Adam is the rate times the sign of the gradient
    torch.testing.assert_close(weights[1].detach(), torch.full((2,), 1 - 2 * 0.1, dtype=torch.float64))


def test_optimizers_go_on_from_their_state_to_the_same_bits() -> None:
    options = OptimOptions(momentum=0.9)
    straight, expected = two_groups(options)
    take_steps(straight, expected, [0.1, 0.2, 0.3])
    first, weights = two_groups(options)
    take_steps(first, weights, [0.1, 0.2])
    second, resumed = two_groups(options)
    with torch.no_grad():
        for new, old in zip(resumed, weights, strict=True):
            new.copy_(old)
    second.load_state_dict(first.state_dict())
    assert_same(second.state_dict(), first.state_dict())
    take_steps(second, resumed, [0.3])
    assert_same([w.detach() for w in resumed], [w.detach() for w in expected])


def test_the_state_of_another_kind_of_optimizer_is_refused() -> None:
    optimizers, _ = two_groups(OptimOptions())
    before = optimizers.state_dict()
    for state in ({**before, "adam": {}}, {"adam": before["sgd"]}, {}):
        with pytest.raises(ValueError, match="in the state, sgd here"):
            optimizers.load_state_dict(state)
    assert_same(optimizers.state_dict(), before)


def test_optimizers_that_start_over_are_as_new_ones() -> None:
    options = OptimOptions(momentum=0.9)
    optimizers, weights = two_groups(options)
    take_steps(optimizers, weights, [0.1, 0.2])
    optimizers.start_over()
    assert_same(optimizers.state_dict(), two_groups(options)[0].state_dict())


def test_decoupled_decay_scales_by_the_rate_and_stays_out_of_the_momentum() -> None:
    momentum, decay = 0.8, 0.1
    options = OptimOptions(momentum=momentum, nesterov=False, decoupled_weight_decay=True)
    weight = nn.Parameter(torch.full((2,), 2.0, dtype=torch.float64))
    optimizers = Optimizers([ParameterGroup("all", (weight,), decay, rate_factor=2.0)], options, CPU)
    expected = 2.0
    for n, rate in enumerate((0.1, 0.2, 0.05), 1):
        take_steps(optimizers, [weight], [rate], gradient=3.0)
        velocity = 3.0 * (1 - momentum**n) / (1 - momentum)
        expected = expected * (1 - 2 * rate * decay) - 2 * rate * velocity
    torch.testing.assert_close(weight.detach(), torch.full((2,), expected, dtype=torch.float64))


@pytest.mark.parametrize("fused", [False, True])
def test_a_decoupled_step_that_overflows_does_not_decay_either(fused: bool) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = DecoupledSGD([{"params": [weight], "weight_decay": 0.1}], lr=0.5, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for gradient, after in ((float("inf"), 1.0), (1.0, 0.95 - 0.5)):
        scaler.scale(torch.zeros(()))
        weight.grad = torch.full_like(weight, gradient * scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(weight.detach(), torch.full((3,), after))


def test_lookahead_goes_a_part_of_the_way_every_few_steps() -> None:
    options = OptimOptions(momentum=0.0, nesterov=False, lookahead_every=3, lookahead_part=0.25)
    optimizers, weights = two_groups(options)
    fast, slow = [1.0, 1.0], [1.0, 1.0]
    for n in range(1, 9):
        take_steps(optimizers, weights, [0.1], gradient=3.0)
        fast = [fast[0] - 0.3, fast[1] - 0.6]
        if n % 3 == 0:
            fast = slow = [s + 0.25 * (f - s) for s, f in zip(slow, fast, strict=True)]
        for weight, value in zip(weights, fast, strict=True):
            torch.testing.assert_close(weight.detach(), torch.full((2,), value, dtype=torch.float64))


def test_norm_biases_have_their_own_rate_where_the_recipe_says_so() -> None:
    net = CustomResNet(10, 2)
    options = OptimOptions(norm_bias_rate=64.0, norm_bias_weight_decay=0.25)
    optimizers = Optimizers(parameter_groups(net, options), options, CPU)
    optimizers.set_rate(0.5)
    found = {id(p): g["lr"] for g in optimizers.by_kind["sgd"].param_groups for p in g["params"]}
    norms = {f"{name}.bias" for name, part in net.named_modules() if isinstance(part, nn.BatchNorm2d)}
    assert len(norms) == 8
    assert {name: found[id(p)] for name, p in net.named_parameters()} == {
        name: 32.0 if name in norms else 0.5 for name, _ in net.named_parameters()
    }
    assert [group["weight_decay"] for group in optimizers.by_kind["sgd"].param_groups] == [5e-4, 0.25, 0.25]


@pytest.mark.parametrize(
    "options", [OptimOptions(), OptimOptions(filters="muon"), OptimOptions(decoupled_weight_decay=True)]
)
def test_momentum_buffers_keep_their_memory_and_a_rate_on_the_device_counts_as_a_number(options: OptimOptions) -> None:
    """A captured step reads the rate on the device, and writes to the buffers that it was captured with."""
    torch.manual_seed(0)
    net = CustomResNet(10, 2)
    copies = [copy.deepcopy(net) for _ in range(2)]
    number, scalar = (Optimizers(parameter_groups(n, options, lr_max=0.4), options, CPU) for n in copies)
    gradients = [torch.randn_like(p) for p in net.parameters()]

    def step(optimizers: Optimizers, net: CustomResNet, rate: float | torch.Tensor) -> None:
        for p, gradient in zip(net.parameters(), gradients, strict=True):
            p.grad = gradient.clone()
        optimizers.set_rate(rate)
        optimizers.step(NO_SCALER)

    def buffers() -> list[torch.Tensor]:
        return [of["momentum_buffer"] for kind in scalar.by_kind.values() for of in kind.state.values()]

    places = [buffer.data_ptr() for buffer in buffers()]
    for rate in (0.1, 0.3):
        step(number, copies[0], rate)
        step(scalar, copies[1], torch.tensor(rate))
    for p, theirs in zip(copies[0].parameters(), copies[1].parameters(), strict=True):
        torch.testing.assert_close(theirs, p)
    assert all(buffer.any() for buffer in buffers())
    scalar.load_state_dict(copy.deepcopy(number.state_dict()))
    assert [buffer.data_ptr() for buffer in buffers()] == places
    scalar.start_over()
    assert [buffer.data_ptr() for buffer in buffers()] == places and not any(buffer.any() for buffer in buffers())
