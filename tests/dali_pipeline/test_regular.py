"""Regular files alone are read: what is something else is named at once, however it got there."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from dali_pipeline.regular import NotARegularFile, TooLarge, kind_in_the_way, open_to_read, read_regular


def lay(kind: str, path: Path) -> None:
    if kind == "a folder":
        path.mkdir()
    elif kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:  # a device is made by root alone: a link leads to one
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("link", [False, True], ids=["itself", "through a link"])
@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a socket", "a device"])
def test_what_is_no_regular_file_is_named_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, link: bool
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path("it")
    lay(kind, path)
    if link:
        Path("link").symlink_to(path)
        path = Path("link")
    for read in (open_to_read, read_regular):
        with pytest.raises(NotARegularFile, match=f"is {kind}, not a regular file"):
            read(path)


def test_a_file_and_a_link_to_one_are_read_whole(tmp_path: Path) -> None:
    content = os.urandom(3_000_001)
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert read_regular(tmp_path / name) == content
        assert read_regular(tmp_path / name, at_most=len(content)) == content
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none")


def test_a_file_beyond_the_bound_is_refused_by_its_size_without_being_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)  # more than any memory
    with pytest.raises(TooLarge, match="is of 1,099,511,627,776 bytes, expected at most 1,000"):
        read_regular(tmp_path / "sparse", at_most=1000)


@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a socket"])
def test_what_stands_in_the_way_of_a_file_is_named_and_a_file_or_link_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lay(kind, Path("it"))
    Path("file").touch()
    for name, target in (("link", "it"), ("to a file", "file"), ("dangling", "nowhere")):
        Path(name).symlink_to(target)
    assert kind_in_the_way(Path("it")) == kind and kind_in_the_way(Path("link")) == f"a symbolic link to {kind}"
    assert [kind_in_the_way(Path(name)) for name in ("file", "to a file", "dangling", "none")] == [None] * 4
