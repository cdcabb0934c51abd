"""Locks on files: by the operating system's own means, on regular files alone, never by the presence of a file."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
from places import ROOT

from dali_pipeline.lock import NoLocks, is_still_at, try_lock
from dali_pipeline.regular import NotARegularFile, open_regular

HOLD = """
import sys, time
from pathlib import Path
from dali_pipeline.lock import try_lock
from dali_pipeline.regular import open_regular
file = open_regular(Path(sys.argv[1]))
print(try_lock(file), flush=True)
time.sleep(600)
"""


def test_a_lock_is_flocks_of_one_opening_and_ends_when_it_is_closed(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    first, second = open_regular(tmp_path / "file"), open_regular(tmp_path / "file")
    assert try_lock(first) and not try_lock(second)
    with (tmp_path / "file").open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    first.close()
    assert try_lock(second)
    second.close()


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "file")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        with open_regular(tmp_path / "file") as file:
            assert not try_lock(file)
            process.kill()
            process.wait()
            assert try_lock(file)


def test_opening_and_locking_leave_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with open_regular(tmp_path / "file") as file:
        assert try_lock(file)
        with open_regular(tmp_path / "file") as other:
            assert not try_lock(other)
        assert file.read() == b"mine"
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("seen", [True, False], ids=["there before", "come since the look"])
@pytest.mark.parametrize("kind", ["a symbolic link", "a folder", "a named pipe", "a socket"])
def test_what_is_no_regular_file_is_refused_by_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, seen: bool
) -> None:
    path = tmp_path / "x"
    if kind == "a symbolic link":
        path.symlink_to(tmp_path / "target")
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a named pipe":
        os.mkfifo(path)
    else:
        monkeypatch.chdir(tmp_path)  # the path of a socket is short
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("x")
    look, looks = Path.lstat, []

    def blind_at_first(self: Path) -> os.stat_result:
        looks.append(self)
        if len(looks) == 1 and not seen:
            raise FileNotFoundError
        return look(self)

    monkeypatch.setattr(Path, "lstat", blind_at_first)
    with pytest.raises(NotARegularFile) as refused:
        open_regular(path)
    assert (refused.value.strerror, refused.value.filename) == (f"is {kind}, not a regular file", str(path))
    assert not (tmp_path / "target").exists()


def test_a_device_is_refused() -> None:
    with pytest.raises(NotARegularFile, match="is a device"):
        open_regular(Path(os.devnull))


def test_a_file_that_was_removed_renamed_or_replaced_is_not_the_one_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with open_regular(path) as file:
        assert is_still_at(file, path)
        path.rename(tmp_path / "other")
        assert not is_still_at(file, path) and is_still_at(file, tmp_path / "other")
        path.touch()
        assert not is_still_at(file, path)


def test_without_fcntl_no_soft_lock_takes_its_place(tmp_path: Path) -> None:
    code = "import sys; sys.modules['fcntl'] = None\nfrom pathlib import Path\n"
    code += "from dali_pipeline.lock import NoLocks, try_lock\nfrom dali_pipeline.regular import open_regular\n"
    code += (
        f"try: try_lock(open_regular(Path({str(tmp_path / 'file')!r})))\nexcept NoLocks as error: print(error.strerror)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore:only soft", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "fcntl is unavailable\n", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_closed_file_is_an_error_and_not_a_lack_of_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(filelock, "lock_descriptor", fail)
    with open_regular(tmp_path / "file") as file, pytest.raises(OSError, match="Input/output") as failed:
        try_lock(file)
    assert not isinstance(failed.value, NoLocks)
