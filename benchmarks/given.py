"""What the benchmarks are given: their command lines, and files of JSON. Imports no torch."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dali_pipeline.errors import UserError
from dali_pipeline.regular import read_regular
from train.machine.openmp import wait_passively
from train.screen.streams import Parser

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


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of a benchmark that trains. Threads that wait are made to sleep, which counts before torch is imported."""
    options = parser.parse_intermixed_args(arguments)
    wait_passively()
    return options


def seeds_parser(doc: str | None, overrides: str = "replaces a value of the recipe", **first: Any) -> Parser:
    """The parser of a measurement over several seeds, with what all of them take; `first` is its first argument, by default the
    recipe."""
    result = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument(**(first or {"dest": "config", "help": "the recipe, a YAML file of configs/"}))
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help=overrides)
    result.add_argument(
        "--runs", type=whole(), required=True, metavar="N", help="how many seeds, counted from train.seed"
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="write the last line of the output here too")
    return result


def add_finished(parser: Parser, kind: str) -> None:
    """The option for the file of finished runs, which `finished_runs` reads."""
    words = f"JSONL of the runs (runs/{kind}/RECIPE.jsonl)"
    parser.add_argument("--finished", type=Path, metavar="FILE", help=words)


def finished_runs(options: argparse.Namespace, kind: str) -> Path:
    """The file of finished runs: as given, or the recipe's own."""
    given: Path | None = options.finished
    return given or Path("runs") / kind / f"{Path(options.config).stem}.jsonl"


def read_json(path: Path, at_most: int = MOST_BYTES) -> Any:
    """The content of a JSON file of at most so many bytes, plain or packed by gzip. Raises UserError, which names it."""
    try:
        content = read_regular(path, at_most)
        if content.startswith(b"\x1f\x8b"):
            with gzip.open(io.BytesIO(content)) as packed:
                content = packed.read(at_most)  # what is longer than that is no whole JSON
        return json.loads(content.decode("utf-8"))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: is damaged: {error}; measure it anew or remove it") from None
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
