"""Lines for a person, from text of any origin: printable, short enough, in the characters of the stream."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_pipeline.errors import UserError, at_home
from dali_pipeline.words import encodable, printable, shortened, to_stderr

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT, st.sampled_from(["ascii", "cp1252", "utf-8", "latin-1", "shift_jis"]))
def test_whatever_a_text_holds_it_is_one_line_that_the_stream_can_write(text: str, encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    stream.write(encodable(printable(text), stream))
    stream.flush()
    assert len(printable(text).splitlines()) <= 1
    assert "\x1b" not in printable(text) and printable(printable(text)) == printable(text)


def test_letters_of_any_script_and_blanks_stay_and_what_steers_a_terminal_does_not() -> None:
    for text in ("läuft/走る", "a\u00a0b\u3000c", "🙂", ""):
        assert printable(text) == text
    assert printable("a\nb\x1b[31m\x9b\u202e\udcff\t") == r"a\nb\x1b[31m\x9b\u202e\udcff\t"


@settings(max_examples=100, deadline=None)
@given(st.text(" x", max_size=20), st.integers(0, 100_000), st.text(" y", max_size=20))
def test_a_long_line_keeps_its_begin_and_its_end_within_a_bound(begin: str, count: int, end: str) -> None:
    line = f"{begin}{'z' * count}{end}"
    short = shortened(line)
    assert len(short) <= 2100 and short.startswith(begin) and short.endswith(end)
    assert short == line or " characters ... " in short


def test_an_error_has_a_line_for_each_argument_and_no_more() -> None:
    error = UserError("folder\n/x: wrong", "  what helps")
    assert str(error).split("\n") == [r"folder\n/x: wrong", "  what helps"]
    assert len(str(UserError("y" * 50_000))) < 1000


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "\0"])
def test_a_name_that_no_file_can_bear_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^run\.dir: .*(NUL|no file can bear this name)"):
        at_home(name, "run.dir")


def test_a_name_of_bytes_that_are_no_utf_8_is_one() -> None:
    assert at_home("\udcff\udce9", "run.dir") == Path("\udcff\udce9")


def test_a_line_to_an_stderr_that_takes_nothing_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    written = io.BytesIO()
    for stream in (None, Full(), io.TextIOWrapper(written, "ascii", "strict")):
        monkeypatch.setattr(sys, "stderr", stream)
        to_stderr("läuft\n")
        assert written.getvalue() == (b"l\\xe4uft\\n\n" if isinstance(stream, io.TextIOWrapper) else b"")
