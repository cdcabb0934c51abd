"""How a benchmark ends: an error that a user can correct is one line and an exit code, the results are a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
