"""What the values of a checkpoint must be: a file can be whole, sealed and still hold the wrong thing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.screen.clock import Times
from train.step.measures import recorded

# numbers in a line of the metrics that whatever reads them needs
OF_EACH_EPOCH = ("epoch", "lr", "train_loss", "train_accuracy", "seconds", "images_per_second")


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def problem_with(state: Mapping[str, Any]) -> str | None:
    """What is wrong with the values of a checkpoint that has all keys, as a line; None where nothing is."""
    for name, rule in RULES.items():
        if name in state and not rule.holds(state[name]):
            return f"{name} is {_shown(state[name])}, expected {rule.words}"
    return _together(state)


def misfit(found: Any, expected: Any, name: str) -> str | None:
    """Where the nested dicts, lists, tensors and numbers `found` cannot take the place of `expected`, as a line; None where they
    can. Tensors must agree in shape and dtype, dicts in their keys; `name` is that of the whole."""
    if isinstance(expected, Tensor):
        if not _tensor(found):
            return f"{name} is {_shown(found)}, expected a tensor"
        there, here = (f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in (found, expected))
        return None if there == here else f"{name} is {there}, expected {here}"
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            return f"{name} is {_shown(found)}, expected names with values"
        # a group of parameters has the settings of torch's version, which fills in those that it misses
        keys = expected.keys() & found.keys() if "params" in expected and "params" in found else expected.keys()
        if len(keys) == len(expected) and (other := sorted(map(str, expected.keys() ^ found.keys()))):
            return f"{name}.{other[0]} is {'missing' if other[0] in map(str, expected) else 'no part of it'}"
        problems = (misfit(found[key], expected[key], f"{name}.{key}") for key in keys)
    elif isinstance(expected, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(expected):
            return f"{name} is {_shown(found)}, expected {len(expected)} values"
        problems = (misfit(a, b, f"{name}[{place}]") for place, (a, b) in enumerate(zip(found, expected, strict=True)))
    else:
        return None if _kind(found) == _kind(expected) else f"{name} is {_shown(found)}, expected {_kind(expected)}"
    return next((problem for problem in problems if problem is not None), None)


def is_epoch(entry: Any) -> bool:
    """A line of the metrics: numbers by name, among them the loss and the accuracy of an evaluation."""
    if not (_named(is_number)(entry) and all(name in entry for name in OF_EACH_EPOCH)):
        return False
    measures = recorded(entry)
    positive = entry["seconds"] > 0 and entry["images_per_second"] > 0
    return positive and bool(measures) and f"{measures[0].key}_loss" in entry


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "true, false or null"
    return "a number" if isinstance(value, (int, float)) else type(value).__name__


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a very long number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _tensor(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
    )


def is_number(value: Any) -> bool:
    """Whether this is a finite number; true is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 10**18 if isinstance(value, int) else math.isfinite(value)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 10**12


def _list_of(rule: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and length in (None, len(value)) and all(map(rule, value))

    return holds


def _named(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        return isinstance(value, Mapping) and all(isinstance(key, str) and rule(part) for key, part in value.items())

    return holds


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _not_negative(value: Any) -> bool:
    return is_number(value) and value >= 0


RULES = {
    "model": Rule("tensors by name", _named(_tensor)),
    "ema": Rule("tensors by name, or null", lambda value: value is None or _named(_tensor)(value)),
    "optimizer": Rule("the states of optimizers by name", _named(lambda part: isinstance(part, Mapping))),
    "scaler": Rule("numbers by name", _named(is_number)),
    "steps_per_epoch": Rule("a whole number above 0", lambda value: _count(value) and value > 0),
    "times": Rule(
        f"seconds, for {', '.join(f.name for f in fields(Times))}",
        lambda value: _named(_not_negative)(value) and value.keys() <= {f.name for f in fields(Times)},
    ),
    "machine": Rule(
        "words and numbers by name", _named(lambda part: part is None or isinstance(part, (str, int, float)))
    ),
    "config": Rule("sections of keys", _named(_named(lambda part: True))),
    "epoch": Rule("a whole number from 0", _count),
    "step": Rule("a whole number from 0", _count),
    "step_losses": Rule("a list of finite numbers", _list_of(is_number)),
    "step_correct": Rule("a list of whole numbers from 0", _list_of(_count)),
    "seconds": Rule("a number from 0", _not_negative),
    "best_accuracy": Rule("a percentage, or -1", lambda value: is_number(value) and -1 <= value <= 100),
    "best_epoch": Rule("a whole number from 0", _count),
    "metrics": Rule("a list with the numbers of each epoch by name", _list_of(is_epoch)),
    "lr_max": Rule("a number above 0", _positive),
    "lr_min": Rule("a number above 0", _positive),
    "data_name": Rule("text", _text),
    "class_names": Rule("a list of text", _list_of(_text)),
    "mean": Rule("three numbers", _list_of(is_number, 3)),
    "std": Rule("three numbers from 0", _list_of(_not_negative, 3)),
    "fill": Rule("three whole numbers from 0 to 255", _list_of(lambda part: _count(part) and part <= 255, 3)),
    "height": Rule("a whole number above 0", lambda value: _count(value) and value > 0),
    "width": Rule("a whole number above 0", lambda value: _count(value) and value > 0),
    "validation": Rule("text, or null", lambda value: value is None or _text(value)),
}


def _together(state: Mapping[str, Any]) -> str | None:
    """What several values that are right by themselves have wrong together."""
    epoch, step, per_epoch = state["epoch"], state["step"], state["steps_per_epoch"]
    if step > per_epoch:
        return f"step is {step}, beyond the {per_epoch} steps of an epoch"
    for name in ("step_losses", "step_correct"):
        if len(state[name]) != step:
            return f"{name} holds {len(state[name])} values for {step} steps"
    numbers = [entry["epoch"] for entry in state["metrics"]]
    if len(numbers) != epoch:
        return f"metrics holds {len(numbers)} epochs, and {epoch} are finished"
    if numbers != list(range(1, epoch + 1)):
        return f"metrics holds other epochs than those from 1 to {epoch}, in their order"
    if state["best_epoch"] > epoch:
        return f"best_epoch is {state['best_epoch']}, and {epoch} are finished"
    if (state["best_epoch"] == 0) != (state["best_accuracy"] < 0):
        return f"best_epoch is {state['best_epoch']}, with a best_accuracy of {state['best_accuracy']}"
    if state["lr_min"] > state["lr_max"]:
        return f"lr_min is {state['lr_min']}, above lr_max, {state['lr_max']}"
    if not state["class_names"]:
        return "class_names is empty"
    return None
