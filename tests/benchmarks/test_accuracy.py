"""accuracy.py: seeds in one process, interruptions, changed recipes, the report."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import assert_same, traced_only

from benchmarks import accuracy
from dali_pipeline.loader import EvalLoader, TrainLoader
from train.config import Config, changed, load_config, to_dict, to_yaml
from train.disk.checkpoint import load_checkpoint
from train.run import fit
from train.screen.log import Log
from train.session import Session


def quiet_session(config: Config) -> Session:
    return Session(config, Log(quiet=True))


@pytest.fixture
def recipe_file(quick_config: Config, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(changed(quick_config, {"train.ema_decay": 0.9, "train.tail": "endless"})))
    return path


def test_a_later_run_of_a_campaign_is_a_fresh_one_bit_for_bit(recipe_file: Path, tmp_path: Path) -> None:
    config = load_config(recipe_file)
    with quiet_session(config) as session:
        campaign = accuracy.Campaign(session)
        campaign.run(3)
        record = campaign.run(5)
        state = copy.deepcopy(campaign.trainer.state())
    fit(changed(config, {"train.seed": 5, "train.tta": True}), tmp_path / "fresh", log=Log(quiet=True))
    fresh = load_checkpoint(tmp_path / "fresh" / "last.pt")
    for part in ("model", "ema"):
        assert state[part].keys() == fresh[part].keys()
        assert all(torch.equal(value, fresh[part][name]) for name, value in state[part].items()), part
    assert state["optimizer"]["sgd"]["state"]
    assert_same(state["optimizer"], fresh["optimizer"])
    last = fresh["metrics"][-1]
    assert record["accuracy"] == last["test_accuracy"] and record["tta_accuracy"] == last["test_tta_accuracy"]
    assert record["ema_accuracy"] == last["ema_test_accuracy"]
    assert record["ema_tta_accuracy"] == last["ema_test_tta_accuracy"]
    assert record["ema_accuracy"] == last["ema_test_accuracy"] and record["test_loss"] == last["test_loss"]


@pytest.mark.slow
def test_everything_is_compiled_before_the_pipelines_give_their_first_batch(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []
    at_batches: list[int] = []
    compile = torch.compile

    def noted(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def watched(batches: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def watching(*arguments: Any) -> Iterator[Any]:
            at_batches.append(len(graphs))
            yield from batches(*arguments)

        return watching

    monkeypatch.setattr("train.machine.runtime.find_compiler", lambda device: (True, "g++ found"))
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile(function, backend=noted, dynamic=False))
    monkeypatch.setattr(TrainLoader, "epoch", watched(TrainLoader.epoch))
    monkeypatch.setattr(EvalLoader, "__iter__", watched(EvalLoader.__iter__))
    torch._dynamo.reset()
    # DALI's pipeline: torch's is compiled too, with its first batch
    config = load_config(
        recipe_file, ["train.compile=default", "data.backend=dali", "train.epochs=1", "schedule.peak_epoch=0.5"]
    )
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    with quiet_session(config) as session:
        accuracy.Campaign(session).run(0)
    # the training step, and the evaluation by the weights, by their average and by all views
    assert len(graphs) == 2
    assert len(at_batches) > 3 and set(at_batches) == {2}


def test_accuracy_goes_on_after_an_interruption(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, path = tmp_path / "f" / "runs.jsonl", tmp_path / "r.json"
    words = [
        str(recipe_file),
        "--finished",
        str(finished),
        "--json",
        str(path),
        "train.epochs=1",
        "schedule.peak_epoch=0.5",
    ]
    assert accuracy.main([*words, "--runs", "2"]) == 0
    both = finished.read_text().splitlines()
    assert len(both) == 3
    # killed while the second run's line was written
    finished.write_text("\n".join(both[:2]) + "\n" + both[2][:20])
    done: list[int] = []
    run = accuracy.Campaign.run

    def counted(self: accuracy.Campaign, seed: int) -> dict[str, Any]:
        done.append(seed)
        return run(self, seed)

    monkeypatch.setattr(accuracy.Campaign, "run", counted)
    capsys.readouterr()
    assert accuracy.main([*words, "--runs", "3"]) == 0
    assert done == [1, 2]
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads(path.read_text())
    records = [json.loads(line) for line in finished.read_text().splitlines()]
    assert [record["seed"] for record in records[1:]] == [0, 1, 2]
    assert records[1] == json.loads(both[1])
    again = json.loads(both[2])
    assert all(
        records[2][key] == again[key] for key in ("seed", "accuracy", "tta_accuracy", "ema_accuracy", "test_loss")
    )
    values = [record["accuracy"] for record in records[1:]]
    assert report["accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert report["accuracy"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert report["accuracy"]["n"] == report["runs"] == 3
    assert report["covers"].keys() == {*report["seconds"], "once"}
    assert str(tmp_path) not in report["command"] and "root" not in report["recipe"]["data"]
    # runs of other arithmetic are no part of the same mean
    header = records[0] | {"environment": records[0]["environment"] | {"precision": "bf16", "device": "cuda:0"}}
    whole = finished.read_text()
    finished.write_text(json.dumps(header) + "\n" + whole.partition("\n")[2])
    assert accuracy.main([*words, "--runs", "4"]) == 2
    assert "(device: cuda -> cpu; precision: bf16 -> fp32)" in capsys.readouterr().err
    assert done == [1, 2]
    finished.write_text(whole)
    # nothing to do: the report again, without a trainer
    monkeypatch.setattr(accuracy, "Campaign", None)
    # the report replaces a link, and not what the link leads to
    (tmp_path / "mine").write_text("mine")
    path.unlink()
    path.symlink_to(tmp_path / "mine")
    assert accuracy.main([*words, "--runs", "2"]) == 0
    assert (tmp_path / "mine").read_text() == "mine" and json.loads(path.read_text())["runs"] == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"]["n"] == 2


def test_accuracy_refuses_a_changed_recipe(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(recipe_file)
    finished = tmp_path / "runs.jsonl"
    accuracy.append(finished, {"recipe": accuracy.comparable(to_dict(config)), "environment": {}}, only_first=True)
    before = finished.read_text()
    words = [str(recipe_file), "--runs", "1", "--finished", str(finished)]
    assert accuracy.main([*words, "optim.momentum=0.8"]) == 2
    assert "optim.momentum: 0.9 -> 0.8" in capsys.readouterr().err
    assert finished.read_text() == before
    # a data folder and a seed are no part of the recipe
    elsewhere = changed(config, {"data.root": "elsewhere", "train.seed": 7})
    assert accuracy.read_finished(finished, accuracy.comparable(to_dict(elsewhere))) == []


def test_runs_finished_when_recipes_had_the_keys_of_all_data_sets_still_count(
    quick_config: Config, tmp_path: Path
) -> None:
    now = accuracy.comparable(to_dict(quick_config))
    then = {**now, "data": {**now["data"], "synthetic_size": 64, "synthetic_count": 50000}}
    accuracy.append(tmp_path / "runs.jsonl", {"recipe": then, "environment": {}})
    accuracy.append(tmp_path / "runs.jsonl", {"seed": 3})
    assert accuracy.read_finished(tmp_path / "runs.jsonl", now) == [{"seed": 3}]
    noise = accuracy.comparable(to_dict(changed(quick_config, {"data.name": "synthetic", "data.synthetic_size": 32})))
    with pytest.raises(accuracy.RecipeChanged, match=r"data\.name: digits -> synthetic"):
        accuracy.read_finished(tmp_path / "runs.jsonl", noise)


def test_runs_finished_before_a_key_existed_count_for_its_default_alone(quick_config: Config, tmp_path: Path) -> None:
    now = accuracy.comparable(to_dict(quick_config), "validation")
    then = {**now, "net": {"width": now["net"]["width"]}, "augment": {**now["augment"]}}
    del then["augment"]["flip_rule"]
    accuracy.append(tmp_path / "runs.jsonl", {"recipe": then, "environment": {}})
    accuracy.append(tmp_path / "runs.jsonl", {"seed": 3})
    assert accuracy.read_finished(tmp_path / "runs.jsonl", now) == [{"seed": 3}]
    whitened = accuracy.comparable(to_dict(changed(quick_config, {"net.whitening": True})), "validation")
    with pytest.raises(accuracy.RecipeChanged, match=r"net\.whitening: False -> True"):
        accuracy.read_finished(tmp_path / "runs.jsonl", whitened)
    with pytest.raises(accuracy.RecipeChanged, match=r"measured\.on: validation -> None"):
        accuracy.read_finished(tmp_path / "runs.jsonl", accuracy.comparable(to_dict(quick_config)))


@pytest.mark.parametrize("text", ["a line without an end", "two lines\nof notes", "a list\n", '{"loss": 1}\n{"lo'])
def test_accuracy_neither_changes_nor_removes_a_file_that_it_did_not_write(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text(text)
    assert accuracy.main([str(recipe_file), "--runs", "1", "--finished", str(notes)]) == 2
    assert "name another file with --finished" in capsys.readouterr().err
    assert notes.read_text() == text


def test_accuracy_finds_its_rates_where_the_recipe_asks_for_that(recipe_file: Path) -> None:
    words = ["schedule.lr_max=find", "schedule.lr_min=find", "schedule.find_steps=20", "train.epochs=1"]
    config = load_config(recipe_file, [*words, "schedule.peak_epoch=0.5", "net.width=4"])
    with quiet_session(config) as session:
        record = accuracy.Campaign(session).run(0)
    assert 0 < record["lr_min"] < record["lr_max"] and record["seconds"]["lr_search"] > 0
    assert record["device_peak_gib"] is None


def test_time_to_94_is_the_sum_up_to_the_first_epoch_that_reaches_it() -> None:
    metrics = [
        {"epoch": i + 1, "seconds": 2.0, "eval_seconds": 0.5, "test_accuracy": percent}
        for i, percent in enumerate([90.0, 94.0, 93.9, 94.2])
    ]
    assert accuracy.time_to(metrics) == {"epoch_of_94": 2, "training_seconds_to_94": 4.0, "seconds_to_94": 5.0}
    assert set(accuracy.time_to(metrics[:1]).values()) == {None}


def test_seeds_share_one_compilation(quick_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch.nn.Module, "compile", traced_only)
    words = {"train.compile": "default", "train.epochs": 1, "schedule.peak_epoch": 0.5}
    torch._dynamo.reset()
    counters.clear()
    with quiet_session(changed(quick_config, words)) as session:
        campaign = accuracy.Campaign(session)
        campaign.run(0)
        before = counters["stats"]["unique_graphs"]
        assert before
        campaign.run(1)
        assert counters["stats"]["unique_graphs"] == before
