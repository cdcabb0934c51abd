"""train.compile=auto on a CPU: compiles where that pays for the steps left, by what was seen here, and stays with it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training import Lines, assert_equal_weights, assert_same, make_trainer, weights

from train.compiling import Choice
from train.config import Config, changed
from train.disk.checkpoint import load_checkpoint
from train.machine import weighing
from train.machine.runtime import RuntimeUnavailable, prepare
from train.machine.weighing import CompileHistory, default_gain, weigh, weigh_by_arithmetic
from train.run import find_rates_only, fit
from train.session import Session
from train.step.trainer import Trainer

# --- the sum


@pytest.mark.parametrize("step", [0.001, 0.4, 12.0])
@pytest.mark.parametrize("compiling", [0.5, 54.0])
@pytest.mark.parametrize("gain", [1.05, 1.37, 4.0])
def test_compiling_pays_from_the_step_on_that_has_saved_its_time(step: float, compiling: float, gain: float) -> None:
    even = compiling / (step - step / gain)  # every step saves the difference
    assert not weigh(step, math.floor(even * 0.999), compiling, gain)
    assert weigh(step, math.ceil(even * 1.001), compiling, gain)


@pytest.mark.parametrize("gain", [0.84, 1.0])
def test_what_gains_nothing_never_pays(gain: float) -> None:
    assert not weigh(1.0, 10**9, 0.0, gain)


def test_the_fixed_rule_is_the_same_sum_of_steps_times_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    even = 54.0 * 50e9 / (1 - 1 / 1.37)  # floating-point operations in all
    for step_flops in (1e9, 4e12):
        assert not weigh_by_arithmetic(step_flops, math.floor(even / step_flops * 0.999)).pays
        assert weigh_by_arithmetic(step_flops, math.ceil(even / step_flops * 1.001)).pays


# --- the history


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompileHistory:
    """An empty one where a run finds it, beside an empty cache of the compiler's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    return CompileHistory()


def test_what_was_seen_counts_the_shortest_compilation_and_the_median_gain(history: CompileHistory) -> None:
    assert history.compile_seconds("a").value == weighing.COLD_SECONDS
    assert history.gain("a").value == default_gain()
    for seconds, gain in ((70.0, 1.2), (50.0, 1.6), (60.0, 1.3)):
        history.add("a", seconds, warm=False, gain=gain)
    again = CompileHistory()
    assert again.compile_seconds("b").value == 50.0 and "seen here" in again.compile_seconds("b").source
    assert again.gain("a").value == 1.3
    assert again.gain("b").value == 1.3, "the best guess for another graph"
    history.add("b", 55.0, warm=False, gain=0.5)
    assert again.gain("b").value == 0.5 and again.gain("c").value == pytest.approx((0.5 + 1.3) / 2)


def test_a_graph_is_warm_where_the_cache_that_it_was_compiled_into_is_still_there(
    history: CompileHistory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history.add("a", 40.0, warm=False)
    history.add("b", 3.0, warm=True)
    assert history.compile_seconds("a").value == 40.0, "the folder is not there"
    (tmp_path / "compiled").mkdir()
    assert history.compile_seconds("a").value == 3.0
    assert history.compile_seconds("c").value == 40.0, "never compiled"
    (tmp_path / "another").mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "another"))
    assert history.compile_seconds("a").value == 40.0


def test_the_cache_is_where_torchs_compiler_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor.runtime.runtime_utils import cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert weighing.compiler_cache() == Path(cache_dir())
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert weighing.compiler_cache() == Path(cache_dir())
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch sets it


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[1, 2]",
        b'{"MACHINE": 3}',
        b'{"MACHINE": {"cold": "54", "warm": [null, -1, 0, NaN, "x"], "graphs": [1]}}',
        b'{"MACHINE": {"cold": {}, "graphs": {"a": {"gain": 2, "cache": 4}, "b": 5}}}',
        b'{"MACHINE": {"cold": [1' + b"0" * 400 + b"]}}",
        b"[" * 100_000,
    ],
)
def test_a_history_that_cannot_be_read_counts_as_empty(history: CompileHistory, content: bytes) -> None:
    history.path.parent.mkdir(parents=True)
    history.path.write_bytes(content.replace(b"MACHINE", history.machine.encode()))
    assert history.compile_seconds("a").value == weighing.COLD_SECONDS and history.gain("a").value == default_gain()
    history.add("a", 30.0, warm=False, gain=2.0)
    assert history.compile_seconds("b").value == 30.0 and history.gain("a").value == 2.0
    assert [path.name for path in history.path.parent.iterdir()] == ["compile.json"]


def test_other_machines_stay_in_the_history_and_say_nothing_of_this_one(history: CompileHistory) -> None:
    history.path.parent.mkdir(parents=True)
    other = {"torch 2.8.0, another CPU, 64 threads": {"cold": [1.0], "graphs": {"a": {"gain": [9.0]}}}}
    history.path.write_text(json.dumps(other))
    assert history.compile_seconds("a").value == weighing.COLD_SECONDS and history.gain("a").value == default_gain()
    history.add("a", 30.0, warm=False)
    found = json.loads(history.path.read_text())
    assert found.keys() == {*other, history.machine} and found.items() >= other.items()


def test_a_record_that_cannot_be_written_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    CompileHistory(tmp_path / "file" / "compile.json").add("a", 30.0, warm=False)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_user_without_a_home_has_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    record = CompileHistory()
    record.add("a", 30.0, warm=False, gain=2.0)
    assert record.compile_seconds("a").value == weighing.COLD_SECONDS


def test_what_an_earlier_training_of_the_process_compiled_makes_a_later_one_no_less_warm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._dynamo.utils import counters

    for earlier in ({}, {"fxgraph_cache_miss": 3}, {"fxgraph_cache_hit": 3}):
        monkeypatch.setitem(counters, "inductor", Counter(earlier))
        before = weighing.graphs_compiled()
        assert not weighing.compiled_from_cache(before), "nothing was compiled"
        counters["inductor"]["fxgraph_cache_hit"] += 2
        assert weighing.compiled_from_cache(before)
        counters["inductor"]["fxgraph_cache_miss"] += 1
        assert not weighing.compiled_from_cache(before)


def test_a_history_does_not_grow_for_ever(history: CompileHistory) -> None:
    for number in range(weighing.MAX_GRAPHS + 10):
        history.add(f"{number}", 30.0, warm=False, gain=1.0)
    (here,) = json.loads(history.path.read_text()).values()
    assert len(here["graphs"]) == weighing.MAX_GRAPHS and f"{weighing.MAX_GRAPHS + 9}" in here["graphs"]
    assert len(here["cold"]) == weighing.MAX_VALUES


# --- measuring


@pytest.mark.parametrize("asked", ["step_seconds", "compiled_gain"])
def test_measuring_steps_gives_all_state_back(quick_config: Config, asked: str) -> None:
    trainer = make_trainer(changed(quick_config, {"data.backend": "torch"}))
    images, labels = next(trainer.train_loader.epoch(0))
    trainer.train_one(images, labels, 0.1)  # there are momentum and statistics
    before = _copy(trainer.state()), torch.get_rng_state()
    found = trainer.step_seconds() if asked == "step_seconds" else trainer.compiled_gain(2)
    assert found > 0
    assert_same((trainer.state(), torch.get_rng_state()), before)
    assert all(p.grad is None for p in trainer.net.parameters())
    trainer.close()


def _copy(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copy(value) for value in state]
    return state.clone() if isinstance(state, torch.Tensor) else state


def test_a_long_step_is_taken_once_and_short_ones_a_few_times(
    quick_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(changed(quick_config, {"data.backend": "torch"}))
    for times, expected, steps in (([9.0], 9.0, 1), ([0.5, 0.3, 0.2, 0.4, 0.35], 0.2, 5), ([0.9, 0.8, 0.7], 0.7, 3)):
        left = iter(times)
        monkeypatch.setattr(trainer, "_timed", lambda *_, left=left: next(left))
        assert trainer.step_seconds() == expected
        assert len(list(left)) == len(times) - steps
    trainer.close()


# --- whole runs


@dataclass
class Compiler:
    """Stands in for torch's: it changes nothing, and knows how often it was called."""

    modules: list[torch.nn.Module] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.modules)


@pytest.fixture
def compiler(history: CompileHistory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    found = Compiler()
    monkeypatch.setattr("train.machine.runtime.find_compiler", lambda device: (True, "g++ found"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: found.modules.append(module))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr("torch.compiler.cudagraph_mark_step_begin", lambda: _must(found, "an uncompiled run asked it"))
    yield found
    torch.use_deterministic_algorithms(False)


def _must(condition: object, why: str) -> None:
    assert condition, why


@pytest.fixture
def config(quick_config: Config) -> Config:
    words = {"train.compile": "auto", "train.epochs": 1, "schedule.peak_epoch": 0.5, "data.backend": "torch"}
    return changed(quick_config, words)


def compiled(run: Path) -> str:
    """What a run's folder says everywhere of its compiler."""
    environment = json.loads((run / "environment.json").read_text())
    (note,) = (note for note in environment["notes"] if note.startswith("compile: "))
    mode = environment["compile"]
    assert note.startswith(f"compile: {mode} (") and load_checkpoint(run / "last.pt")["machine"]["compile"] == mode
    return str(mode)


def test_a_short_run_stays_uncompiled_and_trains_as_one_that_was_told_to(
    config: Config, compiler: Compiler, history: CompileHistory, tmp_path: Path
) -> None:
    log = Lines()
    fit(config, tmp_path / "auto", log=log)
    assert not compiler and compiled(tmp_path / "auto") == "off"
    (line,) = (line for line in log.lines if line.startswith("compile: "))
    assert "weighed: the 11 steps left take" in line and "54.0 s (a default, cold cache)" in line
    assert not history.path.exists()
    fit(changed(config, {"train.compile": "off"}), tmp_path / "off", log=Lines())
    assert_equal_weights(weights(tmp_path / "auto" / "last.pt"), weights(tmp_path / "off" / "last.pt"))


def test_a_run_compiles_where_that_was_seen_to_take_no_time(
    config: Config, compiler: Compiler, history: CompileHistory, tmp_path: Path
) -> None:
    history.add("any", 1e-9, warm=False, gain=10.0)
    log = Lines()
    fit(config, tmp_path / "run", log=log)
    assert compiler and compiled(tmp_path / "run") == "default"
    assert "10.00 times the speed, seen here" in log.text and "compiled in " in log.text
    (here,) = json.loads(history.path.read_text()).values()
    assert len(here["cold"]) == 2 and len(here["graphs"]) == 2, "what this run took is kept"


def test_compiled_steps_that_turn_out_slower_are_dropped_and_remembered(
    config: Config, compiler: Compiler, history: CompileHistory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history.add("any", 1e-9, warm=False, gain=10.0)
    pairs: list[int] = []
    monkeypatch.setattr(Trainer, "compiled_gain", lambda self, count: pairs.append(count) or 0.8)
    small = {"data.name": "synthetic", "data.synthetic_count": 352, "train.batch_size": 32, "train.eval_batch_size": 32}
    longer = changed(config, {**small, "train.epochs": 10})  # 110 steps: two pairs
    log = Lines()
    fit(longer, tmp_path / "run", log=log)
    assert pairs == [2] and compiled(tmp_path / "run") == "off"
    assert "compile: off (tried: a compiled step has 0.80 times the speed of an eager one)" in log.text
    compiler.modules.clear()
    fit(longer, tmp_path / "again", log=Lines())
    assert not compiler and compiled(tmp_path / "again") == "off"


@pytest.mark.parametrize("began", ["off", "default"])
def test_a_resumed_run_goes_on_as_it_began(
    config: Config, compiler: Compiler, history: CompileHistory, tmp_path: Path, began: str
) -> None:
    if began == "default":
        history.add("any", 1e-9, warm=False, gain=10.0)
    fit(config, tmp_path / "run", log=Lines())
    assert compiled(tmp_path / "run") == began
    history.path.unlink(missing_ok=True)
    if began == "off":
        history.add("any", 1e-9, warm=False, gain=10.0)
    compiler.modules.clear()
    log = Lines()
    fit(changed(config, {"train.epochs": 2}), tmp_path / "run", log=log, resume=True, extend=True)
    assert compiled(tmp_path / "run") == began and bool(compiler) == (began == "default")
    assert f"compile: {began} (as the run began)" in log.lines and "other conditions" not in log.text


def test_a_run_that_began_elsewhere_is_weighed_anew(
    config: Config, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(changed(config, {"train.compile": "off"}))
    monkeypatch.setattr(trainer, "step_seconds", lambda: 1e-9)
    for began in ({"device": "cuda", "compile": "default"}, {"device": "cpu"}, {}, None):
        assert "weighed" in Choice(trainer, "default").weigh(10, began).why
    trainer.close()


@pytest.mark.parametrize("pays", [False, True])
def test_a_deterministic_run_asks_neither_the_clock_nor_the_record(
    config: Config, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pays: bool
) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("by the clock")

    for name in ("step_seconds", "compiled_gain", "_timed"):
        monkeypatch.setattr(Trainer, name, asked)
    for name in ("compile_seconds", "gain", "add"):
        monkeypatch.setattr(CompileHistory, name, asked)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    deterministic = changed(config, {"train.deterministic": True})
    trainer = make_trainer(changed(config, {"train.compile": "off"}))
    flops = 6 * trainer.net.multiply_adds(trainer.dataset.height, trainer.dataset.width) * 128 * 11
    trainer.close()
    even = flops / 50e9 * (1 - 1 / 1.37)
    monkeypatch.setattr(weighing, "COLD_SECONDS", even * (0.999 if pays else 1.001))
    log = Lines()
    fit(deterministic, tmp_path / "run", log=log)
    assert compiled(tmp_path / "run") == ("default" if pays else "off") and bool(compiler) == pays
    assert "train.deterministic=true: by a fixed rule, 11 steps" in log.text


def test_a_range_test_is_among_the_steps_that_are_left(
    config: Config, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []
    weigh_steps = Choice.weigh

    def noted(self: Choice, steps_left: int | None, began: Any = None) -> Any:
        asked.append(steps_left)
        return weigh_steps(self, steps_left, began)

    monkeypatch.setattr(Choice, "weigh", noted)
    searching = changed(config, {"schedule.lr_max": "find", "schedule.find_steps": 20, "schedule.find_end": 1.0})
    find_rates_only(searching, tmp_path / "rates", log=Lines())
    fit(searching, tmp_path / "run", log=Lines())
    fit(changed(searching, {"train.epochs": 3}), tmp_path / "run", log=Lines(), resume=True, extend=True)
    assert asked == [20, 20 + 11, 2 * 11]


def test_a_session_that_is_told_no_number_of_steps_compiles(
    config: Config, compiler: Compiler, history: CompileHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "step_seconds", lambda self: 1e-9)
    with Session(config, Lines()) as session:
        session.build()
        session.warm_up()
        assert session.runtime.compile_mode == session.trainer.runtime.compile_mode == "default"
        assert session.trainer.train_step in compiler.modules and session.trainer.eval_steps[""] in compiler.modules
    assert not history.path.exists()


@pytest.mark.parametrize("held_out", [False, True])
def test_a_finished_run_that_is_resumed_compiles_nothing_but_what_measures_the_test_set(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: bool
) -> None:
    graphs: list[torch.fx.GraphModule] = []
    compile = torch.compile

    def noted(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("train.machine.runtime.find_compiler", lambda device: (True, "g++ found"))
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile(function, backend=noted, dynamic=False))
    torch._dynamo.reset()
    compiling = changed(config, {"train.compile": "default", "data.validation": 200 if held_out else None})
    first = fit(compiling, tmp_path / "run", log=Lines())
    assert len(graphs) >= 2
    torch._dynamo.reset()
    graphs.clear()
    log = Lines()
    again = fit(compiling, tmp_path / "run", log=log, resume=True)
    assert len(graphs) == held_out, "the evaluation step, where it is used"
    assert again["last_accuracy"] == first["last_accuracy"]
    assert ("compiling the evaluation step (mode default) ..." in log.text) == held_out
    assert compiled(tmp_path / "run") == "default" and "other conditions" not in log.text


def test_an_explicit_mode_is_not_weighed(config: Config, compiler: Compiler, tmp_path: Path) -> None:
    log = Lines()
    fit(changed(config, {"train.compile": "default"}), tmp_path / "run", log=log)
    assert compiler and compiled(tmp_path / "run") == "default"
    assert "compile: default (as asked)" in log.lines and "weighed" not in log.text


def test_the_mode_to_compile_with_is_named_before_it_is_weighed(compiler: Compiler) -> None:
    runtime = prepare(device="cpu", precision="fp32")
    assert runtime.compile_mode == "default"
    off = runtime.compiling(None, "a reason")
    assert off.compile_mode is None and off.compile_note == "compile: off (a reason)"
    assert [n for n in off.notes if n != off.compile_note] == [n for n in runtime.notes if n != runtime.compile_note]


@pytest.mark.parametrize("asked", ["auto", "on"])
def test_a_step_that_cannot_be_captured_is_said_or_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """On the CPU, where no graph can be captured: as if it were a GPU on which that fails."""

    def fails(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand so on")

    monkeypatch.setattr("train.step.trainer.CapturedStep", fails)
    log = Lines()
    with Session(changed(config, {"train.compile": "off", "train.step_graph": "auto"}), log) as session:
        runtime = session.runtime
        session.runtime = replace(runtime, step_graph=True, notes=(*runtime.notes, "step graph: on (a reason)"))
        session.build()
        session.config = changed(config, {"train.compile": "off", "train.step_graph": asked})
        before = {name: tensor.clone() for name, tensor in session.trainer.net.state_dict().items()}
        if asked == "on":
            with pytest.raises(RuntimeUnavailable, match=r"train\.step_graph=on: .* not permitted .*step_graph=auto"):
                session.warm_up()
            return
        session.warm_up()
        assert not session.runtime.step_graph and session.trainer.captured is None
        assert_equal_weights(before, session.trainer.net.state_dict())
        assert (
            "WARNING: step graph: off (it cannot be captured: operation not permitted when stream is capturing)"
            in log.lines
        )
        images, labels = next(session.trainer.train_loader.epoch(0))
        assert math.isfinite(float(session.trainer.train_one(images, labels, 0.01)[0]))
