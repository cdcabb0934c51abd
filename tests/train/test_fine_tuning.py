"""Trainings that begin with the weights of another run, and that keep parts of the network, against loops in plain torch."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training import Lines, assert_equal_weights, assert_same, weights
from whole_runs import Arm, Stop, stop_before

import net as networks
from dali_pipeline.errors import UserError
from net.options import PARTS, NetOptions, parts_of
from train.config import Config, ConfigError, changed, load_config
from train.disk.checkpoint import load_checkpoint
from train.failpoints import disarm
from train.machine.runtime import seed_everything
from train.run import fit
from train.session import Session
from train.step.meter import StepMeter
from train.step.range_test import range_test
from train.step.schedule import OneCycle
from train.step.sync_bn import synchronise_batch_norm

FOUR = {
    "data.name": "synthetic",
    "data.synthetic_classes": 4,
    "data.synthetic_count": 64,
    "train.batch_size": 16,
    "train.eval_batch_size": 16,
    "data.backend": "torch",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over the digits, of one epoch."""
    from training import QUICK

    folder = tmp_path_factory.mktemp("source") / "a run, finished"
    fit(changed(Config(), {**QUICK, "data.backend": "torch", "train.epochs": 1}), folder, log=Lines())
    return folder


@pytest.fixture
def made(quick_config: Config) -> Iterator[Callable[..., Session]]:
    """A session with its trainer, from changes to the quick recipe."""
    opened: list[Session] = []

    def make(values: dict[str, Any]) -> Session:
        session = Session(changed(quick_config, {"data.backend": "torch", **values}), Lines())
        opened.append(session.__enter__())
        session.build()
        return session

    yield make
    for session in opened:
        session.__exit__(None, None, None)


def state_of(session: Session, *parts: str) -> dict[str, torch.Tensor]:
    """A copy of the network's state, or of some of its parts."""
    state = session.trainer.net.state_dict()
    return {name: t.clone() for name, t in state.items() if not parts or name.partition(".")[0] in parts}


@pytest.mark.parametrize("file", ["", "best.pt", "last.pt"])
def test_a_training_begins_with_the_weights_of_a_run(file: str, source: Path, made: Callable[..., Session]) -> None:
    session = made({"net.init": str(source / file)})
    assert_equal_weights(state_of(session), weights(source / (file or "best.pt")))
    line = f"net.init: {source / (file or 'best.pt')}: the weights of epoch 1, classifier included"
    assert line in session.log.lines  # type: ignore[attr-defined]


def test_the_factor_that_null_stands_for_is_the_same_network(source: Path, made: Callable[..., Session]) -> None:
    session = made({"net.init": str(source), "net.logit_scale": 1.0})  # of width 1
    assert_equal_weights(state_of(session), weights(source / "best.pt"))


def test_for_another_number_of_classes_the_classifier_is_the_one_drawn_without_it(
    source: Path, made: Callable[..., Session]
) -> None:
    session = made({**FOUR, "net.init": str(source)})
    found, theirs = state_of(session), weights(source / "best.pt")
    seed_everything(0)
    drawn = networks.build(NetOptions(width=1), 4).state_dict()
    expected = {name: (drawn if name.startswith("classifier") else theirs)[name] for name in theirs}
    assert_equal_weights(found, expected)
    assert "all but the classifier, which is drawn anew for 4 classes; the run there had 10" in session.log.text  # type: ignore[attr-defined]
    # another seed of the same trainer has the weights too, and a classifier of its own
    session.trainer.start_over(1)
    again = state_of(session)
    assert torch.equal(again["prep.0.weight"], theirs["prep.0.weight"])
    assert not torch.equal(again["classifier.weight"], drawn["classifier.weight"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"net.width": 4},
            r"prep\.0\.weight is \(1, 3, 3, 3\) there, \(4, 3, 3, 3\) here; .* and \d+ more; it was trained with net\.width=1$",
        ),
        ({"net.activation": "gelu"}, r"would compute something else .* it was trained with net\.activation=relu$"),
        ({"net.logit_scale": 0.5}, r"would compute something else .* it was trained with net\.logit_scale=null$"),
        (
            {"net.norm_eps": 1e-3, "net.norm_momentum": 0.2},
            r"trained with net\.norm_momentum=0\.1, net\.norm_eps=1e-05$",
        ),
        ({"net.whitening": True}, r"whitening\.weight is missing there.*; it was trained with net\.whitening=False$"),
        ({"net.init": "{source}/config.yaml"}, r"config\.yaml: not usable, it carries no sha256"),
        ({"net.init": "/dev/zero"}, r"net\.init: /dev/zero: is neither a run folder nor a checkpoint's file"),
        ({"net.init": "{source}/none.pt"}, r"none\.pt: no such checkpoint"),
        ({"net.init": "{source}/analysis"}, r"net\.init: .*analysis: holds no best\.pt"),
        ({**FOUR, "net.freeze": "prep,classifier"}, r"net\.freeze: the classifier is drawn anew for the 4 classes"),
    ],
)
def test_what_does_not_fit_is_one_line(
    values: dict[str, Any], words: str, source: Path, made: Callable[..., Session]
) -> None:
    (source / "analysis").mkdir(exist_ok=True)
    values = {"net.init": str(source), **values}
    values["net.init"] = values["net.init"].replace("{source}", str(source))
    with pytest.raises(UserError, match=words) as found:
        made(values)
    assert "\n" not in str(found.value)


def test_a_folder_without_best_pt_is_told_of_last_pt(
    source: Path, tmp_path: Path, made: Callable[..., Session]
) -> None:
    shutil.copy(source / "last.pt", tmp_path / "last.pt")
    with pytest.raises(ConfigError, match=r"holds no best\.pt.*; give .*last\.pt"):
        made({"net.init": str(tmp_path)})


def test_steps_with_frozen_parts_equal_a_loop_in_plain_torch(source: Path, made: Callable[..., Session]) -> None:
    """SGD over the other parameters alone, the frozen modules in eval mode."""
    frozen = ("prep", "layer2")
    session = made({"net.init": str(source), "net.freeze": ",".join(frozen), "optim.weight_decay": 0.01})
    trainer = session.trainer
    other = copy.deepcopy(trainer.net).requires_grad_(True)
    rest = [(name, p) for name, p in other.named_parameters() if name.partition(".")[0] not in frozen]
    optimizer = torch.optim.SGD(
        [
            {"params": [p for _, p in rest if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for _, p in rest if p.ndim == 1]},
        ],
        lr=0.1,
        momentum=0.9,
        nesterov=True,
    )
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (session.dataset.mean, session.dataset.std))
    trainer.step.train()
    for images, labels in trainer.train_loader.epoch(0):
        loss, _ = trainer.train_one(images, labels, 0.1)
        nn.Module.train(other, True)
        for name in frozen:
            nn.Module.train(other.get_submodule(name), False)
        optimizer.zero_grad()
        theirs = F.cross_entropy(other((images.float() - mean) * (1 / std)), labels)
        theirs.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(theirs.item(), rel=1e-4)
    for name, ours in trainer.net.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(ours, other.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)


def test_frozen_parts_keep_every_bit_through_training_evaluation_and_range_test(
    source: Path, made: Callable[..., Session]
) -> None:
    values = {"net.init": str(source), "net.freeze": "prep, layer1", "train.ema_decay": 0.9}
    trainer = (session := made(values)).trainer
    before, rest = state_of(session, "prep", "layer1"), state_of(session, "layer2", "layer3", "classifier")
    held = {
        id(p) for optimizer in trainer.optimizers.by_kind.values() for g in optimizer.param_groups for p in g["params"]
    }
    trained = {name for name, p in trainer.net.named_parameters() if id(p) in held}
    assert trained == {
        name for name in dict(trainer.net.named_parameters()) if name.partition(".")[0] not in ("prep", "layer1")
    }
    assert "frozen: prep, layer1; " in session.log.text  # type: ignore[attr-defined]
    found = range_test(trainer, start=1e-4, end=1.0, steps=20, log=Lines(), bar=False)
    assert len(found.losses) >= 10

    def kept() -> None:
        now = state_of(session, "prep", "layer1")
        assert all(torch.equal(now[name], before[name]) for name in now if not name.endswith("num_batches_tracked"))
        assert all(p.grad is None for name, p in trainer.net.named_parameters() if name not in trained)

    kept()
    schedule = OneCycle(0.1, 0.01, trainer.steps_per_epoch, 2 * trainer.steps_per_epoch)
    trainer.train_epoch(0, schedule, StepMeter(0, trainer.steps_per_epoch, torch.device("cpu")))
    trainer.evaluate()
    kept()
    modes = {part: trainer.net.get_submodule(part).training for part in PARTS}
    assert modes == {part: part not in ("prep", "layer1") for part in PARTS}
    after = state_of(session, "layer2", "layer3", "classifier")
    assert not any(torch.equal(after[name], rest[name]) for name in after)
    assert trainer.ema is not None
    averaged = trainer.ema.module.state_dict()
    assert all(torch.equal(averaged[name], before[name]) for name in before if not name.endswith("num_batches_tracked"))


def test_an_interrupted_fine_tuning_goes_on_without_the_run_that_it_began_with(
    source: Path, quick_config: Config, tmp_path: Path, arm: Arm
) -> None:
    origin = tmp_path / "origin"
    shutil.copytree(source, origin)
    frozen = {"net.init": str(origin), "net.freeze": "prep,layer1", "train.ema_decay": 0.9}
    config = changed(quick_config, {**FOUR, **frozen, "run.checkpoint_every": 1})
    fit(config, tmp_path / "whole", log=Lines())

    arm("step", stop_before(7))  # an epoch has 4 steps
    with pytest.raises(Stop):
        fit(config, tmp_path / "parts", log=Lines())
    disarm()
    shutil.rmtree(origin)
    fit(config, tmp_path / "parts", log=Lines(), resume=True)
    whole, parts = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    for part in ("model", "ema", "optimizer"):
        assert_same(parts[part], whole[part])
    for values, words in (
        ({"net.freeze": "prep"}, r"net\.freeze: prep,layer1 -> prep"),
        ({"net.init": "elsewhere"}, r"net\.init: .*origin -> elsewhere"),
    ):
        with pytest.raises(ConfigError, match=words):
            fit(changed(config, values), tmp_path / "whole", log=Lines(), resume=True)


def test_the_names_of_parts_are_checked_before_anything_else(tmp_path: Path) -> None:
    for value, words in (
        ("layr1", r"net\.freeze: 'layr1': unknown part, did you mean layer1\?"),
        ("prep,body", r"net\.freeze: 'body': unknown part; known: prep, layer1"),
        (",".join(PARTS), r"net\.freeze: names all parts of the network, and leaves none to train"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config("quickstart", [f"net.freeze={value}"])
    config = load_config("quickstart", ["net.freeze= prep, layer1,prep", "net.init=010"])
    assert parts_of(config.net.freeze) == ("prep", "layer1") and config.net.init == "010"


def test_the_parts_are_those_of_the_network_that_have_weights_to_train() -> None:
    for options in (NetOptions(width=2), NetOptions(width=2, whitening=True)):
        net = networks.build(options, 3)
        trained = [name for name, part in net.named_children() if any(p.requires_grad for p in part.parameters())]
        assert tuple(trained) == PARTS


def test_freezing_without_another_runs_weights_is_said(made: Callable[..., Session]) -> None:
    session = made({**FOUR, "net.freeze": "prep"})
    assert "WARNING: net.freeze: without net.init, prep stay as they are drawn" in session.log.text  # type: ignore[attr-defined]


def test_batch_norm_over_processes_stays_frozen() -> None:
    net = networks.build(NetOptions(width=2, norm_scale="frozen"), 3)
    net.freeze(("layer1",))
    before = {name: p.requires_grad for name, p in net.named_parameters()}
    modes = {name: part.training for name, part in net.named_modules()}
    assert synchronise_batch_norm(net, torch.device("cpu")) is net
    assert {name: p.requires_grad for name, p in net.named_parameters()} == before
    assert {name: part.training for name, part in net.named_modules()} == modes
    assert len(net.running_statistics()) == 2 * 5
