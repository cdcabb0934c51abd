"""Fetch a file of known size and SHA-256 from a list of mirrors, resumably; nothing unverified gets the final name."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
import time
import urllib.error
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from io import FileIO
from pathlib import Path

from dali_pipeline.lock import NoLocks, is_still_at, try_lock
from dali_pipeline.progress import Meter, Say
from dali_pipeline.regular import open_regular
from dali_pipeline.sources.http_request import SCHEMES, Deadline, open_url, proxy_for

CHUNK = 1 << 18  # bytes asked of the socket or the disk at once
GZIP_MAGIC = b"\x1f\x8b"
MAX_CONNECTIONS = 100  # to one mirror: bounds a server that drops every connection after a few bytes


@dataclass(frozen=True)
class Archive:
    """A gzip file to fetch: `size` in bytes, `sha256` in hex, `urls` in the order in which they are tried."""

    name: str
    size: int
    sha256: str
    urls: tuple[str, ...]


class DownloadError(Exception):
    """`reasons`: one line for each mirror that was tried, or for the local file that could not be written."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = tuple(reasons)


class DiskFailed(DownloadError):
    """The bytes came, and could not be written: a full disk, a quota, a limit of the file's size."""


class _MirrorFailed(Exception):
    """This mirror cannot deliver; the next one is asked for the bytes that are still missing."""


class _ConnectionLost(Exception):
    """The connection broke. The same mirror is asked for the rest, as long as every connection delivers new bytes."""

    def __init__(self, reason: str, *, gained: bool) -> None:
        super().__init__(reason)
        self.gained = gained


def fetch(
    archive: Archive,
    folder: Path,
    *,
    say: Say | None = None,
    timeout: float = 30.0,
    min_rate: float = 4096.0,
    pause: float = 1.0,
) -> Path:
    """Download `archive` into `folder` and return its path; raises DownloadError when no mirror delivers, DiskFailed when what
    one delivers cannot be written.

    Bytes collect in NAME.part, which survives failure, Ctrl-C and kill -9 and is resumed by the next call, from any
    mirror, with an HTTP Range request; NAME appears by `os.replace` after size and SHA-256 are right. A mirror is given
    up when its answer has not begun, with all its headers, after `timeout` seconds, when as many pass without a byte of the
    file, or at less than `min_rate` bytes/s. `pause`: seconds between two connections to the same mirror. `say` receives lines
    about the progress; where stderr is a terminal there is a progress bar too. With None there is neither.

    Two processes may call this at once: the second waits for the first, by a lock on NAME.part. On a file system without
    locks `say` is told so; two downloads at once then fail by their checksum and never leave a wrong file.
    """
    path, part = folder / archive.name, folder / (archive.name + ".part")
    meter = Meter(archive.name, archive.size, say)
    reasons: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_locked(part, path, meter)
        if file is None:
            return path
        with file:
            try:
                for url in archive.urls:
                    try:
                        _complete(url, file, archive, meter, timeout, min_rate, pause)
                    except _MirrorFailed as error:
                        reasons.append(f"{url}: {error}")
                        continue
                    os.fsync(file.fileno())
                    if sys.platform == "win32":
                        file.close()  # an open file cannot be renamed there
                    part.replace(path)
                    _sync_folder(folder)
                    return path
            except OSError as error:  # the disk: errors of the network have become _MirrorFailed
                raise DiskFailed([*reasons, f"{part}: {error.strerror or error}"]) from error
            finally:
                meter.close()
                if not file.closed:
                    kept = file.seek(0, os.SEEK_END)
                    if sys.platform == "win32":
                        file.close()
                    if kept:
                        reasons.append(f"{part}: {kept:,} of {archive.size:,} bytes kept, to be resumed")
                    else:
                        part.unlink(missing_ok=True)
    except OSError as error:  # no file can be made there; also on a full disk the remedy is room
        kind = DiskFailed if error.errno in (errno.ENOSPC, errno.EDQUOT) else DownloadError
        raise kind([*reasons, f"{part}: {error.strerror or error}"]) from error
    raise DownloadError(reasons)


def sha256_of(file: FileIO) -> str:
    """Hex digest of the whole of an open file, whose position moves to the end."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _complete(
    url: str, file: FileIO, archive: Archive, meter: Meter, timeout: float, min_rate: float, pause: float
) -> None:
    """Bring the partial file to its full, verified content from this mirror, or raise _MirrorFailed."""
    if url.partition(":")[0].lower() not in SCHEMES:
        raise _MirrorFailed("not an http or https address")
    own = False  # all bytes of the file came from this mirror
    for _ in range(MAX_CONNECTIONS):
        have = file.seek(0, os.SEEK_END)
        if have >= archive.size:
            digest = sha256_of(file)
            if digest == archive.sha256:
                return
            file.truncate(0)
            if own:
                raise _MirrorFailed(f"wrong bytes: sha256 {digest}, expected {archive.sha256}")
            have = 0  # an earlier mirror's bytes may be the wrong ones: start over with this mirror alone
        own = own or have == 0
        try:
            restarted = _transfer(url, file, have, archive, meter, timeout, min_rate)
        except _ConnectionLost as error:
            if not error.gained:
                raise _MirrorFailed(str(error)) from error
            meter.say(f"{archive.name}: {error}")
            time.sleep(pause)
        else:
            own = own or restarted
    raise _MirrorFailed(f"the connection broke {MAX_CONNECTIONS} times")


def _transfer(
    url: str, file: FileIO, have: int, archive: Archive, meter: Meter, timeout: float, min_rate: float
) -> bool:
    """One request for the bytes from `have` on, appended to `file`; True if the server made it start over at 0."""
    headers = {"User-Agent": "cifar-throughput", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    deadline = Deadline(timeout)
    try:
        response = open_url(url, headers, deadline)
    except urllib.error.HTTPError as error:
        with error:
            total = _content_range(error.headers.get("Content-Range"))[1]
            if error.code == 416 and have and total in (None, archive.size):
                file.truncate(0)
                return True
            raise _MirrorFailed(f"HTTP {error.code} {error.reason}{_through_proxy(url)}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise _MirrorFailed(_reason(error, f"no answer within {timeout:g} s") + _through_proxy(url)) from error
    with response:
        kind = response.headers.get("Content-Type", "no content type")
        if response.status == 206 and have:
            start, total = _content_range(response.headers.get("Content-Range"))
            if start != have or total not in (None, archive.size):
                raise _MirrorFailed(
                    f"asked for bytes from {have} of {archive.size}, got Content-Range "
                    f"{response.headers.get('Content-Range')!r}"
                )
        elif response.status == 200:
            length = response.headers.get("Content-Length")
            if length is not None and length != str(archive.size):
                raise _MirrorFailed(f"{length} bytes ({kind}), expected {archive.size}")
        else:
            raise _MirrorFailed(f"HTTP {response.status} {response.reason}")
        restarted = response.status == 200 and have > 0
        position = 0 if response.status == 200 else have
        meter.say(f"{archive.name}: from {url}" + (f", resumed at {position:,} bytes" if position else ""))
        window_start, window_bytes = time.monotonic(), 0
        while position < archive.size:
            deadline.extend(timeout)
            try:
                # read1 returns what has arrived; read would wait for a full chunk, however slowly the bytes come
                chunk = response.read1(CHUNK)
            except (OSError, HTTPException, ValueError) as error:
                reason = _reason(error, f"no data for {timeout:g} s")
                if isinstance(error, TimeoutError):
                    raise _MirrorFailed(reason) from error
                reason = f"{reason} at {position} of {archive.size} bytes"
                raise _ConnectionLost(reason, gained=position > have) from error
            if not chunk:
                reason = f"connection closed after {position} of {archive.size} bytes"
                raise _ConnectionLost(reason, gained=position > have)
            if position == 0:
                if not GZIP_MAGIC.startswith(chunk[:2]):
                    raise _MirrorFailed(f"not a gzip file: {kind}, begins with {chunk[:40]!r}")
                file.truncate(0)  # only now: a useless answer must not discard what an earlier mirror sent
                file.seek(0)
            view = memoryview(chunk)[: archive.size - position]
            position += len(view)
            window_bytes += len(view)
            while view:
                view = view[file.write(view) :]
            meter.show(position)
            elapsed = time.monotonic() - window_start
            if elapsed >= timeout:
                if window_bytes < min_rate * elapsed and position < archive.size:
                    raise _MirrorFailed(f"too slow: {window_bytes} bytes in {elapsed:.0f} s, at {position}")
                window_start, window_bytes = time.monotonic(), 0
    return restarted


def _content_range(header: str | None) -> tuple[int | None, int | None]:
    """(first byte, total size) of a Content-Range header, each None where it is not said."""
    match = re.fullmatch(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(?:(\d{1,18})|\*)", (header or "").strip())
    if match is None:
        return None, None
    start, total = (None if group is None else int(group) for group in match.groups())
    return start, total


def _through_proxy(url: str) -> str:
    proxy = proxy_for(url)
    return "" if proxy is None else f" (asked through the proxy {proxy})"


def _reason(error: Exception, late: str) -> str:
    """What went wrong, in one line; `late` where the time was up."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError):
        return late
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def _open_locked(part: Path, done: Path, meter: Meter) -> FileIO | None:
    """The partial file, open and locked by this process; None when another process has completed the download."""
    waiting = False
    while not done.exists():
        file = open_regular(part)
        try:
            locked = try_lock(file)
        except NoLocks as error:
            meter.say(
                f"{part}: nothing can be locked on this file system ({error.strerror}); the download goes on without a lock"
            )
            return file
        except OSError:
            file.close()
            raise
        if not locked:
            file.close()
            if not waiting:
                meter.say(f"{part}: another process is downloading it; waiting")
            waiting = True
            time.sleep(0.2)
            continue
        # the last holder may have renamed or removed the file between our open and our lock
        if is_still_at(file, part):
            if not done.exists():
                return file
            if sys.platform == "win32":
                file.close()  # an open file cannot be removed there
            part.unlink(missing_ok=True)
        file.close()
    return None


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system lets a folder be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
