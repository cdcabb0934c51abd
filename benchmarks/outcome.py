"""How a benchmark ends: an error that a user can correct is one line and an exit code, the results are a file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dali_pipeline.errors import UserError
from train import errors
from train.disk.atomic import write_atomic
from train.screen.log import Log
from train.screen.streams import standard_streams


@contextmanager
def explained(log: Log | None = None) -> Iterator[errors.Outcome]:
    """train.errors.explained for a measurement, and its standard streams made safe."""
    lower = "; lower train.batch_size, train.eval_batch_size or net.width"
    with standard_streams(), errors.explained(log or Log(), out_of_memory=lower, place="the disk") as outcome:
        yield outcome


def write_report(path: Path, report: dict[str, Any], indent: int = 1) -> None:
    """Write the file of --json atomically. Raises UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(report, indent=indent) + "\n").encode())
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror}") from None


def conclude(
    report: dict[str, Any],
    script: str,
    arguments: Sequence[str] | None,
    options: argparse.Namespace,
    lines: Callable[[dict[str, Any]], Iterable[str]] | None = None,
    draw: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    """Note the command in the report and hand it out: lines for a person, --picture, --json, and all of it as the last line."""
    from benchmarks.machine import command  # imports torch, for which roofline.py need not wait

    report["command"] = command(script, sys.argv[1:] if arguments is None else arguments)
    for line in () if lines is None else lines(report):
        print(line)
    if draw is not None and options.picture:
        draw(report, options.picture)
    if options.json:
        write_report(options.json, report)
    print(json.dumps(report))
