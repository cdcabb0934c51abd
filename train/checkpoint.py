"""Checkpoints that survive a kill at any moment and refuse to load damaged: plain dicts of tensors and numbers."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

FORMAT = 2  # 1 had no net.logit_scale
CHECKPOINTS = ("last.pt", "previous.pt", "best.pt")
_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64  # the digest in hexadecimal


class CheckpointError(Exception):
    """A checkpoint that cannot be used: one line naming the file, what is wrong and the remedy."""


class WriteError(OSError):
    """A file that cannot be written; the one before it is intact. `filename` names it."""


def seal(content: bytes) -> bytes:
    """Put the sha256 of a zip file into its comment field, where `torch.load` and zip tools ignore it."""
    if content[-2:] != b"\0\0":
        raise ValueError("expected a zip file without a comment")
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[:-2] + _COMMENT.to_bytes(2, "little") + _MARK + digest


def unseal(content: bytes) -> bytes:
    """Give back what `seal` was given; ValueError where a byte differs or the seal is missing."""
    body, comment = content[:-_COMMENT], content[-_COMMENT:]
    if not comment.startswith(_MARK) or body[-2:] != _COMMENT.to_bytes(2, "little"):
        raise ValueError("it carries no sha256: cut short, or written by another program")
    original = body[:-2] + b"\0\0"
    if hashlib.sha256(original).hexdigest().encode() != comment[len(_MARK) :]:
        raise ValueError("its sha256 does not match its content: damaged")
    return original


def carries_seal(path: Path) -> bool:
    """Whether a file ends as `seal` leaves it, damaged elsewhere or not."""
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _COMMENT, 0))
            return file.read(len(_MARK)) == _MARK
    except OSError:
        return False


def fsync_folder(folder: Path) -> None:
    """Make a rename in the folder durable (a no-op where folders cannot be opened, as on Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_new(path: Path) -> BinaryIO:
    """Open a file for writing that nobody else has: what had its name is removed, and no link is followed."""
    path.unlink(missing_ok=True)
    return path.open("xb")  # O_EXCL, which refuses a link too


def write_atomic(path: Path, content: bytes, keep_previous: Path | None = None) -> None:
    """Replace `path` by `content` so that at every moment it is whole: the old file or the new one.

    A symbolic link of that name is itself replaced; its target stays. With `keep_previous`, what `path` held before stays
    under that name. Raises WriteError, also where the name is that of a folder, a device or a pipe.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is there and no regular file")
        with open_new(temporary) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous is not None and path.exists():
            _keep(path, keep_previous)
        temporary.replace(path)
        fsync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WriteError(error.errno, error.strerror or str(error), str(path)) from error
        raise


def _keep(path: Path, keep_previous: Path) -> None:
    """Give `path` a second name, so that it is never missing itself."""
    link = keep_previous.with_name(f".{keep_previous.name}.{os.getpid()}.tmp")
    try:
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            with path.open("rb") as source, open_new(link) as copy:
                shutil.copyfileobj(source, copy)
        link.replace(keep_previous)
    except BaseException:
        with contextlib.suppress(OSError):
            link.unlink(missing_ok=True)
        raise


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """`write_atomic` for a table."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_atomic(path, text.getvalue().encode())


def is_temporary(name: str, of: Sequence[str] = CHECKPOINTS) -> bool:
    """Whether a file's name is one under which `write_atomic` writes a file of these names."""
    match = re.fullmatch(r"\.(.+)\.\d+\.tmp", name)
    return match is not None and match[1] in of


def remove_stale(folder: Path, names: Sequence[str] = CHECKPOINTS) -> None:
    """Remove temporary files of these names that a killed process left behind."""
    for stale in folder.glob(".*.tmp"):
        if is_temporary(stale.name, names):
            stale.unlink(missing_ok=True)


def save_checkpoint(path: str | Path, state: dict[str, Any], keep_previous: Path | None = None) -> None:
    """Write `state` (nested dicts and lists of tensors, numbers, text, None) atomically, sealed by its sha256.

    The file is an ordinary torch file: `torch.load(path, weights_only=True)` reads it without this module.
    """
    write_atomic(Path(path), pack(state), keep_previous)


def save_last(folder: Path, state: dict[str, Any], best: bool) -> None:
    """Write last.pt, which stays as previous.pt after the next one, and before it best.pt where this is the best."""
    content = pack(state)
    if best:  # first: after a kill between the two, the resumed run writes it again
        write_atomic(folder / "best.pt", content)
    write_atomic(folder / "last.pt", content, keep_previous=folder / "previous.pt")


def on_host(value: Any) -> Any:
    """`value` with its tensors copied to the host and its lists and dicts copied: what comes later changes nothing in it."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_host(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_host(part) for part in value)
    return value


def pack(state: dict[str, Any]) -> bytes:
    """The content of a checkpoint's file."""
    buffer = io.BytesIO()
    try:
        torch.save({"format": FORMAT, **state}, buffer)
    except RuntimeError as error:  # what torch's writer says when it closes a file that memory did not suffice for
        if isinstance(error.__context__, MemoryError):
            raise error.__context__ from None
        raise
    return seal(buffer.getvalue())


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint, its sha256 verified first, then unpickled with `weights_only=True`: no code in it can run.

    Raises CheckpointError where the file is missing, damaged, of another format, or holds anything but plain data.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such checkpoint; a run writes last.pt before its first step, best.pt after its first epoch"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        state = torch.load(io.BytesIO(unseal(content)), map_location=map_location, weights_only=True)
    except ValueError as error:
        raise CheckpointError(f"{path}: not usable, {error}{_other(path)}") from None
    except Exception as error:  # of any kind: with bytes made up for it, torch's unpickler fails in any of its lines
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: refused, it does not hold plain tensors and numbers: {reason}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{path}: of format {found!r}, this version reads format {FORMAT}; use the version that wrote it"
        )
    return state


def _other(path: Path) -> str:
    others = [name for name in CHECKPOINTS if name != path.name and (path.parent / name).exists()]
    return f"; {others[0]} beside it may be whole" if others else ""
