"""The command-line options and error handling that all modules of the analysis share."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from analysis.run import LoadedRun, Say, load_run
from train.errors import explained
from train.screen.log import Log
from train.screen.progress import duration
from train.screen.streams import Parser, standard_streams

Item = TypeVar("Item")


def progress(items: Iterable[Item], total: int, title: str, say: Say, every: float = 5.0) -> Iterator[Item]:
    """Yields the items with a progress bar on a terminal, elsewhere with a line every `every` seconds."""
    if getattr(say, "terminal", False) or (say is print and sys.stdout is not None and sys.stdout.isatty()):
        yield from tqdm(items, total=total, desc=title, leave=False, dynamic_ncols=True)
        return
    begun = last = time.perf_counter()
    for done, item in enumerate(items):
        now = time.perf_counter()
        if now - last >= every and done:
            say(f"{title}: {done}/{total}, {duration((now - begun) / done * (total - done))} to go")
            last = now
        yield item


def parser(module: str, description: str, *, data: bool = True, one_run: bool = True) -> argparse.ArgumentParser:
    """The options that all modules share."""
    result = Parser(prog=f"python -m {module}", description=description)
    if one_run:
        result.add_argument("run", type=Path, metavar="runs/NAME", help="the run folder")
    result.add_argument(
        "--checkpoint",
        choices=("best", "last"),
        help="which weights (default: best, or last where there is no best.pt)",
    )
    result.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one"
    )
    result.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="arithmetic of the evaluation (default: the run's own on its kind of device, else fp32)",
    )
    if data:
        result.add_argument(
            "--data-root", type=Path, metavar="DIR", help="where the data lie here (default: the run's data.root)"
        )
        result.add_argument("--download", action="store_true", help="fetch missing data into the data root")
    if one_run:
        result.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: runs/NAME/analysis)")
    return result


def load_for(options: argparse.Namespace, say: Say, path: Path | None = None) -> LoadedRun:
    """The run that the shared options name."""
    return load_run(
        path or options.run,
        checkpoint=options.checkpoint,
        device=options.device,
        precision=options.precision,
        data_root=getattr(options, "data_root", None),
        download=getattr(options, "download", False),
        need_data=hasattr(options, "data_root"),
        say=say,
    )


def command(
    arguments_parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    body: Callable[[argparse.Namespace, Log], int | None],
) -> int:
    """Parse the arguments and call `run`. An error that a user can correct becomes one line on stderr and exit code 2."""
    with standard_streams():
        options = arguments_parser.parse_intermixed_args(arguments)
        log = Log()
        with explained(log, out_of_memory="; try --device cpu", reads_files=True) as outcome:
            outcome.code = body(options, log) or 0
        return outcome.code
