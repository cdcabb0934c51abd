"""The configuration: every way of getting it wrong is one line, exit code 2, before any work starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import typing
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from places import CONFIGS, ROOT

from train import schema
from train.config import (
    DATA,
    KEYS,
    Config,
    ConfigError,
    StrictLoader,
    changed,
    changes,
    check_batch_size,
    checkpoint_interval,
    find_recipe,
    from_dict,
    from_record,
    help_text,
    load_config,
    own_keys,
    recipes,
    reference_table,
    sources_of_key,
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
    "a word for a section": ("train: many\n", "train: expected keys below it, found 'many'"),
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
    "python object": ("train: !!python/object:os.system {}", "tags"),
    "a tag on nothing": ('train: {epochs: !!int ""}', "tags"),
    "a tag on a word": ("data: {download: !!bool maybe}", "tags"),
    "a tag on a key": ("train: {!!float epochs: 3}", "tags"),
    "a directive": ("%TAG ! tag:yaml.org,2002:\n---\ntrain: {epochs: !int 3}", "tags"),
    "a character NUL": ('run: {dir: "a\\0b"}', "run.dir: 'a\\x00b': a name cannot hold the character NUL"),
    "an empty path": ('run: {dir: ""}', "run.dir: is empty"),
    "another empty path": ("data: {root: ''}", "data.root: is empty"),
    "half a surrogate pair": (
        'data: {root: "a\\ud800"}',
        "data.root: 'a\\ud800': no file can bear this name, its character 2",
    ),
    "base sixty": ("train: {epochs: 1:30}", "train.epochs: '1:30' (text)"),
    "underscores": ("train: {epochs: 1_0}", "train.epochs: '1_0' (text)"),
    "hexadecimal": ("train: {epochs: 0x10}", "train.epochs: '0x10' (text)"),
    "a date": ("train: {seed: 2001-01-01}", "train.seed: '2001-01-01' (text)"),
    "too long": (f"train: {{epochs: 3}}\n#{'x' * 100_000}", "characters, and no recipe needs more than 100,000"),
    "deep nesting": ("[" * 100_000, "nested too deeply"),
    "a list as key": ("train: {? [1, 2] : 3}", "plain word"),
    "null": ("train: {epochs: }", "train.epochs: None"),
    "bad interval": ("run: {checkpoint_every: 10m}", "checkpoint_every"),
    "impossible date": ("train: {seed: 2001-99-99}", "train.seed: '2001-99-99' (text)"),
    "5000 digits": (f"run: {{checkpoint_every: {'9' * 5000}}}", "column 25: a number of 5000 digits is out of range"),
    "hexadecimal without end": (f"train: {{seed: 0x{'f' * 5000}}}", "fff... (text) is not of type int"),
    "a large square": ("augment: {cutout: 100000000000000000000}", "augment.cutout: 100000000000000000000 is out"),
    "a large batch": ("train: {eval_batch_size: 100000000000000000000}", "must be at most 1000000"),
    "a large interval": ("run: {checkpoint_every: 1000000000}", "must be at most 999999999"),
    "a long interval": (f"run: {{checkpoint_every: '{'9' * 5000}s'}}", "is none of epoch, a number of steps"),
    "a large number for a word": (
        f"train: {{tail: 1{'0' * 900}}}",
        "a number of 901 digits (whole number) is not one of",
    ),
    "a long word": (f"train: {{tail: {'x' * 5000}}}", "xxx... (text) is not one of drop | endless"),
    "a long key": (f"train: {{{'x' * 120}: 1}}", "xxx...: unknown key"),
    "a key of another data set": ("data: {synthetic_size: 64}", "data.synthetic_size: belongs to data.name=synthetic"),
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
    assert len(str(caught.value).removeprefix(str(path))) < 400
    assert time.monotonic() - begun < 3


def test_a_huge_file_and_what_is_no_file_are_refused_without_being_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    for name, said in (
        ("huge", "is of 1,099,511,627,776 bytes"),
        ("pipe", "is a named pipe"),
        ("device", "is a device"),
    ):
        with pytest.raises(ConfigError, match=rf"{name}\.yaml: {said}.*; expected a YAML file"):
            load_config(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("+7", 7), ("0", 0), ("1e1", 10.0), ("1.e1", 10.0), (".5", 0.5), ("0.5E+1", 5.0), ("-0.5e-1", -0.05)],
)
def test_numbers_are_decimal(tmp_path: Path, text: str, value: float) -> None:
    assert yaml.load(f"a: {text}", StrictLoader) == {"a": value}
    if isinstance(value, int):
        assert load_config(write(tmp_path, f"train: {{seed: {text}}}")).train.seed == value


@pytest.mark.parametrize(
    "name", ["2024_05_01", "007", "1:30", "2024-05-01", "1e3", "0x10", "true", "off", ".5", "=", "<<"]
)
def test_a_key_that_takes_text_keeps_what_was_written(tmp_path: Path, name: str) -> None:
    config = load_config(write(tmp_path, f"run:\n  dir: {name}\ndata:\n  root: {name}\n"))
    assert (config.run.dir, config.data.root) == (name, name)
    assert load_config(write(tmp_path, to_yaml(config))) == config


def test_a_section_whose_keys_are_all_commented_out_is_empty(tmp_path: Path) -> None:
    text = "train:\n  # epochs: 3\nnet:\ndata: ~\n"
    assert load_config(write(tmp_path, text)) == Config()
    assert not refused_by_schema(yaml.load(text, StrictLoader))


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml", "./quickstart"])
def test_a_name_without_a_file_is_the_recipe_of_that_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # a folder is no recipe
    assert find_recipe(name) == CONFIGS / "quickstart.yaml"
    assert load_config(name) == load_config(CONFIGS / "quickstart.yaml")


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_a_file_comes_before_the_recipe_of_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("train: {epochs: 11}\n")
    assert find_recipe(name) == Path(name)
    assert load_config(name).train.epochs == 11


@pytest.mark.parametrize("broken", ["a dangling link", "a broken file"])
def test_a_broken_file_is_not_passed_over_for_the_recipe_of_its_name(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if broken == "a broken file":
        Path("quickstart.yaml").write_text("train")
    else:
        Path("quickstart.yaml").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"^quickstart\.yaml: (no such file|holds a str)"):
        load_config("quickstart.yaml")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qickstart", "did you mean quickstart?"),
        ("configs/onecycel.yaml", "did you mean onecycle?"),
        ("runs/first/quickstart.yaml", "did you mean quickstart?"),  # a path into another folder means that file alone
        ("/configs/quickstart.yaml", "did you mean quickstart?"),
        ("zzz.yaml", "known: accurate96, cifar100, cpu, fast94, fast95, folder, onecycle, quickstart"),
        ("x" * 300, "File name too long"),
    ],
)
def test_an_unknown_recipe_names_the_nearest(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(name)
    assert str(caught.value).startswith(f"{name}: ") and said in str(caught.value)


def test_the_recipes_are_the_files_of_configs() -> None:
    assert recipes() == sorted(path.stem for path in CONFIGS.iterdir() if path.suffix == ".yaml")


BAD_OVERRIDES = {
    "train.epoch=3": "did you mean train.epochs?",
    "epochs=3": "did you mean train.epochs?",
    "train.epochs": "expected section.key=value",
    "train.epochs=": "train.epochs",
    "train.epochs=[1": "cannot be read",
    "train.epochs=[1]": "not of type int",
    "train.epochs=3\nseed: 4": "is more than one value",
    "train.precision=fp8": "fp32 | bf16 | fp16",
    "optim.momentum=1": "below 1",
    "schedule.peak_epoch=99": "after the end",
    "schedule.hold_epochs=1": "schedule.hold_epochs: 1 belongs to schedule.shape=trapezoid, here onecycle",
    "augment.cutout=100000000000000000000": "augment.cutout: 100000000000000000000 is out of range, must be at most 1024",
    "train.eval_batch_size=100000000000000000000": "out of range, must be at most 1000000",
    "run.checkpoint_every=" + "9" * 5000: "a number of 5000 digits is out of range",
    "run.checkpoint_every=" + "9" * 5000 + "s": "run.checkpoint_every: '9999",
    "data.synthetic_size=64": "data.synthetic_size: belongs to data.name=synthetic",
}


@pytest.mark.parametrize("word", BAD_OVERRIDES)
def test_bad_override_is_one_clear_line(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "quickstart.yaml", [word])
    said = str(caught.value)
    assert BAD_OVERRIDES[word] in said and "\n" not in said and len(said) < 300


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
        "net.width=016",
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


def test_every_number_of_every_key_has_a_lower_and_an_upper_bound() -> None:
    numbers = {name: f for name, (f, hint) in KEYS.items() if {int, float} & {hint, *typing.get_args(hint)}}
    assert {
        "train.seed",
        "optim.momentum",
        "data.validation",
        "schedule.lr_max",
        "run.checkpoint_every",
    } < numbers.keys()
    for name, f in numbers.items():
        assert ("at_least" in f.metadata) + ("above" in f.metadata) == 1, name
        assert ("at_most" in f.metadata) + ("below" in f.metadata) == 1, name


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("digits", [35, 400, 5000])
def test_no_number_without_end_gets_through(sign: int, digits: int) -> None:
    for name in KEYS:
        section, key = name.split(".")
        tree: dict[str, dict[str, object]] = {section: {key: sign * 10**digits}}
        if sources := sources_of_key(name):
            tree["data"]["name"] = sources[0]
        with pytest.raises(ConfigError) as caught:
            from_dict(tree)
        assert str(caught.value).startswith(f"{name}: ") and len(str(caught.value)) < 200


def test_each_data_set_has_its_own_keys() -> None:
    assert [name for name in KEYS if sources_of_key(name) == ("synthetic",)] == [
        "data.synthetic_size",
        "data.synthetic_classes",
        "data.synthetic_count",
    ]
    assert sources_of_key("data.image_size") == ("folder", "npz") and not sources_of_key("data.root")
    for name in DATA:
        recorded = yaml.safe_load(to_yaml(changed(Config(), {"data.name": name})))["data"]
        assert ("synthetic_size" in recorded) == (name == "synthetic")
        assert recorded["name"] == name and "validation" in recorded
    for text in (help_text(), reference_table()):
        assert "height and width of synthetic images (only with data.name=synthetic)" in text
        assert text.count("only with data.name") == sum(bool(sources_of_key(name)) for name in KEYS)
        assert "by hash (only with data.name=folder or npz)" in text


def test_keys_of_another_data_set_are_refused_in_recipes_and_overrides(tmp_path: Path) -> None:
    recipe = write(tmp_path, "data: {name: digits, synthetic_size: 32}")  # the default is refused too
    with pytest.raises(ConfigError) as caught:
        load_config(recipe)
    said = "data.synthetic_size: belongs to data.name=synthetic, here data.name=digits"
    assert str(caught.value) == f"{recipe}: {said}"
    with pytest.raises(
        ConfigError, match=r"data\.synthetic_count: belongs to data\.name=synthetic, here data\.name=cifar10"
    ):
        from_dict({"data": {"synthetic_count": 20}})
    # the order of overrides makes no difference
    words = ["data.synthetic_size=64", "data.name=synthetic"]
    config = load_config(CONFIGS / "quickstart.yaml", words)
    assert config == load_config(CONFIGS / "quickstart.yaml", words[::-1])
    assert to_dict(config)["data"]["synthetic_size"] == 64
    with pytest.raises(ConfigError, match=r"belongs to data\.name=synthetic"):
        changed(Config(), {"data.synthetic_size": 64})


def test_with_another_data_name_the_keys_of_the_one_before_go() -> None:
    noise = changed(Config(), {"data.name": "synthetic", "data.synthetic_size": 64})
    assert changed(noise, {"data.name": "cifar10"}) == Config()
    with pytest.raises(ConfigError, match=r"belongs to data\.name=synthetic, here data\.name=digits"):
        changed(noise, {"data.name": "digits", "data.synthetic_size": 64})


# what versions recorded that wrote the keys of all data sets
ALL_KEYS = {"synthetic_size": 64, "synthetic_classes": 10, "synthetic_count": 50000}


def test_keys_of_other_data_sets_in_the_record_of_a_run_are_left_out_with_a_note(tmp_path: Path) -> None:
    config = changed(Config(), {"data.name": "digits", "train.batch_size": 64})
    record = to_dict(config)
    record["data"] |= ALL_KEYS
    said: list[str] = []
    assert from_record(record, said.append) == config
    assert said == [
        "left out, as data.name=digits has no such keys: "
        "data.synthetic_size, data.synthetic_classes, data.synthetic_count"
    ]
    assert record["data"].keys() > ALL_KEYS.keys(), "the record stays as it was"

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(record, sort_keys=False))
    with pytest.raises(ConfigError, match=r"data\.synthetic_size: belongs to data\.name=synthetic"):
        load_config(path)  # no run lies here
    (tmp_path / "environment.json").write_text("{}")
    assert load_config(path, say=said.append) == load_config(path) == config
    assert said[1:] == [f"{path}: {said[0]}"]
    # with the data set that they belong to they count
    assert to_dict(load_config(path, ["data.name=synthetic"], said.append))["data"]["synthetic_size"] == 64
    with pytest.raises(ConfigError, match=r"belongs to data\.name=synthetic, here data\.name=digits"):
        load_config(path, ["data.synthetic_size=64"])
    assert len(said) == 2


def test_a_record_without_keys_of_other_data_sets_is_taken_without_a_word() -> None:
    for tree in (to_dict(Config()), to_dict(changed(Config(), {"data.name": "synthetic"})), {}, None, {"data": 3}):
        assert own_keys(tree) == (tree, None)


# The schema for editors


def refused_by_schema(tree: object) -> list[str]:
    validator = jsonschema.Draft202012Validator(json.loads(schema.PATH.read_text(encoding="utf-8")))
    return [error.message for error in validator.iter_errors(tree)]


def test_the_schema_is_current_and_a_schema() -> None:
    assert schema.PATH.read_text(encoding="utf-8") == schema.text(), "python -m train.schema writes it anew"
    jsonschema.Draft202012Validator.check_schema(schema.schema())


def test_the_schema_describes_every_key() -> None:
    sections = schema.schema()["properties"]
    assert [f"{section}.{key}" for section, content in sections.items() for key in content["properties"]] == list(KEYS)
    for name, (f, _) in KEYS.items():
        section, key = name.split(".")
        described = sections[section]["properties"][key]
        assert described["description"] == f.metadata["help"] and described["default"] == f.default


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_names_the_schema_and_passes_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.splitlines()[0] == "# yaml-language-server: $schema=schema.json"
    assert refused_by_schema(yaml.load(text, StrictLoader)) == []
    assert refused_by_schema(to_dict(load_config(path))) == []


# what takes two keys or a number that JSON does not have
BEYOND_A_SCHEMA = {"NaN", "peak after the end", "lr_min above lr_max", "nesterov without momentum"}
# what no file can be called, and a file's length
BEYOND_A_SCHEMA |= {"a character NUL", "half a surrogate pair", "too long"}


@pytest.mark.parametrize("case", BAD_FILES)
def test_what_one_key_gets_wrong_is_wrong_by_the_schema_too(case: str) -> None:
    content, _ = BAD_FILES[case]
    try:
        tree = yaml.load(content, StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return  # no YAML, with or without a schema
    assert bool(refused_by_schema(tree)) == (case not in BEYOND_A_SCHEMA)


def test_the_schema_has_the_keys_of_a_data_set_where_it_is_chosen() -> None:
    assert refused_by_schema({"data": {"name": "synthetic", "synthetic_size": 64}}) == []
    for data in ({"synthetic_size": 64}, {"name": "digits", "synthetic_size": 64}):
        assert refused_by_schema({"data": data}) == ["False schema does not allow 64"]


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
    tree = {section: {key: value}}
    sources = sources_of_key(name)
    if sources:
        tree["data"]["name"] = sources[0]
    try:
        config = from_dict(tree)
    except ConfigError as error:
        # one number of images may be too few for another key's batch
        few = sources and f"training images of {sources[0]}" in str(error)
        assert section in str(error) or key in str(error) or few
    else:
        assert to_yaml(config) and not refused_by_schema(to_dict(config))


# what a run may be resumed with another value of
RESUMABLE = {
    "data.root",
    "data.download",
    "data.backend",
    "data.resident",
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
        f"train.{key}" for key in ("device", "precision", "compile", "step_graph", "channels_last", "deterministic")
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


def test_help_names_the_recipes() -> None:
    result = run("--help")
    assert all(name in result.stdout.split("options:")[1].split("--print-config")[0] for name in recipes())


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


@pytest.mark.parametrize(("images", "fitting"), [(14, 8), (64, 64), (1, 1), (50_000, 32_768)])
def test_a_batch_of_more_images_than_there_are_is_refused_with_one_that_fits(images: int, fitting: int) -> None:
    check_batch_size(fitting, images, "folder")
    with pytest.raises(
        ConfigError, match=f"more than the {images} training images of folder; train.batch_size={fitting} fits"
    ):
        check_batch_size(images + 1, images, "folder")
