"""Text of any origin as lines for a person: printable, not too long, and in the characters that the stream can write."""

from __future__ import annotations

import contextlib
import os
import sys
import unicodedata
from typing import Any

MOST_CHARACTERS = 2000  # of a line,
MOST_IN_A_WORD = 500  # and of a word in it


def printable(text: str) -> str:
    """The text as a terminal may show it: line breaks, escape codes, marks that turn the direction of writing, halves of
    surrogate pairs (bytes of a file's name that are no UTF-8) and the like as escapes such as \\n and \\x1b."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in text)


def printable_path(path: str | bytes | os.PathLike[str]) -> str:
    """A file's name as a terminal may show it; bytes that are no UTF-8 as \\xNN."""
    return printable(path_as_text(path))


def path_as_text(path: str | bytes | os.PathLike[str]) -> str:
    """A file's name as text that a file in UTF-8 can hold: as it is, with bytes that are no UTF-8 as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def shortened(line: str) -> str:
    """The line with what is too long to read left out of the middle, of a word or of the whole line."""
    if len(line) <= MOST_IN_A_WORD:
        return line
    return _without_middle(" ".join(_without_middle(word, MOST_IN_A_WORD) for word in line.split(" ")), MOST_CHARACTERS)


def _without_middle(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end]} ... {len(text) - most:,} characters ... {text[-end:]}"


def encodable(text: str, stream: Any) -> str:
    """The text with escapes for the characters that the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def to_stderr(line: str) -> None:
    """Print the line to stderr; an stderr that is closed, full or missing is ignored."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(encodable(shortened(printable(line)), sys.stderr), file=sys.stderr, flush=True)
