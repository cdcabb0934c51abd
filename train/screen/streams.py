"""The standard streams of a command, whatever they are: closed, full, a pipe that nobody reads, or without a character."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from dali_pipeline.words import encodable, to_stderr


@contextmanager
def standard_streams() -> Iterator[None]:
    """For the whole of a command. Characters that a stream cannot encode are written as escapes, not raised as errors; and what a
    stream cannot take at the end changes nothing about the exit code."""
    _open_closed_ones()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            try:
                if stream is not None:
                    stream.flush()
            except (OSError, ValueError):
                to_nowhere(number)  # where Python's own flush, at the end of the process, succeeds


def to_nowhere(number: int) -> None:
    """Replace a standard stream, by its number, by the null device, so that prints of libraries do not fail either."""
    with suppress(OSError), open(os.devnull, "w") as null:  # noqa: PTH123 - os.devnull is a name, not a path
        os.dup2(null.fileno(), number)


def _open_closed_ones() -> None:
    """Open the null device in place of a standard stream that is closed (`>&-`). Otherwise the next file opened would get the
    stream's number, and what a library prints would be written into that file."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one


def write_out(text: str) -> int:
    """Write to standard output what a command was asked for, and return the exit code: 0, also where the reader has gone away; 1
    where it cannot be written, with a line on stderr."""
    try:
        if sys.stdout is None:
            raise OSError(0, "it is closed")
        sys.stdout.write(encodable(text, sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:
        return 0
    except OSError as error:
        say_error(f"standard output: cannot be written: {error.strerror}")
        return 1
    return 0


def say_error(*lines: str) -> None:
    """Print an error to standard error; the lines after the first say more."""
    for line in (f"error: {lines[0]}", *lines[1:]):
        to_stderr(line)


def share_a_reader() -> bool:
    """Whether standard output and standard error go to the same place, so that a line on both would be read twice."""
    try:
        return os.path.samestat(os.fstat(1), os.fstat(2))
    except OSError:
        return False


class Parser(argparse.ArgumentParser):
    """Shows what is wrong with an argument as a line that can be read, whatever the argument holds; a help text that cannot be
    written is an error."""

    def print_help(self, file: Any = None) -> None:
        if file is not None:
            super().print_help(file)
        elif code := write_out(self.format_help()):
            raise SystemExit(code)

    def error(self, message: str) -> NoReturn:
        with suppress(OSError, ValueError):  # not every version of argparse passes over a full stderr
            self.print_usage(sys.stderr)
        to_stderr(f"{self.prog}: error: {message}")
        raise SystemExit(2)
