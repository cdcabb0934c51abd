"""python -m train.schema: write configs/schema.json, by which editors complete and check recipes (JSON Schema 2020-12).

The first line of a recipe names it: `# yaml-language-server: $schema=schema.json`.
"""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from train.config import DATA, KEYS, SECTIONS, is_union
from train.disk.atomic import WriteError, write_atomic
from train.screen.streams import Parser, say_error, standard_streams

PATH = Path(__file__).resolve().parent.parent / "configs" / "schema.json"
_BOUNDS = {"at_least": "minimum", "above": "exclusiveMinimum", "at_most": "maximum", "below": "exclusiveMaximum"}
_TYPES = {int: "integer", float: "number", bool: "boolean", type(None): "null"}


def _values(hint: Any, about: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a key's values, from its type and the metadata of its declaration."""
    if typing.get_origin(hint) is Literal:
        return {"enum": list(typing.get_args(hint))}
    if is_union(hint):
        return {"anyOf": [_values(arm, about) for arm in typing.get_args(hint)]}
    if hint is str:
        # a whole number is text too: run.dir=2024
        return (
            {"type": "string", "pattern": f"^{about['pattern']}$"}
            if "pattern" in about
            else {"type": ["string", "integer"], "minLength": 1}
        )
    bounds = {word: about[bound] for bound, word in _BOUNDS.items() if bound in about and hint in (int, float)}
    return {"type": _TYPES[hint], **bounds}


def _object(properties: dict[str, Any], description: str) -> dict[str, Any]:
    return {
        "description": description,
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _only_with(sources: tuple[str, ...], names: list[str]) -> dict[str, Any]:
    """The rule that these keys are allowed only with the data.name of their sources."""
    chosen: dict[str, Any] = {
        "properties": {"name": {"const": sources[0]} if len(sources) == 1 else {"enum": list(sources)}}
    }
    if SECTIONS["data"]().name not in sources:
        chosen["required"] = ["name"]
    return {"if": {"not": chosen}, "then": {"properties": dict.fromkeys(names, False)}}


def schema() -> dict[str, Any]:
    """The schema of a whole recipe. It covers what can be wrong with a single key, and which data set a key belongs to."""
    sections = {name: _object({}, (cls.__doc__ or "").splitlines()[0]) for name, cls in SECTIONS.items()}
    owned: dict[tuple[str, ...], list[str]] = {(name,): [] for name in DATA}
    for name, (f, hint) in KEYS.items():
        section, key = name.split(".", 1)
        default = {"default": f.default}
        sections[section]["properties"][key] = {
            "description": f.metadata["help"],
            **_values(hint, f.metadata),
            **default,
        }
        if "sources" in f.metadata:
            owned.setdefault(f.metadata["sources"], []).append(key)
    sections["data"]["allOf"] = [_only_with(sources, names) for sources, names in owned.items() if names]
    for content in sections.values():
        content["type"] = ["object", "null"]  # null: all keys of the section are commented out
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A recipe of python -m train"}
    return {**head, **_object(sections, "Sections of keys; what is left out keeps its default.")}


def text() -> str:
    """The content of configs/schema.json."""
    return json.dumps(schema(), indent=2) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    with standard_streams():
        Parser(prog="python -m train.schema", description=__doc__).parse_args(arguments)
        try:
            write_atomic(PATH, text().encode())
        except WriteError as error:
            say_error(str(error))
            return 1
        print(PATH)
    return 0


if __name__ == "__main__":
    sys.exit(main())
