"""The configuration: every way of getting it wrong is one line, exit code 2, before any work starts."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from places import CONFIGS, ROOT

from train.config import (
    KEYS,
    Config,
    ConfigError,
    changed,
    changes,
    checkpoint_interval,
    from_dict,
    help_text,
    load_config,
    to_dict,
    to_yaml,
)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnop", "bcdefghijklmnopq", strict=True)
)

BAD_FILES = {
    "empty": ("", "is empty"),
    "only a comment": ("# nothing\n", "is empty"),
    "a list": ("- 1\n- 2\n", "holds a list"),
    "a word": ("train\n", "holds a str"),
    "not UTF-8": (b"train:\n  seed: \xff\n", "not UTF-8"),
    "a tab": ("train:\n\tepochs: 3\n", "line 2"),
    "duplicate key": ("train: {epochs: 1, epochs: 2}", "epochs: given twice"),
    "duplicate section": ("train: {epochs: 1}\ntrain: {epochs: 2}", "train: given twice"),
    "unknown section": ("trian: {epochs: 1}", "did you mean train?"),
    "unknown key": ("optim: {weight_decy: 1}", "optim.weight_decy: unknown key, did you mean weight_decay?"),
    "section without keys": ("train:\n", "train: expected keys below it"),
    "number for text": ("train: {precision: 16}", "train.precision: 16"),
    "text for number": ("train: {epochs: many}", "train.epochs: 'many'"),
    "quoted number": ("train: {epochs: '3'}", "train.epochs: '3' (text)"),
    "bool for int": ("train: {epochs: true}", "train.epochs: True"),
    "bool for float": ("optim: {momentum: yes}", "optim.momentum: True"),
    "int for bool": ("optim: {nesterov: 1}", "optim.nesterov: 1"),
    "float for int": ("train: {epochs: 2.5}", "train.epochs: 2.5"),
    "exponent for int": ("train: {epochs: 1e-3}", "train.epochs: 0.001"),
    "NaN": ("optim: {weight_decay: .nan}", "not a finite number"),
    "400 digits": (f"train: {{epochs: 1{'0' * 400}}}", "a number of 401 digits is out of range"),
    "infinity": ("schedule: {lr_max: .inf}", "not a finite number"),
    "negative": ("optim: {weight_decay: -1e-4}", "must be at least 0"),
    "zero": ("train: {batch_size: 0}", "must be at least 1"),
    "zero rate": ("schedule: {lr_max: 0}", "must be above 0"),
    "a word for a rate": ("schedule: {lr_max: search}", "neither a number nor 'find'"),
    "peak after the end": ("train: {epochs: 3}\nschedule: {peak_epoch: 5}", "lies after the end"),
    "lr_min above lr_max": ("schedule: {lr_max: 0.1, lr_min: 0.2}", "is above"),
    "nesterov without momentum": ("optim: {momentum: 0}", "needs optim.momentum"),
    "alias bomb": (BOMB, "aliases"),
    "python object": ("train: !!python/object:os.system {}", "tag"),
    "deep nesting": ("[" * 100_000, "nested too deeply"),
    "a list as key": ("train: {? [1, 2] : 3}", "plain word"),
    "null": ("train: {epochs: }", "train.epochs: None"),
    "bad interval": ("run: {checkpoint_every: 10m}", "checkpoint_every"),
    "impossible date": ("train: {seed: 2001-99-99}", "month"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_clear_line(case: str, tmp_path: Path) -> None:
    text, expected = BAD_FILES[case]
    path = write(tmp_path, text)
    begun = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 3


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)


BAD_OVERRIDES = {
    "train.epoch=3": "did you mean train.epochs?",
    "epochs=3": "did you mean train.epochs?",
    "train.epochs": "expected section.key=value",
    "train.epochs=": "train.epochs",
    "train.epochs=[1": "cannot be read",
    "train.epochs=[1]": "not of type int",
    "train.precision=fp8": "fp32 | bf16 | fp16",
    "optim.momentum=1": "below 1",
    "schedule.peak_epoch=99": "after the end",
}


@pytest.mark.parametrize("word", BAD_OVERRIDES)
def test_bad_override_is_one_clear_line(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "quickstart.yaml", [word])
    assert BAD_OVERRIDES[word] in str(caught.value) and "\n" not in str(caught.value)


def test_override_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        load_config(CONFIGS / "quickstart.yaml", ["train.epochs=3", "train.epochs=4"])


def test_overrides_replace_and_keep_their_types() -> None:
    words = [
        "train.epochs=9",
        "schedule.lr_max=1e-1",
        "run.dir=a=b",
        "data.root=007",
        "train.compile=off",
        "net.width=0x10",
    ]
    config = load_config(CONFIGS / "onecycle.yaml", words)
    assert (config.train.epochs, config.schedule.lr_max, config.net.width) == (9, 0.1, 16)
    assert (config.run.dir, config.data.root, config.train.compile) == ("a=b", "007", "off")


def test_the_assignment_recipe_is_what_the_recipe_file_says() -> None:
    config = load_config(CONFIGS / "onecycle.yaml")
    assert (config.train.epochs, config.train.batch_size, config.schedule.peak_epoch) == (24, 512, 5.0)
    assert (config.schedule.lr_max, config.schedule.lr_min) == ("find", "find")
    augment = config.augment
    assert (augment.crop, augment.pad, augment.flip, augment.cutout) == (True, 4, True, 8)
    assert config.net.width == 64


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_loads_and_names_its_command(path: Path) -> None:
    load_config(path)
    assert f"python -m train --config configs/{path.name}" in path.read_text(encoding="utf-8").split("\n\n")[0]


def test_help_names_every_key_with_default_and_meaning() -> None:
    text = help_text()
    for name, (field, _) in KEYS.items():
        assert f"  {name}=" in text
        assert field.metadata["help"] in text


numbers = st.floats(1e-6, 10, allow_nan=False)


@given(
    width=st.integers(1, 1024),
    momentum=st.floats(0.1, 0.99),
    decay=st.floats(0, 1),
    rates=st.tuples(numbers, numbers),
    epochs=st.integers(5, 10_000),
    flags=st.tuples(st.booleans(), st.booleans()),
    folder=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20),
)
def test_yaml_round_trip_gives_an_equal_configuration(
    width: int,
    momentum: float,
    decay: float,
    rates: tuple[float, float],
    epochs: int,
    flags: tuple[bool, bool],
    folder: str,
) -> None:
    values = {
        "net.width": width,
        "optim.momentum": momentum,
        "optim.weight_decay": decay,
        "schedule.lr_min": min(rates),
        "schedule.lr_max": max(rates),
        "train.epochs": epochs,
        "augment.flip": flags[0],
        "train.tta": flags[1],
        "run.dir": folder,
    }
    config = changed(Config(), values)
    tree = to_dict(config)
    for name, value in values.items():
        section, key = name.split(".")
        assert tree[section][key] == value
    assert from_dict(yaml.safe_load(to_yaml(config))) == config
    assert from_dict(to_dict(config)) == config


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_any_tree_gives_a_configuration_or_a_config_error(tree: object) -> None:
    try:
        from_dict(tree)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


@given(
    st.sampled_from(sorted(KEYS)),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers()),
)
def test_any_value_of_any_key_is_taken_or_named(name: str, value: object) -> None:
    section, key = name.split(".")
    try:
        config = from_dict({section: {key: value}})
    except ConfigError as error:
        assert section in str(error) or key in str(error)
    else:
        assert to_yaml(config)


# what a run may be resumed with another value of
RESUMABLE = {
    "data.root",
    "data.download",
    "data.backend",
    "train.eval_batch_size",
    "train.tta",
    "run.dir",
    "run.analyse",
    "run.tensorboard",
    "run.checkpoint_every",
}


def test_every_key_says_what_another_value_changes() -> None:
    said = {name: changes(name) for name in KEYS}
    assert set(said.values()) <= {"result", "rounding", "speed", "nothing"}
    assert {name for name, what in said.items() if what in ("speed", "nothing")} == RESUMABLE
    assert {name for name, what in said.items() if what == "rounding"} == {
        f"train.{key}" for key in ("device", "precision", "compile", "channels_last", "deterministic")
    }


def test_changed_gives_another_configuration_and_leaves_the_one_it_was_given() -> None:
    before = Config()
    after = changed(before, {"train.epochs": 7, "data.name": "digits"})
    assert (after.train.epochs, after.data.name) == (7, "digits")
    assert before == Config() and changed(after, {"train.epochs": 24, "data.name": "cifar10"}) == before


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train.epoch": 3}, "train.epoch: unknown key, did you mean train.epochs?"),
        ({"epochs": 3}, "epochs: unknown key"),
        ({"train.epochs": "many"}, "train.epochs: 'many'"),
        ({"train.epochs": 3}, "lies after the end"),
        ({"optim.momentum": 1}, "below 1"),
    ],
)
def test_changed_checks_like_a_file(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(Config(), values)
    assert said in str(caught.value)


def test_a_configuration_cannot_be_changed_in_place() -> None:
    config = Config()
    for section in fields(config):
        part = getattr(config, section.name)
        with pytest.raises(FrozenInstanceError):
            setattr(config, section.name, part)
        for key in fields(part):
            with pytest.raises(FrozenInstanceError):
                setattr(part, key.name, getattr(part, key.name))


def test_checkpoint_interval_reads_steps_and_seconds() -> None:
    assert checkpoint_interval("epoch") == (None, None)
    assert checkpoint_interval(200) == (200, None)
    assert checkpoint_interval("60s") == (None, 60.0)
    for bad in ("0", 0, -3, "s", "1.5", "ten"):
        with pytest.raises(ConfigError):
            checkpoint_interval(bad)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "train", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_command_line_refuses_with_code_2_and_no_traceback() -> None:
    result = run("--config", "configs/quickstart.yaml", "train.epochs=none")
    assert result.returncode == 2
    assert result.stderr.startswith("error: train.epochs: 'none'")
    assert len(result.stderr.splitlines()) == 1
    assert not result.stdout


def test_print_config_prints_what_loads_back(tmp_path: Path) -> None:
    result = run("--config", "configs/quickstart.yaml", "train.seed=7", "--print-config")
    assert result.returncode == 0
    path = write(tmp_path, result.stdout)
    assert load_config(path) == load_config(CONFIGS / "quickstart.yaml", ["train.seed=7"])
