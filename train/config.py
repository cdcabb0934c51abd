"""The configuration: loads a recipe from YAML and `key=value` overrides, and checks it against the dataclasses of its sections,
which lie beside what they configure. Imports no torch."""

from __future__ import annotations

import difflib
import math
import operator
import os
import re
import stat
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from dali_pipeline.errors import UserError, path_problem
from dali_pipeline.options import DataOptions
from dali_pipeline.plan import Augment
from dali_pipeline.regular import NotARegularFile, TooLarge, read_regular
from dali_pipeline.sources import data_sections, source_of
from net.options import PARTS, NetOptions, parts_of
from train.options import CHECKPOINT_EVERY, Changes, OptimOptions, RunOptions, ScheduleOptions, TrainOptions

MOST_CHARACTERS = 100_000  # of a recipe


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used. The message is one line: the file or override, the key, the value and the remedy."""


def checkpoint_interval(every: str | int) -> tuple[int | None, float | None]:
    """run.checkpoint_every as (steps, seconds), both None for "epoch". Raises ConfigError for anything else."""
    text = str(every)
    if not re.fullmatch(CHECKPOINT_EVERY, text):
        raise ConfigError(
            f"run.checkpoint_every: {_shown(every)} is none of epoch, a number of steps (200), a number of seconds (60s)"
        )
    if text == "epoch":
        return None, None
    return (None, float(text[:-1])) if text.endswith("s") else (int(text), None)


def _shown(value: Any) -> str:
    """A value as an error message shows it, shortened where it is too long to read."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write out whole numbers of more than 4,300 digits
        return "a number of more than 4300 digits"
    if type(value) is int and len(text) > 40:
        return f"a number of {len(text.lstrip('-'))} digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


DATA = data_sections()
SECTIONS: dict[str, type] = {
    "data": DATA[DataOptions().name],  # where no data.name is given
    "augment": Augment,
    "net": NetOptions,
    "optim": OptimOptions,
    "schedule": ScheduleOptions,
    "train": TrainOptions,
    "run": RunOptions,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole recipe, with a value for every key. A run folder's config.yaml holds exactly this."""

    data: DataOptions = field(default_factory=SECTIONS["data"])
    augment: Augment = field(default_factory=Augment)
    net: NetOptions = field(default_factory=NetOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    run: RunOptions = field(default_factory=RunOptions)


def _keys() -> dict[str, tuple[Field[Any], Any]]:
    """Every `section.key`, of every data set, with its dataclass field and its type."""
    found: dict[str, tuple[Field[Any], Any]] = {}
    for section, default in SECTIONS.items():
        for cls in (default, *DATA.values()) if section == "data" else (default,):
            hints = typing.get_type_hints(cls)
            for f in fields(cls):
                found.setdefault(f"{section}.{f.name}", (f, hints[f.name]))
    return found


KEYS = _keys()
_TYPE_NAMES = {
    str: "text",
    bool: "true or false",
    int: "whole number",
    float: "number",
    type(None): "null",
    dict: "keys",
}
_BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


def changes(name: str) -> Changes:
    """What changing the value of the key `section.key` changes about a run: result, rounding, speed, or nothing."""
    return cast(Changes, KEYS[name][0].metadata.get("changes", "result"))


def sources_of_key(name: str) -> tuple[str, ...]:
    """Each data.name that the key `section.key` belongs to; none where it belongs to all, or is unknown."""
    return cast("tuple[str, ...]", KEYS[name][0].metadata.get("sources", ())) if name in KEYS else ()


def _takes_float(hint: Any) -> bool:
    """Whether a whole number given for the key is to be converted to a float."""
    arms = (hint, *typing.get_args(hint))
    return float in arms and int not in arms


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(typing.get_args(hint))
    if is_union(hint):
        return " | ".join(_describe(arm) for arm in typing.get_args(hint))
    names = {int: "int", float: "float", bool: "true | false", str: "text", type(None): "null"}
    return names[hint]


def _default_and_values(f: Field[Any], hint: Any) -> tuple[str, str]:
    """A key's default and its type with its bounds, as a person reads them."""
    default = "null" if f.default is None else str(f.default).lower() if isinstance(f.default, bool) else str(f.default)
    bounds = [f"{bound.replace('_', ' ')} {f.metadata[bound]}" for bound in _BOUNDS if bound in f.metadata]
    return default, ", ".join([_describe(hint), *bounds])


def _meaning(f: Field[Any]) -> str:
    """What a key means, and which data set it belongs to if not to all."""
    sources = " or ".join(f.metadata.get("sources", ()))
    return f"{f.metadata['help']} (only with data.name={sources})" if sources else str(f.metadata["help"])


def help_text() -> str:
    """All keys, a paragraph a section: key, type, default, meaning."""
    lines = []
    for section, cls in SECTIONS.items():
        lines.append(f"{section}: {(cls.__doc__ or '').splitlines()[0]}")
        for name, (f, hint) in KEYS.items():
            if name.startswith(section + "."):
                default, values = _default_and_values(f, hint)
                lines.append(f"  {name}={default}  ({values})")
                lines.append(f"      {_meaning(f)}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _nearest(name: str, candidates: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else f"; known: {', '.join(candidates)}"


def _word(key: Any) -> str:
    """A section or key as an error message shows it."""
    return key if isinstance(key, str) and len(key) <= 80 else _shown(key)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value is of the type that the key declares; a bool is no number, text is no number."""
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if is_union(hint):
        return any(_fits(value, arm) for arm in typing.get_args(hint))
    if hint is float:
        return type(value) in (int, float)
    if hint is str:
        # a whole number may be a name, such as run.dir=2024
        return type(value) is str or (type(value) is int and abs(value) < 10**20)
    return type(value) is hint


def _check_value(name: str, value: Any) -> None:
    f, hint = KEYS[name]
    if not _fits(value, hint):
        words = [word for arm in typing.get_args(hint) for word in typing.get_args(arm)]
        if isinstance(value, str) and words and _takes_float(hint):
            raise ConfigError(f"{name}: {_shown(value)} is neither a number nor {', '.join(map(repr, words))}")
        wanted = _describe(hint)
        wanted = f"one of {wanted}" if "|" in wanted else f"of type {wanted}"
        found = _TYPE_NAMES.get(type(value), type(value).__name__)
        raise ConfigError(f"{name}: {_shown(value)} ({found}) is not {wanted}")
    if value == "":
        raise ConfigError(
            f"{name}: is empty, as where a variable of the shell is not set; give a value or leave the key out"
        )
    if isinstance(value, str) and (problem := path_problem(value)):
        raise ConfigError(f"{name}: {_shown(value)}: {problem}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}: {value} is not a finite number")
    for bound, holds in _BOUNDS.items():
        if bound in f.metadata and not holds(value, f.metadata[bound]):
            must = f"must be {bound.replace('_', ' ')} {f.metadata[bound]}"
            raise ConfigError(f"{name}: {_shown(value)} is out of range, {must}")


def _check_tree(tree: Any) -> dict[str, dict[str, Any]]:
    """Check the sections, keys, types and ranges of what was parsed from YAML. Returns it with the words "on" and "off" restored
    where YAML read them as booleans. Raises ConfigError."""
    if tree is None:
        raise ConfigError("is empty; expected sections such as 'train:'")
    if not isinstance(tree, dict):
        raise ConfigError(f"holds a {type(tree).__name__}, expected sections such as 'train:'")
    for section, content in tree.items():
        if section not in SECTIONS:
            word = _word(section)
            raise ConfigError(f"{word}: unknown section{_nearest(word, list(SECTIONS))}")
        if content is None:  # all its keys are commented out
            tree[section] = content = {}
        if not isinstance(content, dict):
            raise ConfigError(f"{section}: expected keys below it, found {_shown(content)}")
        for key, value in content.items():
            name = f"{section}.{_word(key)}"
            if name not in KEYS:
                known = [k.split(".", 1)[1] for k in KEYS if k.startswith(section + ".")]
                raise ConfigError(f"{name}: unknown key{_nearest(_word(key), known)}")
            words = typing.get_args(KEYS[name][1])
            # YAML reads off, on, no and yes as booleans: give such a value back its word where a word is wanted
            if isinstance(value, bool) and "off" in words:
                content[key] = value = "off" if not value else "on"
            _check_value(name, value)
            if type(value) is int and not {int, float} & {KEYS[name][1], *words}:
                content[key] = str(value)
    return tree


def check_batch_size(batch_size: int, images: int, name: str) -> None:
    """Raises ConfigError where a batch holds more images than the data set `name` has for training."""
    if batch_size > images:
        fitting = 1 << max(images.bit_length() - 1, 0)
        raise ConfigError(
            f"train.batch_size: {batch_size} is more than the {images} training images of {name}; train.batch_size={fitting} fits"
        )


def _check_together(config: Config) -> None:
    """Checks that involve more than one key. Raises ConfigError."""
    checkpoint_interval(config.run.checkpoint_every)
    schedule, train, optim = config.schedule, config.train, config.optim
    source = source_of(config.data)
    # where it is known without reading the data, a wrong size is refused before torch is imported or anything downloaded
    images = source.training_images()
    if images is not None:
        check_batch_size(train.batch_size, images, config.data.name)
    held = config.data.validation
    if isinstance(held, float) and held >= 1:
        raise ConfigError(
            f"data.validation: {held:g} is neither a fraction below 1 nor a whole number of images, such as 5000"
        )
    if isinstance(held, int) and images is not None and held >= images:
        raise ConfigError(f"data.validation: {held} leaves none of the {images} training images of {config.data.name}")
    try:
        source.check()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if schedule.peak_epoch > train.epochs:
        raise ConfigError(
            f"schedule.peak_epoch: {schedule.peak_epoch:g} lies after the end of the training "
            f"(train.epochs={train.epochs}); lower it or train longer"
        )
    if schedule.hold_epochs and schedule.shape != "trapezoid":
        raise ConfigError(
            f"schedule.hold_epochs: {schedule.hold_epochs:g} belongs to schedule.shape=trapezoid, here {schedule.shape}"
        )
    if schedule.peak_epoch + schedule.hold_epochs > train.epochs:
        raise ConfigError(
            f"schedule.hold_epochs: {schedule.hold_epochs:g} after schedule.peak_epoch={schedule.peak_epoch:g} lies beyond the "
            f"end of the training (train.epochs={train.epochs}); lower one of them or train longer"
        )
    if isinstance(schedule.lr_max, float) and isinstance(schedule.lr_min, float) and schedule.lr_min > schedule.lr_max:
        raise ConfigError(f"schedule.lr_min: {schedule.lr_min:g} is above schedule.lr_max={schedule.lr_max:g}")
    if schedule.find_start >= schedule.find_end:
        raise ConfigError(
            f"schedule.find_start: {schedule.find_start:g} is not below schedule.find_end={schedule.find_end:g}"
        )
    if optim.filters == "muon" and not (isinstance(schedule.lr_max, float) and isinstance(schedule.lr_min, float)):
        raise ConfigError(
            "optim.filters: muon needs schedule.lr_max and schedule.lr_min as numbers: the range test finds the rates of SGD, "
            "and Muon's (optim.muon_lr) follows the schedule between them"
        )
    if optim.nesterov and optim.momentum == 0:
        raise ConfigError("optim.nesterov: true needs optim.momentum above 0")
    frozen = parts_of(config.net.freeze)
    for part in frozen:
        if part not in PARTS:
            raise ConfigError(f"net.freeze: {_shown(part)}: unknown part{_nearest(part, PARTS)}")
    if set(frozen) == set(PARTS):
        raise ConfigError("net.freeze: names all parts of the network, and leaves none to train")
    if config.augment.crop and config.augment.padding_mode == "reflect" and config.augment.pad >= 32:
        raise ConfigError(
            f"augment.pad: {config.augment.pad} is too wide to reflect images of 32 pixels, must be below 32"
        )


# The folder beside this package, in a checkout and installed. It is not imported, because another project may have a package
# `configs` too.
_RECIPES = Path(__file__).resolve().parent.parent / "configs"


def recipes() -> list[str]:
    """The names of the recipes that come with this package."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """The file that `--config NAME` means: NAME itself where a file lies there, else the recipe of that name that comes with
    this package, as `quickstart`, `quickstart.yaml` or `configs/quickstart.yaml`. Raises ConfigError where there is neither."""
    path, known = Path(name), recipes()
    try:
        folder = stat.S_ISDIR(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        folder = None
    except OSError:
        folder = False  # reading it will raise the error that says what is wrong
    if folder is False:
        return path
    wanted = path.name.removesuffix(".yaml")
    if path.parent in (Path(), Path("configs")) and wanted in known:
        return _RECIPES / f"{wanted}.yaml"
    if folder:
        raise ConfigError(f"{name}: is a folder, expected a YAML file")
    raise ConfigError(f"{name}: no such file, and no recipe of that name{_nearest(wanted, known)}")


def _read_yaml(path: Path) -> Any:
    try:
        text = read_regular(path, at_most=4 * MOST_CHARACTERS).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError("no such file") from None
    except (NotARegularFile, TooLarge) as error:
        raise ConfigError(f"{error.strerror}; expected a YAML file of a few kilobytes") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    return _parse_yaml(text)


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter, and with the plain scalars of YAML 1.2: numbers are decimal, with or without an exponent.

    By YAML 1.1, PyYAML's own reads 010 as 8, 1:30 as 90, 2024_05_01 as 20240501, 1e-3 as text and 2024-05-01 as a date. It keeps
    the last of two equal keys, expands aliases without bound ("billion laughs"), and for tags raises whatever comes.
    """

    yaml_implicit_resolvers = {}  # type: ignore[misc]  # noqa: RUF012 - PyYAML's name for them, filled below
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = "aliases (*name) are not accepted"
        elif getattr(event, "tag", None) is not None:
            problem = "tags (such as !!int) are not accepted"
        elif self._depth > 10:
            problem = "is nested too deeply"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > 1000:
            problem = f"a number of {len(node.value)} digits is out of range"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return int(node.value)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key.start_mark)
            if key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"{_word(key.value)}: given twice", key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_yaml_int)
for _kind, _pattern, _first in (
    ("null", r"(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    # a bare off or on is a boolean here, and is given back where a key wants the word
    ("bool", r"(?i:yes|no|true|false|on|off)$", list("yYnNtTfFoO")),
    ("int", r"[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$", list("-+.")),
):
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), _first)


def _parse_yaml(text: str) -> Any:
    if len(text) > MOST_CHARACTERS:  # the parser takes seconds for a megabyte
        raise ConfigError(f"has {len(text):,} characters, and no recipe needs more than {MOST_CHARACTERS:,}")
    try:
        loader = StrictLoader(text)
        try:
            node = loader.get_single_node()
            _keep_text(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{problem}") from None


def _keep_text(node: Any) -> None:
    """Mark the values of keys that take text as text, so that a folder called 007, 1e3 or true keeps its name."""
    for section, keys in _pairs(node):
        for key, value in _pairs(keys):
            hint = KEYS[name][1] if (name := f"{section.value}.{key.value}") in KEYS else None
            takes_text = str in (hint, *typing.get_args(hint)) and int not in typing.get_args(hint)
            if takes_text and isinstance(value, yaml.ScalarNode) and value.tag != "tag:yaml.org,2002:null":
                value.tag = "tag:yaml.org,2002:str"


def _pairs(node: Any) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """The keys that are words, with their values, of a node that is a mapping; else none."""
    found = node.value if isinstance(node, yaml.MappingNode) else []
    return [pair for pair in found if isinstance(pair[0], yaml.ScalarNode)]


def _parse_override(word: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    if not equals:
        raise ConfigError(f"{word}: expected section.key=value, for instance train.epochs=3")
    if name not in KEYS:
        raise ConfigError(f"{name}: unknown key{_nearest(name, list(KEYS)) if '.' in name else _suggest_section(name)}")
    if name in ("data.root", "data.table", "net.init", "run.dir"):
        return name, None if text == "null" else text  # a path is taken as typed
    try:
        parsed = _parse_yaml(f"value: {text}")
        if len(parsed) > 1:
            raise ConfigError("is more than one value")
        value = parsed["value"]
    except ConfigError as error:
        raise ConfigError(f"{name}: {_shown(text)} cannot be read: {error}") from None
    return name, value


def _suggest_section(key: str) -> str:
    owners = [name for name in KEYS if name.split(".", 1)[1] == key]
    return f", did you mean {owners[0]}?" if owners else _nearest(key, list(KEYS))


def from_dict(tree: Any) -> Config:
    """Build a Config from nested plain dicts (a parsed YAML file); missing keys take defaults.

    Raises ConfigError for anything unknown, ill-typed or out of range, and for keys of another data set than data.name.
    """
    checked = _check_tree(tree)
    source = _data_name(checked)
    for key in _foreign(checked):
        name = f"data.{key}"
        raise ConfigError(f"{name}: belongs to data.name={' or '.join(sources_of_key(name))}, here data.name={source}")
    sections = {}
    for section, cls in {**SECTIONS, "data": DATA[source]}.items():
        values = {
            key: float(value) if type(value) is int and _takes_float(KEYS[f"{section}.{key}"][1]) else value
            for key, value in checked.get(section, {}).items()
        }
        try:
            sections[section] = cls(**values)
        except ValueError as error:  # of two keys that each have a value of their own
            raise ConfigError(str(error)) from None
    config = Config(**sections)
    _check_together(config)
    return config


def _data_name(tree: Mapping[str, Any]) -> Any:
    return tree.get("data", {}).get("name", DataOptions().name)


def _foreign(tree: Mapping[str, Any]) -> list[str]:
    """The keys below `data:` that belong to another data set than that of data.name."""
    keys = [key for key in tree.get("data", {}) if isinstance(key, str)]
    name = _data_name(tree)
    return [key for key in keys if name not in (sources_of_key(f"data.{key}") or (name,))]


def own_keys(tree: Any, given: Collection[str] = ()) -> tuple[Any, str | None]:
    """The recipe that a run has written, as nested dicts, without the keys of other data sets (earlier versions wrote those too);
    and a line that names the keys left out, or None. Keys in `given` stay, so that `from_dict` refuses them."""
    if not isinstance(tree, dict) or not isinstance(tree.get("data", {}), dict):
        return tree, None
    out = [key for key in _foreign(tree) if f"data.{key}" not in given]
    if not out:
        return tree, None
    data = {key: value for key, value in tree["data"].items() if key not in out}
    names = ", ".join(f"data.{key}" for key in out)
    return {**tree, "data": data}, f"left out, as data.name={_data_name(tree)} has no such keys: {names}"


def from_record(tree: Any, say: Callable[[str], None] | None = None) -> Config:
    """`from_dict` for the recipe in a checkpoint: keys of other data sets are left out, and `say` gets a line about it."""
    tree, note = own_keys(tree)
    if note and say:
        say(note)
    return from_dict(tree)


def changed(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with other values for some `section.key`, checked like a file. With another data.name the keys of the
    previous data set are left out. Raises ConfigError."""
    tree = to_dict(config)
    for name, value in values.items():
        if name not in KEYS:
            raise ConfigError(f"{name}: unknown key{_nearest(name, list(KEYS))}")
        section, key = name.split(".", 1)
        tree[section][key] = value
    return from_dict(own_keys(tree, values)[0])


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain dicts of numbers, text and None: what checkpoints and config.yaml hold."""
    return asdict(config)


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _in_run_folder(path: Path) -> bool:
    """Whether a run wrote this file: a run writes environment.json beside it, and first."""
    return path.name == "config.yaml" and os.path.lexists(path.with_name("environment.json"))


def load_config(path: str | Path, overrides: Sequence[str] = (), say: Callable[[str], None] | None = None) -> Config:
    """Read a recipe, found as `find_recipe` does, and apply `section.key=value` overrides on top.

    Raises ConfigError, one line, for a file that cannot be read, unknown or duplicate keys, wrong types and values out of
    range, in the file or in an override, and for an override given twice. In the config.yaml of a run folder, keys of another
    data set than data.name are no error: they are left out, and `say` gets a line about it.
    """
    path = find_recipe(path)
    try:
        tree = _check_tree(_read_yaml(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    tree = with_overrides(tree, overrides)
    if _in_run_folder(path):
        tree, note = own_keys(tree, {word.partition("=")[0] for word in overrides})
        if note and say:
            say(f"{path}: {note}")
    try:
        return from_dict(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if not overrides else str(error)) from None


def with_overrides(tree: Any, words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The nested dicts of a recipe, checked, and changed in place by `section.key=value` words. Raises ConfigError."""
    checked = _check_tree(tree)
    seen: set[str] = set()
    for word in words:
        name, value = _parse_override(word)
        if name in seen:
            raise ConfigError(f"{name}: given twice among the overrides")
        seen.add(name)
        section, key = name.split(".", 1)
        _check_tree({section: (holder := {key: value})})
        checked.setdefault(section, {})[key] = holder[key]
    return checked


def reference_table() -> str:
    """All keys as a Markdown table, for docs/configuration.md: key, default, values, meaning."""
    rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for name, (f, hint) in KEYS.items():
        default, values = _default_and_values(f, hint)
        rows.append(f"| `{name}` | {default} | {values.replace('|', '&#124;')} | {_meaning(f)} |")
    return "\n".join(rows)
