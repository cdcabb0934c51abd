"""Checkpoints: plain dicts of tensors and numbers in a file that survives a kill at any moment. A damaged one is not loaded."""

from __future__ import annotations

import hashlib
import io
import os
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from dali_pipeline.errors import UserError
from dali_pipeline.regular import NotARegularFile, open_to_read
from train.disk.atomic import write_atomic
from train.failpoints import failpoint

FORMAT = 3  # 1 had no net.logit_scale; in 2 "optimizer" was the state of the one SGD, now it is a state for each kind
CHECKPOINTS = ("last.pt", "previous.pt", "best.pt")
READABLE_FORMATS = (2, FORMAT)  # disk/snapshot.py brings the older ones up to date
_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64  # the digest in hexadecimal


class CheckpointError(UserError):
    """A checkpoint that cannot be used. The message is one line: the file, what is wrong and the remedy."""


def seal(content: bytes) -> bytes:
    """Put the sha256 of a zip file into its comment field, where `torch.load` and zip tools ignore it."""
    if content[-2:] != b"\0\0":
        raise ValueError("expected a zip file without a comment")
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[:-2] + _COMMENT.to_bytes(2, "little") + _MARK + digest


def unseal(content: bytes) -> bytes:
    """The content that `seal` was given; ValueError where a byte differs or the checksum is missing."""
    body, comment = content[:-_COMMENT], content[-_COMMENT:]
    if not comment.startswith(_MARK) or body[-2:] != _COMMENT.to_bytes(2, "little"):
        raise ValueError("it carries no sha256: cut short, or written by another program")
    original = body[:-2] + b"\0\0"
    if hashlib.sha256(original).hexdigest().encode() != comment[len(_MARK) :]:
        raise ValueError("its sha256 does not match its content: damaged")
    return original


def carries_seal(path: Path) -> bool:
    """Whether a file ends with the comment that `seal` writes; the rest of it may be damaged."""
    try:
        with open_to_read(path) as file:
            return _ends_in_seal(file)
    except OSError:
        return False


def _ends_in_seal(file: FileIO) -> bool:
    file.seek(max(file.seek(0, os.SEEK_END) - _COMMENT, 0))
    return file.read(len(_MARK)) == _MARK


def _read_sealed(path: Path) -> bytes:
    """The content of a file; none of it where it does not end in a seal, however large it is."""
    with open_to_read(path) as file:
        if not _ends_in_seal(file):
            return b""
        file.seek(0)
        return file.readall()


def save_checkpoint(path: str | Path, state: dict[str, Any], keep_previous: Path | None = None) -> None:
    """Write `state` (nested dicts and lists of tensors, numbers, text, None) atomically, sealed by its sha256.

    The file is an ordinary torch file: `torch.load(path, weights_only=True)` reads it without this module.
    """
    write_atomic(Path(path), pack(state), keep_previous)


def save_last(folder: Path, state: dict[str, Any], best: bool) -> None:
    """Write last.pt and keep the one before it as previous.pt; if `best`, write best.pt first."""
    content = pack(state)
    if best:  # first, because after a kill between the two the resumed run writes best.pt again
        write_atomic(folder / "best.pt", content)
        failpoint("best written")
    write_atomic(folder / "last.pt", content, keep_previous=folder / "previous.pt")
    failpoint("last written")


def on_host(value: Any) -> Any:
    """A copy of `value` with its tensors on the host. Later changes to `value` do not change the copy."""
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
    except RuntimeError as error:  # torch's writer raises this when it closes a file for which memory did not suffice
        if isinstance(error.__context__, MemoryError):
            raise error.__context__ from None
        raise
    return seal(buffer.getvalue())


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint: its sha256 is verified first, then it is unpickled with `weights_only=True`, so no code in it can run.

    Raises CheckpointError where the file is missing, damaged, of another format, or holds anything but plain data.
    """
    path = Path(path)
    try:
        content = _read_sealed(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such checkpoint; a run writes last.pt before its first step, best.pt after its first epoch"
        ) from None
    except NotARegularFile as error:
        raise CheckpointError(f"{path}: {error.strerror}{_other(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except MemoryError:
        raise CheckpointError(f"{path}: not usable, its {path.stat().st_size:,} bytes do not fit the memory") from None
    try:
        state = torch.load(io.BytesIO(unseal(content)), map_location=map_location, weights_only=True)
    except ValueError as error:
        raise CheckpointError(f"{path}: not usable, {error}{_other(path)}") from None
    except Exception as error:  # crafted bytes can make torch's unpickler raise any error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: refused, it does not hold plain tensors and numbers: {reason}") from None
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if not isinstance(state, dict) or type(found) is not int or found not in READABLE_FORMATS:
        raise CheckpointError(
            f"{path}: of format {found!r}, this version reads format {FORMAT}; use the version that wrote it"
        )
    return state


def _other(path: Path) -> str:
    others = [name for name in CHECKPOINTS if name != path.name and (path.parent / name).exists()]
    return f"; {others[0]} beside it may be whole" if others else ""
