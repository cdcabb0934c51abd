"""The configuration: one dataclass a section, loaded strictly from YAML and `key=value` overrides. Imports no torch."""

from __future__ import annotations

import difflib
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml


class ConfigError(ValueError):
    """A configuration that cannot be used: one line naming the file or override, the key, the value and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


def _key(default: Any, help: str, **bounds: Any) -> Any:
    """A field with its meaning and its range: `at_least`, `at_most`, `above`, `below`."""
    return field(default=default, metadata={"help": help, **bounds})


@dataclass(kw_only=True)
class DataConfig:
    """What is trained on, and what feeds it."""

    name: Literal["cifar10", "cifar100", "digits", "synthetic"] = _key("cifar10", "the data set")
    root: str = _key("data", "folder that holds the data, or that receives the download")
    download: bool = _key(True, "fetch a missing CIFAR archive (170 MB), verify it and keep it in data.root")
    backend: Literal["auto", "dali", "torch"] = _key(
        "auto", "input pipeline; auto takes DALI wherever it gives the right pixels"
    )
    synthetic_size: int = _key(32, "height and width of synthetic images", at_least=32, at_most=1024)
    synthetic_classes: int = _key(10, "classes of the synthetic set", at_least=2, at_most=256)
    synthetic_count: int = _key(50_000, "training images of the synthetic set", at_least=10)


@dataclass(kw_only=True)
class AugmentConfig:
    """What is random about a training image. Drawn per (seed, epoch, image) by dali_pipeline/plan.py."""

    crop: bool = _key(True, "pad, then crop back to the image's size at a random offset")
    pad: int = _key(4, "pixels of padding on each side", at_least=0, at_most=32)
    padding_mode: Literal["zero", "reflect"] = _key("zero", "what the padding holds: black, or the image reflected")
    flip: bool = _key(True, "mirror left-right with probability 1/2")
    cutout: int = _key(
        8, "side of the square painted in the mean colour (arXiv:1708.04552); 0 turns it off", at_least=0
    )


@dataclass(kw_only=True)
class NetConfig:
    """CustomResNet (net/resnet.py)."""

    width: int = _key(64, "channels of the first layer; 64 is the 6.57M-parameter network", at_least=1, at_most=1024)
    logit_scale: float | None = _key(
        None, "factor on the logits; null is 1/sqrt(width), which stands high learning rates, 1 is none", above=0.0
    )


@dataclass(kw_only=True)
class OptimConfig:
    """SGD and the loss."""

    momentum: float = _key(0.9, "momentum of SGD", at_least=0.0, below=1.0)
    nesterov: bool = _key(True, "Nesterov's form of the momentum; needs momentum above 0")
    weight_decay: float = _key(5e-4, "weight decay of the convolution and classifier weights", at_least=0.0)
    norm_bias_weight_decay: float = _key(0.0, "weight decay of batch-norm parameters and biases", at_least=0.0)
    label_smoothing: float = _key(0.0, "label smoothing of the cross-entropy", at_least=0.0, below=1.0)


@dataclass(kw_only=True)
class ScheduleConfig:
    """OneCycle, linear, per step: lr_min up to lr_max at peak_epoch, back down to lr_min at the end, not below."""

    lr_max: float | str = _key("find", "peak learning rate, or 'find' for the range test", above=0.0)
    lr_min: float | str = _key("find", "learning rate of the first and the last step, or 'find'", above=0.0)
    peak_epoch: float = _key(5.0, "epoch at whose end the rate peaks; must lie within the training", above=0.0)
    find_start: float = _key(1e-4, "lowest rate of the range test", above=0.0)
    find_end: float = _key(10.0, "highest rate of the range test", above=0.0)
    find_steps: int = _key(100, "steps of the range test", at_least=20, at_most=10_000)


@dataclass(kw_only=True)
class TrainConfig:
    """The loop: how long, how many at a time, in which arithmetic."""

    epochs: int = _key(24, "epochs of training", at_least=1)
    batch_size: int = _key(512, "images a step, over all processes together", at_least=1)
    tail: Literal["drop", "endless"] = _key(
        "drop", "an epoch's images beyond the last full batch: dropped, or carried over into the next epoch"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = _key("auto", "where to train; auto takes a GPU where there is one")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _key(
        "auto", "arithmetic: auto is bf16 on CUDA and fp32 elsewhere; fp16 scales its gradients"
    )
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] = _key(
        "auto", "torch.compile mode; auto is default where a compiler is found and it pays"
    )
    channels_last: Literal["auto", "on", "off"] = _key("auto", "memory format; auto is on for CUDA and the CPU")
    eval_batch_size: int = _key(1000, "images a step of evaluation", at_least=1)
    ema_decay: float = _key(
        0.0, "decay of the exponential moving average of the weights; 0 keeps none", at_least=0.0, below=1.0
    )
    ema_every: int = _key(1, "steps between updates of the average", at_least=1)
    tta: bool = _key(False, "report flip test-time augmentation beside the plain accuracy")
    sync_bn: bool = _key(False, "batch-norm statistics over all processes together (torchrun); else each its own")
    seed: int = _key(0, "seed of the weights and of the augmentation plan", at_least=0, at_most=2**63 - 1)
    deterministic: bool = _key(False, "the same bits on every run of one machine, at a cost in speed")


@dataclass(kw_only=True)
class RunConfig:
    """Where the results go."""

    dir: str | None = _key(None, "run folder; by default runs/NAME-OF-THE-CONFIG, numbered where that exists")
    checkpoint_every: str | int = _key(
        "epoch", "how often last.pt is written: epoch, N steps (200), or N seconds (60s)"
    )
    analyse: bool = _key(True, "draw the pictures and the report of `python -m analysis` at the end")
    tensorboard: bool = _key(False, "write TensorBoard event files too (pip install -e '.[tensorboard]')")


def checkpoint_interval(every: str | int) -> tuple[int | None, float | None]:
    """run.checkpoint_every as (steps, seconds), both None for "epoch". Raises ConfigError for anything else."""
    text = str(every)
    if text == "epoch":
        return None, None
    number = text.removesuffix("s")
    if number.isdecimal() and int(number) > 0:
        return (None, float(number)) if text.endswith("s") else (int(number), None)
    raise ConfigError(
        f"run.checkpoint_every: {every!r} is none of epoch, a number of steps (200), a number of seconds (60s)"
    )


@dataclass(kw_only=True)
class Config:
    """A whole recipe. `config.yaml` of a run folder is exactly this, resolved."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    net: NetConfig = field(default_factory=NetConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)


SECTIONS: dict[str, type] = dict(typing.get_type_hints(Config))


def _keys() -> dict[str, tuple[Field[Any], Any]]:
    """Every `section.key` with its dataclass field and its type."""
    found = {}
    for section, cls in SECTIONS.items():
        hints = typing.get_type_hints(cls)
        for f in fields(cls):
            found[f"{section}.{f.name}"] = (f, hints[f.name])
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
_FLOATS = (float, float | str)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(_describe(arm) for arm in typing.get_args(hint))
    names = {int: "int", float: "float", bool: "true | false", str: "text", type(None): "null"}
    return names[hint]


def _default_and_values(name: str, f: Field[Any], hint: Any) -> tuple[str, str]:
    """A key's default and its type with its bounds, as a person reads them."""
    default = "null" if f.default is None else str(f.default).lower() if isinstance(f.default, bool) else str(f.default)
    values = {"schedule.lr_max": "float | find", "schedule.lr_min": "float | find"}.get(name, _describe(hint))
    bounds = [f"{bound.replace('_', ' ')} {f.metadata[bound]}" for bound in _BOUNDS if bound in f.metadata]
    return default, ", ".join([values, *bounds])


def help_text() -> str:
    """All keys, a paragraph a section: key, type, default, meaning."""
    lines = []
    for section, cls in SECTIONS.items():
        lines.append(f"{section}: {(cls.__doc__ or '').splitlines()[0]}")
        for name, (f, hint) in KEYS.items():
            if name.startswith(section + "."):
                default, values = _default_and_values(name, f, hint)
                lines.append(f"  {name}={default}  ({values})")
                lines.append(f"      {f.metadata['help']}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _nearest(name: str, candidates: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else f"; known: {', '.join(candidates)}"


def _fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value is of the type that the key declares; a bool is no number, text is no number."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arm) for arm in typing.get_args(hint))
    if hint is float:
        return type(value) in (int, float)
    if hint is str:
        return type(value) in (str, int)
    return type(value) is hint


def _check_value(name: str, value: Any) -> None:
    f, hint = KEYS[name]
    if name in ("schedule.lr_max", "schedule.lr_min") and isinstance(value, str) and value != "find":
        raise ConfigError(f"{name}: {value!r} is neither a number nor 'find'")
    if not _fits(value, hint):
        wanted = _describe(hint)
        wanted = f"one of {wanted}" if "|" in wanted else f"of type {wanted}"
        found = _TYPE_NAMES.get(type(value), type(value).__name__)
        raise ConfigError(f"{name}: {value!r} ({found}) is not {wanted}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        raise ConfigError(f"{name}: a number of {len(str(value))} digits is out of range") from None
    if not finite:
        raise ConfigError(f"{name}: {value} is not a finite number")
    for bound, holds in _BOUNDS.items():
        if bound in f.metadata and not holds(value, f.metadata[bound]):
            words = bound.replace("_", " ")
            raise ConfigError(f"{name}: {value} is out of range, must be {words} {f.metadata[bound]}")


def _check_tree(tree: Any) -> dict[str, dict[str, Any]]:
    """Unknown sections and keys, types and ranges of a raw tree; gives it back with on/off words restored."""
    if tree is None:
        raise ConfigError("is empty; expected sections such as 'train:'")
    if not isinstance(tree, dict):
        raise ConfigError(f"holds a {type(tree).__name__}, expected sections such as 'train:'")
    for section, content in tree.items():
        if section not in SECTIONS:
            raise ConfigError(f"{section}: unknown section{_nearest(str(section), list(SECTIONS))}")
        if not isinstance(content, dict):
            raise ConfigError(f"{section}: expected keys below it, found {content!r}")
        for key, value in content.items():
            name = f"{section}.{key}"
            if name not in KEYS:
                known = [k.split(".", 1)[1] for k in KEYS if k.startswith(section + ".")]
                raise ConfigError(f"{name}: unknown key{_nearest(str(key), known)}")
            words = typing.get_args(KEYS[name][1])
            # YAML reads off, on, no and yes as booleans: give such a value back its word where a word is wanted
            if isinstance(value, bool) and "off" in words:
                content[key] = value = "off" if not value else "on"
            _check_value(name, value)
            if type(value) is int and not {int, float} & {KEYS[name][1], *words}:
                content[key] = str(value)  # run.dir=2024 is a name
    return tree


# known without reading the data, so that a wrong batch size is refused before torch is imported or anything downloaded
TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "digits": 1442}


def _check_together(config: Config) -> None:
    """What only two keys together can get wrong."""
    checkpoint_interval(config.run.checkpoint_every)
    schedule, train, optim = config.schedule, config.train, config.optim
    images = TRAINING_IMAGES.get(config.data.name, config.data.synthetic_count)
    if train.batch_size > images:
        raise ConfigError(
            f"train.batch_size: {train.batch_size} is more than the {images} training images of {config.data.name}"
        )
    if config.data.synthetic_size % 8:
        raise ConfigError(
            f"data.synthetic_size: {config.data.synthetic_size} is no multiple of 8, as the network halves images three times"
        )
    if schedule.peak_epoch > train.epochs:
        raise ConfigError(
            f"schedule.peak_epoch: {schedule.peak_epoch:g} lies after the end of the training "
            f"(train.epochs={train.epochs}); lower it or train longer"
        )
    if isinstance(schedule.lr_max, float) and isinstance(schedule.lr_min, float) and schedule.lr_min > schedule.lr_max:
        raise ConfigError(f"schedule.lr_min: {schedule.lr_min:g} is above schedule.lr_max={schedule.lr_max:g}")
    if schedule.find_start >= schedule.find_end:
        raise ConfigError(
            f"schedule.find_start: {schedule.find_start:g} is not below schedule.find_end={schedule.find_end:g}"
        )
    if optim.nesterov and optim.momentum == 0:
        raise ConfigError("optim.nesterov: true needs optim.momentum above 0")
    if config.augment.crop and config.augment.padding_mode == "reflect" and config.augment.pad >= 32:
        raise ConfigError(
            f"augment.pad: {config.augment.pad} is too wide to reflect images of 32 pixels, must be below 32"
        )


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError("no such file; recipes lie in configs/, for instance configs/quickstart.yaml") from None
    except IsADirectoryError:
        raise ConfigError("is a folder, expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    return _parse_yaml(text)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which would keep the last of two equal keys, and read 1e-3 as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key.start_mark)
            if key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value}: given twice", key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.2's floats: an exponent needs neither a point nor a sign
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str) -> Any:
    try:
        # an alias can be expanded without bound ("billion laughs"), and no recipe needs one
        depth = 0
        for token in yaml.scan(text):
            if isinstance(token, yaml.AliasToken):
                raise ConfigError("YAML aliases (*name) are not accepted")
            depth += type(token).__name__.endswith("StartToken") - type(token).__name__.endswith("EndToken")
            if depth > 10:
                raise ConfigError("is nested too deeply")
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{problem}") from None
    except RecursionError:
        raise ConfigError("is nested too deeply") from None
    except ConfigError:
        raise
    except ValueError as error:  # an impossible date, an integer of 5,000 digits
        raise ConfigError(f"is not a configuration: {str(error).splitlines()[0]}") from None


def _parse_override(word: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    if not equals:
        raise ConfigError(f"{word}: expected section.key=value, for instance train.epochs=3")
    if name not in KEYS:
        raise ConfigError(f"{name}: unknown key{_nearest(name, list(KEYS)) if '.' in name else _suggest_section(name)}")
    if name in ("data.root", "run.dir"):
        return name, None if text == "null" else text  # a path is taken as typed
    try:
        value = _parse_yaml(f"value: {text}")["value"]
    except ConfigError as error:
        raise ConfigError(f"{name}: {text!r} cannot be read: {error}") from None
    return name, value


def _suggest_section(key: str) -> str:
    owners = [name for name in KEYS if name.split(".", 1)[1] == key]
    return f", did you mean {owners[0]}?" if owners else _nearest(key, list(KEYS))


def from_dict(tree: Any) -> Config:
    """Build a Config from nested plain dicts (a parsed YAML file, a checkpoint's record); missing keys take defaults.

    Raises ConfigError for anything unknown, ill-typed or out of range.
    """
    checked = _check_tree(tree)
    sections = {}
    for section, cls in SECTIONS.items():
        values = {
            key: float(value) if type(value) is int and KEYS[f"{section}.{key}"][1] in _FLOATS else value
            for key, value in checked.get(section, {}).items()
        }
        sections[section] = cls(**values)
    config = Config(**sections)
    _check_together(config)
    return config


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain dicts of numbers, text and None: what checkpoints and config.yaml hold."""
    return asdict(config)


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply `section.key=value` overrides on top.

    Raises ConfigError, one line, for a file that cannot be read, unknown or duplicate keys, wrong types and values out of
    range, in the file or in an override, and for an override given twice.
    """
    try:
        tree = _check_tree(_read_yaml(Path(path)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    seen: set[str] = set()
    for word in overrides:
        name, value = _parse_override(word)
        if name in seen:
            raise ConfigError(f"{name}: given twice on the command line")
        seen.add(name)
        section, key = name.split(".", 1)
        _check_tree({section: (holder := {key: value})})
        tree.setdefault(section, {})[key] = holder[key]
    try:
        return from_dict(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if not seen else str(error)) from None


def reference_table() -> str:
    """All keys as a Markdown table, for the README: key, default, values, meaning."""
    rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for name, (f, hint) in KEYS.items():
        default, values = _default_and_values(name, f, hint)
        rows.append(f"| `{name}` | {default} | {values.replace('|', '&#124;')} | {f.metadata['help']} |")
    return "\n".join(rows)
