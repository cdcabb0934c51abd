"""Statistics, turns, chunks: how the benchmarks time."""

from __future__ import annotations

import math
import statistics
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.machine import crowded, machine_facts
from benchmarks.measure import (
    CannotMeasure,
    Rate,
    Stage,
    device_peak_gib,
    interleave,
    matrix_stage,
    mean_and_interval,
)

positive = st.floats(1e-3, 1e9)


@given(st.lists(positive, min_size=2, max_size=30))
def test_median_and_spread_are_the_quartiles_of_the_standard_library(samples: list[float]) -> None:
    rate = Rate(tuple(samples))
    first, middle, third = statistics.quantiles(samples, n=4, method="inclusive")
    assert rate.median == pytest.approx(middle)
    assert rate.spread == pytest.approx(third - first, abs=1e-6)
    record = rate.record()
    assert record["samples"] == pytest.approx(samples, rel=1e-4) and record["repeats"] == len(samples)
    assert (record["median"], record["spread"]) == (rate.median, rate.spread)


def test_ratio_pairs_the_samples_of_a_round() -> None:
    # the machine gets three times slower: the medians say 1, every pair says 2
    assert Rate((20.0, 10.0, 6.0)).over(Rate((10.0, 5.0, 3.0))) == 2
    assert Rate((2.0, 9.0, 4.0)).over(Rate((1.0, 1.0, 2.0))) == 2
    with pytest.raises(ValueError, match="3 samples do not pair with 2"):
        Rate((1.0, 2.0, 3.0)).over(Rate((1.0, 2.0)))


def test_one_sample_has_no_spread() -> None:
    assert (Rate((3.0,)).median, Rate((3.0,)).spread) == (3.0, 0.0)


# Student's t in closed form: tan(0.95 pi / 2) for one degree of freedom, 0.95 sqrt(2 / (1 - 0.95**2)) for two; 2.776 is the
# tables' for four
STUDENT_T = [
    ([93.8, 94.1], math.tan(0.95 * math.pi / 2)),
    ([93.8, 94.1, 94.02], 0.95 * math.sqrt(2 / (1 - 0.95**2))),
    ([93.8, 94.1, 94.02, 93.95, 94.3], 2.7764451),
]


@pytest.mark.parametrize(("values", "t"), STUDENT_T)
def test_interval_is_students(values: list[float], t: float) -> None:
    mean, deviation, half_width = mean_and_interval(values)
    assert mean == pytest.approx(np.mean(values))
    assert deviation == pytest.approx(np.std(values, ddof=1))
    assert half_width == pytest.approx(t * np.std(values, ddof=1) / math.sqrt(len(values)), rel=1e-7)


def test_one_value_has_no_interval() -> None:
    assert mean_and_interval([94.0]) == (94.0, None, None)


class Scripted:
    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def warm_up(self) -> None:
        self.order.append(f"warm {self.name}")

    def sample(self) -> float:
        self.order.append(self.name)
        return float(len(self.order))


def test_stages_take_turns_and_every_other_round_runs_backwards() -> None:
    order: list[str] = []
    rates = interleave([Scripted("a", order), Scripted("b", order)], 3)
    assert order == ["warm a", "warm b", "a", "b", "b", "a", "a", "b"]
    assert rates["a"].samples == (3.0, 6.0, 7.0) and rates["b"].samples == (4.0, 5.0, 8.0)
    with pytest.raises(ValueError, match="different names"):
        interleave([Scripted("a", order), Scripted("a", order)], 1)


class Failing(Scripted):
    def sample(self) -> float:
        if self.order.count(self.name) == 1:
            raise CannotMeasure("no answer")
        return super().sample()


def test_a_stage_that_fails_leaves_and_the_others_go_on_in_pairs() -> None:
    order: list[str] = []
    gone: dict[str, str] = {}
    stages = [Scripted("a", order), Failing("b", order), Scripted("c", order)]
    rates = interleave(stages, 3, gone.__setitem__)
    assert order == ["warm a", "warm b", "warm c", "a", "b", "c", "c", "a", "a", "c"]
    assert gone == {"b": "no answer"} and rates.keys() == {"a", "c"}
    assert rates["a"].over(rates["c"]) > 0
    with pytest.raises(CannotMeasure):
        interleave([Failing("b", [])], 2)


def test_peak_of_device_memory_is_torchs_and_none_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    assert device_peak_gib(torch.device("cuda")) == 1.5
    assert device_peak_gib(torch.device("cpu")) is None


@pytest.mark.parametrize(("seconds", "epoch", "steps"), [(1.0, 1, 20), (1.0, 7, 21), (1.0, 97, 20), (4.0, 97, 97)])
def test_a_chunk_lasts_as_asked_in_whole_epochs_where_that_is_not_much_more(
    monkeypatch: pytest.MonkeyPatch, seconds: float, epoch: int, steps: int
) -> None:
    clock = [0.0]

    def run(count: int) -> float:
        clock[0] += 0.05 * count
        return 512.0 * count

    monkeypatch.setattr("benchmarks.measure.time.perf_counter", lambda: clock[0])
    stage = Stage("s", run, torch.device("cpu"), seconds, epoch)
    stage.warm_up()
    assert abs(stage.steps - steps) <= (epoch == 1)  # of rounding
    assert stage.sample() == pytest.approx(512 / 0.05)


def test_matrix_stage_counts_two_operations_a_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: calls.append((*a.shape, *b.shape)))
    operations = matrix_stage(torch.device("cpu"), "fp32", 1.0).run(3)
    assert operations == sum(2 * rows * inner * columns for rows, inner, _, columns in calls) and len(calls) == 3


@pytest.mark.parametrize(("free", "reserved", "taken"), [(70, 9.5, None), (60, 9.5, 10.5), (77.5, 1.5, None)])
def test_memory_of_other_programs_on_the_gpu_is_warned_of(
    free: float, reserved: float, taken: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 80 GiB, less what this process has reserved; half a GiB is its own context."""
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=80 * gib)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved * gib)
    warning = crowded(machine_facts(torch.device("cuda")))
    assert (warning is None) == (taken is None)
    assert warning is None or f"{taken} GiB" in warning
    assert crowded(machine_facts(torch.device("cpu"))) is None
