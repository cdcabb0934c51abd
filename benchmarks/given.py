"""What the benchmarks are given: numbers on the command line, and files of JSON. Imports no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dali_pipeline.errors import UserError
from dali_pipeline.regular import read_regular

MOST = 1_000_000  # of anything that is counted
MOST_BYTES = 100_000_000  # of a file of JSON


def whole(at_least: int = 1) -> Callable[[str], int]:
    """A `type` for argparse: a whole number from `at_least` on."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = at_least - 1
        if not at_least <= number <= MOST:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number from {at_least} to {MOST}")
        return number

    return convert


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError, which names it."""
    try:
        return json.loads(read_regular(path, MOST_BYTES).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged, or no JSON: {error}; measure it anew or remove it") from None


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Inside the block, values of the file that are missing or of another type are a UserError, which names it; `what` the file
    should be."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ZeroDivisionError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: is not {what}: {problem}; measure it anew or remove it") from error
