"""Checkpoints that are whole and sealed and hold the wrong thing: each is refused in one line, or does no harm."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training import Lines, make_trainer

from analysis.run import load_run
from dali_pipeline.errors import UserError
from train import export
from train.config import Config, changed
from train.disk.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from train.disk.content import misfit
from train.disk.resume import check_fits, load_for_resume, note_changes
from train.disk.snapshot import load_snapshot
from train.run import fit
from train.screen.clock import Times
from train.screen.log import Log
from train.step.trainer import Trainer

WRONG = (
    None, True, -1, 0, 1, 10**30, 2.5, -0.5, math.nan, math.inf, "", "x", "\ud800", b"x", (), [], [1], ["x"], [None], {},
    {"x": 1}, {1: 2}, {"x": torch.zeros(2)}, torch.zeros(()), torch.zeros(3), torch.zeros(2, 2, dtype=torch.complex64),
    torch.full((3,), math.nan), torch.zeros(2, device="meta"), torch.zeros(2, 2).to_sparse(),
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A run with an average of its weights, of two epochs, the last of which is the best or not."""
    from training import QUICK

    values = QUICK | {"net.width": 1, "data.backend": "torch", "train.ema_decay": 0.9, "data.validation": 0.2}
    config = changed(Config(), values)
    folder = tmp_path_factory.mktemp("runs") / "run"
    fit(config, folder, log=Log(quiet=True))
    return folder, config


@pytest.fixture(scope="module")
def whole(run: tuple[Path, Config]) -> dict[str, Any]:
    """What its last.pt holds; to be copied before it is changed."""
    return load_checkpoint(run[0] / "last.pt")


@pytest.fixture(scope="module")
def trainer(run: tuple[Path, Config]) -> Iterator[Trainer]:
    made = make_trainer(run[1])
    yield made
    made.close()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in nested dicts and lists, outer ones first."""
    yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from places(part, (*path, key))
    elif isinstance(value, (list, tuple)):
        for place, part in enumerate(value[:2]):
            yield from places(part, (*path, place))


def mutated(state: dict[str, Any], path: tuple[Any, ...], how: str, value: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    holder: Any = state
    for key in path[:-1]:
        holder = holder[key]
    if how == "replace":
        holder[path[-1]] = value
    elif how == "remove":
        del holder[path[-1]]
    elif isinstance(holder, dict):
        holder["x"] = value
    else:
        holder.append(value)
    return state


def use(state: dict[str, Any], folder: Path, config: Config, trainer: Trainer) -> bool:
    """Everything that a resumed run, the analysis and the export do with a checkpoint. Whether it was taken; UserError, in
    one line, is the only error."""
    save_checkpoint(folder / "last.pt", state)
    taken = 0
    try:
        snapshot = load_for_resume(folder, config, fallback=False, extend=False, log=Lines())
        check_fits(snapshot, trainer.state(), trainer.steps_per_epoch, folder)
        trainer.load_state(snapshot.trainer_state)
        Times().add(snapshot.times)
        note_changes(snapshot.machine, {"device": "cpu", "processes": 1}, Lines())
        taken += 1
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 2500
    for ema in (False, True):
        try:
            export.subject(load_snapshot(folder / "last.pt"), ema)
            load_run(folder, checkpoint="last", device="cpu", need_data=False, say=lambda line: None).caption()
            taken += 1
        except UserError as error:
            assert len(str(error).splitlines()) == 1
    return taken == 3


def test_the_checkpoint_of_a_run_is_taken(run: tuple[Path, Config], trainer: Trainer, tmp_path: Path) -> None:
    assert use(load_checkpoint(run[0] / "last.pt"), tmp_path, run[1], trainer)


@settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_checkpoint_with_any_value_changed_removed_or_added_is_refused_in_a_line_or_harmless(
    run: tuple[Path, Config], whole: dict[str, Any], trainer: Trainer, tmp_path: Path, data: st.DataObject
) -> None:
    by_depth: dict[str, list[tuple[Any, ...]]] = {}
    for path in places(whole):
        if path and path[0] != "format":
            by_depth.setdefault(str(path[0]), []).append(path)
    path = data.draw(st.sampled_from(by_depth[data.draw(st.sampled_from(sorted(by_depth)))]))
    how, value = data.draw(st.sampled_from(["replace", "remove", "add"])), data.draw(st.sampled_from(WRONG))
    use(mutated(whole, path, how, value), tmp_path, run[1], trainer)


WRONG_STATES: dict[str, tuple[dict[str, Any], str]] = {
    "a position beyond the epoch": ({"step": 10**6}, "step is 1000000, beyond the"),
    "steps without their losses": ({"step": 3}, "step_losses holds 0 values for 3 steps"),
    "an epoch beyond the end": ({"epoch": 9}, "metrics holds 2 epochs, and 9 are finished"),
    "an epoch so far beyond that its numbers fit no memory": (
        {"epoch": 10**12 - 1},
        "metrics holds 2 epochs, and 99999",
    ),
    "a best epoch to come": ({"best_epoch": 7}, "best_epoch is 7, and 2 are finished"),
    "other steps in an epoch": ({"steps_per_epoch": 7}, "steps_per_epoch is 7, and an epoch has"),
    "a rate of text": ({"lr_max": "fast"}, "lr_max is 'fast', expected a number above 0"),
    "rates in the wrong order": ({"lr_min": 0.5}, "lr_min is 0.5, above lr_max, 0.1"),
    "an optimizer without groups": ({"optimizer": {"sgd": {"state": {}}}}, "optimizer.sgd.param_groups is missing"),
    "another network": ({"model": {"x": torch.zeros(2)}}, "is not that of this network and recipe: model."),
    "another recipe": (
        {"config": {"train": {"epochs": "many"}}},
        "holds no recipe that this version reads: train.epochs",
    ),
    "no average": ({"ema": None}, "ema is None, expected names with values"),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_what_is_wrong_is_named_with_the_file(
    run: tuple[Path, Config], trainer: Trainer, tmp_path: Path, name: str
) -> None:
    changes, said = WRONG_STATES[name]
    save_checkpoint(tmp_path / "last.pt", load_checkpoint(run[0] / "last.pt") | changes)
    with pytest.raises(CheckpointError) as refused:
        snapshot = load_for_resume(tmp_path, run[1], fallback=False, extend=False, log=Lines())
        check_fits(snapshot, trainer.state(), trainer.steps_per_epoch, tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}") and said in str(refused.value)


@pytest.mark.parametrize("found", [torch.zeros(3), "3", None, 3.0, True, 99, "x" * 50_000])
def test_a_format_that_is_no_known_number_is_refused(run: tuple[Path, Config], tmp_path: Path, found: object) -> None:
    save_checkpoint(tmp_path / "last.pt", load_checkpoint(run[0] / "last.pt") | {"format": found})
    with pytest.raises(CheckpointError, match=r"last\.pt: of format .*, this version reads format 3") as refused:
        load_checkpoint(tmp_path / "last.pt")
    assert len(str(refused.value)) < 1500


def test_what_fits_differs_neither_in_names_nor_in_shapes() -> None:
    expected = {"a": torch.zeros(2), "b": [1, {"c": None}], "d": 0.5}
    assert misfit({"a": torch.ones(2), "b": [7, {"c": True}], "d": 3}, expected, "state") is None
    for found, said in (
        ({**expected, "a": torch.zeros(3)}, "state.a is (3,) of torch.float32, expected (2,) of torch.float32"),
        ({**expected, "a": torch.zeros(2).double()}, "state.a is (2,) of torch.float64"),
        ({**expected, "b": [1]}, "state.b is a list of 1, expected 2 values"),
        ({**expected, "b": [1, {"c": 2}]}, "state.b[1].c is 2, expected true, false or null"),
        ({**expected, "e": 1}, "state.e is no part of it"),
        ({"a": torch.zeros(2), "d": 1}, "state.b is missing"),
        ([], "state is a list of 0, expected names with values"),
    ):
        problem = misfit(found, expected, "state")
        assert problem is not None and problem.startswith(said)
