"""train.fit: the run that the command makes, a process that stays as it was, and errors that end nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import ROOT
from training import assert_equal_weights, needs_compiler, weights

import train
from dali_pipeline.options import DataOptions
from net.options import NetOptions
from train.config import Config, ConfigError, changed, to_dict, to_yaml
from train.machine.process import process_as_found
from train.options import OptimOptions, RunOptions, ScheduleOptions, TrainOptions
from train.run import fit as train_into
from train.screen.log import Log

Arm = Callable[[str, Callable[[int], object]], None]


@pytest.fixture
def small(quick_config: Config) -> Config:
    """An epoch of four steps on noise."""
    return changed(
        quick_config,
        {
            "data.name": "synthetic",
            "data.synthetic_count": 128,
            "data.backend": "torch",
            "net.width": 1,
            "train.batch_size": 32,
            "train.epochs": 1,
        },
    )


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """runs/ of these tests lies in a folder of their own."""
    monkeypatch.chdir(tmp_path)


def state() -> dict[str, Any]:
    """What of the process others rely on."""
    backends = torch.backends
    precision = {
        name: getattr(owner, "fp32_precision", None)
        for name, owner in {
            "cublas": backends.cuda.matmul,
            "cudnn": backends.cudnn,
            "cudnn.conv": getattr(backends.cudnn, "conv", None),
            "cudnn.rnn": getattr(backends.cudnn, "rnn", None),
            "mkldnn.matmul": getattr(backends.mkldnn, "matmul", None),
        }.items()
    }
    return {
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (backends.cudnn.deterministic, backends.cudnn.benchmark, backends.cudnn.allow_tf32),
        "matmul": torch.get_float32_matmul_precision(),
        "precision": precision,
        "type": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "environment": dict(os.environ),
        "random": random.getstate(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],  # noqa: NPY002
        "torch": torch.get_rng_state().tolist(),
        "folder": Path.cwd(),
    }


@contextmanager
def unusual() -> Iterator[None]:
    """Other values than the defaults, so that giving back is not setting the defaults; the tests' own come back."""
    with process_as_found():
        random.seed(5)
        np.random.seed(6)  # noqa: NPY002
        torch.manual_seed(7)
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(2)
        yield


def test_the_run_is_that_of_the_command(quick_config: Config, tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text(to_yaml(quick_config))
    expected = train_into(changed(quick_config, {"train.seed": 3}), tmp_path / "command", log=Log(quiet=True))
    run = train.fit("digits.yaml", "train.seed=3", quiet=True)
    assert run.folder == tmp_path / "runs" / "digits"
    assert_equal_weights(weights(run.folder / "last.pt"), weights(tmp_path / "command" / "last.pt"))
    written = json.loads((run.folder / "summary.json").read_text())
    assert run.accuracy == written["last_accuracy"] == expected["last_accuracy"]
    assert (run.best_accuracy, run.best_epoch) == (written["best_accuracy"], written["best_epoch"])
    assert run.summary == written
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert run.metrics == [json.loads(line) for line in lines] and len(lines) == 2
    assert run.accuracy == run.metrics[-1]["test_accuracy"]


def test_dicts_and_configs_train_into_numbered_folders_of_their_own(small: Config, tmp_path: Path) -> None:
    tree = to_dict(small)
    folders = [train.fit(recipe, quiet=True).folder for recipe in (tree, small)]
    assert folders == [tmp_path / "runs" / "python", tmp_path / "runs" / "python-2"]
    assert_equal_weights(*(weights(folder / "last.pt") for folder in folders))
    assert tree == to_dict(small)


def test_numpy_scalars_and_paths_count_as_what_they_stand_for(small: Config, tmp_path: Path) -> None:
    tree: dict[str, dict[str, Any]] = to_dict(small)
    tree["train"] |= {"epochs": np.int64(1), "deterministic": np.bool_(False)}
    tree["schedule"]["lr_max"] = np.float32(0.125)
    tree["run"]["dir"] = tmp_path / "here"
    run = train.fit(tree, quiet=True)
    assert run.folder == tmp_path / "here"
    assert "lr_max: 0.125" in (run.folder / "config.yaml").read_text()
    assert isinstance(tree["run"]["dir"], Path), "the caller's own dict stays as it is"
    config = replace(
        small, train=replace(small.train, epochs=np.int64(1)), run=replace(small.run, dir=tmp_path / "too")
    )
    assert train.fit(config, quiet=True).folder == tmp_path / "too"


BAD: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "an int out of range": (Config(train=TrainOptions(epochs=-3)), (), "train.epochs: -3 is out of range"),
    "NaN": (Config(optim=OptimOptions(momentum=float("nan"))), (), "optim.momentum: nan is not a finite number"),
    "NumPy's NaN": ({"optim": {"momentum": np.float64("nan")}}, (), "optim.momentum: nan is not a finite number"),
    "text for a number": (Config(net=NetOptions(width="8")), (), "net.width: '8' (text) is not of type int"),
    "a float for an int": ({"train": {"epochs": np.float64(3.5)}}, (), "train.epochs: 3.5"),
    "a bool for an int": ({"train": {"epochs": np.bool_(True)}}, (), "train.epochs: True (true or false)"),
    "an array": ({"train": {"epochs": np.ones(2, int)}}, (), "train.epochs: array([1, 1]) (ndarray)"),
    "two keys together": (
        Config(schedule=ScheduleOptions(peak_epoch=9.0), train=TrainOptions(epochs=3)),
        (),
        "schedule.peak_epoch: 9 lies after the end of the training",
    ),
    "a section that is none": (Config(data=3), (), "data: expected keys below it, found 3"),
    "data without a name": (Config(data=DataOptions(name="cifar-11")), (), "data.name: 'cifar-11'"),
    "a pair of run keys": (Config(run=RunOptions(checkpoint_every="2 days")), (), "run.checkpoint_every: '2 days'"),
    "an unknown key": ({"train": {"epoch": 3}}, (), "train.epoch: unknown key, did you mean epochs?"),
    "an unknown section": ({"trian": {}}, (), "trian: unknown section, did you mean train?"),
    "a bad override": ({"train": {"epochs": 3}}, ("train.epochs=none",), "train.epochs: 'none' (text)"),
    "an override of a dict": ({"train": {}}, ({"train.epochs": 3},), "is no override; expected text"),
    "an override twice": ({"train": {}}, ("train.seed=1", "train.seed=2"), "train.seed: given twice"),
    "a home of nobody": ({"run": {"dir": "~no such user/run"}}, (), "run.dir: ~no such user/run: no home is known"),
    "no file": ("nowhere.yaml", (), "nowhere.yaml"),
    "no recipe": (3, (), "3 is no recipe"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_configuration_raises_a_config_error_that_names_the_key(case: str, tmp_path: Path) -> None:
    recipe, overrides, words = BAD[case]
    with pytest.raises(ConfigError) as caught:
        train.fit(recipe, *overrides, quiet=True)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, train.UserError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_process_is_as_before(small: Config, deterministic: bool, arm: Arm) -> None:
    arm("step", lambda count: torch.set_num_threads(3))
    with unusual():
        before = state()
        train.fit(small, f"train.deterministic={str(deterministic).lower()}", quiet=True)
        assert state() == before


def test_the_process_is_as_before_after_an_error(small: Config, arm: Arm) -> None:
    def stop(count: int) -> None:
        assert torch.are_deterministic_algorithms_enabled() and torch.initial_seed() == 11
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        raise OSError("pulled out")

    arm("step", stop)
    with unusual():
        before = state()
        with pytest.raises(OSError, match="pulled out"):
            train.fit(small, "train.deterministic=true", "train.seed=11", quiet=True)
        assert state() == before


def test_it_trains_where_the_caller_has_gradients_off_and_another_default_type(small: Config) -> None:
    plain = train.fit(small, quiet=True)
    with process_as_found(), torch.inference_mode():
        torch.set_default_dtype(torch.float64)
        other = train.fit(small, quiet=True)
        assert torch.get_default_dtype() == torch.float64 and torch.is_inference_mode_enabled()
    assert_equal_weights(weights(plain.folder / "last.pt"), weights(other.folder / "last.pt"))


def test_a_thread_that_is_not_the_main_one_can_train(small: Config) -> None:
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(train.fit(small, quiet=True))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    main = train.fit(small, quiet=True)
    assert isinstance(found[0], train.FinishedRun), found
    assert_equal_weights(weights(found[0].folder / "last.pt"), weights(main.folder / "last.pt"))


def test_a_second_training_at_the_same_time_is_refused_and_a_later_one_is_not(small: Config, arm: Arm) -> None:
    said: list[str] = []

    def inside(count: int) -> None:
        if count == 1:
            with pytest.raises(train.UserError) as caught:
                train.fit(small, quiet=True)
            said.append(str(caught.value))

    arm("step", inside)
    train.fit(small, quiet=True)
    assert len(said) == 1 and "another training runs in this process" in said[0]
    train.fit(small, quiet=True)


def test_ctrl_c_is_a_keyboard_interrupt_with_a_checkpoint_that_goes_on_to_the_same_weights(
    small: Config, arm: Arm
) -> None:
    whole = train.fit(small, "run.dir=whole", quiet=True)
    before = state()
    arm("step", lambda count: signal.raise_signal(signal.SIGINT) if count == 2 else None)
    with pytest.raises(KeyboardInterrupt, match=r"SIGINT: stopped after a whole step.*cut.*resume=True"):
        train.fit(small, "run.dir=cut", quiet=True)
    assert state() == before
    finished = train.fit(small, "run.dir=cut", resume=True, quiet=True)
    assert_equal_weights(weights(finished.folder / "last.pt"), weights(whole.folder / "last.pt"))
    assert finished.accuracy == whole.accuracy


def test_a_second_ctrl_c_ends_the_training_at_once_and_not_the_process(small: Config, arm: Arm) -> None:
    steps: list[int] = []

    def twice(count: int) -> None:
        steps.append(count)
        if count == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    arm("step", twice)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="the second"):
        train.fit(small, quiet=True)
    assert steps == [1, 2] and signal.getsignal(signal.SIGINT) == handler


def test_what_a_user_can_mend_is_raised_and_ends_nothing(small: Config) -> None:
    train.fit(small, "run.dir=run", quiet=True)
    with pytest.raises(train.UserError, match="already holds a run"):
        train.fit(small, "run.dir=run", quiet=True)
    with pytest.raises(train.UserError, match="either continued or replaced"):
        train.fit(small, "run.dir=run", resume=True, overwrite=True, quiet=True)
    with pytest.raises(train.UserError, match="nothing to resume"):
        train.fit(small, "run.dir=empty", resume=True, quiet=True)
    with pytest.raises(train.UserError, match=r"loss (nan|inf)"):
        train.fit(small, "run.dir=run", "schedule.lr_max=1e30", overwrite=True, quiet=True)


def test_quiet_prints_nothing_and_else_progress_is_whole_lines(
    small: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    train.fit(small, quiet=True)
    assert capfd.readouterr() == ("", "")
    run = train.fit(small)
    out, err = capfd.readouterr()
    assert err == "" and not {"\r", "\x1b"} & set(out)
    assert f"test accuracy  {run.accuracy:.2f}%" in out and str(run.folder) in out


def test_a_reader_that_went_away_costs_the_lines_and_not_the_callers_standard_output(
    small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

        def isatty(self) -> bool:
            return False

    before = os.fstat(1)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Gone())
        run = train.fit(small)
    assert run.metrics and os.path.samestat(os.fstat(1), before)


@pytest.mark.slow
def test_many_shapes_in_one_process_are_all_compiled(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    compile = torch.compile
    # traced as ever, and not made into machine code, which would take a minute each: the steps, and the torch pipeline
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, backend="eager", dynamic=False))
    torch._dynamo.reset()  # what earlier tests have compiled counts too
    # in place of nine trainings: torch counts the shapes of a function, and here two are too many
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for width in (1, 2):
            images = f"data.synthetic_count={128 + width}"
            train.fit(small, f"net.width={width}", images, "train.compile=default", quiet=True)
        with pytest.raises(train.UserError):  # one that diverges counts as little
            train.fit(small, "net.width=3", "schedule.lr_max=1e20", "train.compile=default", quiet=True)
        train.fit(small, "net.width=4", "train.compile=default", quiet=True)


def test_importing_the_packages_and_asking_for_a_config_imports_no_torch() -> None:
    code = (
        "import sys, analysis, train\n"
        "assert {'fit', 'FinishedRun'} <= set(dir(train)) and 'load' in dir(analysis)\n"
        "train.Config(), train.ConfigError, analysis.UserError\n"
        "assert not {'torch', 'matplotlib', 'PIL'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
