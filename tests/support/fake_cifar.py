"""CIFAR archives, folders and pickles of a few records, and an HTTP server that misbehaves on request."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import socket
import struct
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dali_pipeline.dataset import Split
from dali_pipeline.sources.cifar import CIFARS, Cifar, CifarFile


def small(name: str = "cifar10", count: int = 4) -> Cifar:
    """The layout of a CIFAR with `count` records a file; the archive's hash is yet to be set."""
    cifar = CIFARS[name]

    def shrink(file: CifarFile) -> CifarFile:
        return replace(file, count=count)

    return replace(cifar, train_files=tuple(map(shrink, cifar.train_files)), test_file=shrink(cifar.test_file))


def files_of(cifar: Cifar) -> tuple[CifarFile, ...]:
    return (*cifar.train_files, cifar.test_file)


def random_records(cifar: Cifar, seed: int = 0) -> dict[str, bytes]:
    """Content of every binary file, by its name."""
    generator = np.random.default_rng(seed)
    content = {}
    for file in files_of(cifar):
        rows = generator.integers(0, 256, (file.count, cifar.record_bytes), np.uint8)
        for column, limit in enumerate(cifar.label_limits):
            rows[:, column] = generator.integers(0, limit, file.count)
        content[file.binary] = rows.tobytes()
    return content


def records_of(split: Split) -> npt.NDArray[np.uint8]:
    """The (N, record bytes) array that the split's pixels are a view of."""
    records = split.pixels.base
    assert isinstance(records, np.ndarray) and records.ndim == 2 and len(records) == len(split)
    return records


def write_binary_folder(cifar: Cifar, root: Path, content: dict[str, bytes]) -> Path:
    folder = root / cifar.binary_folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return buffer.getvalue()


def member(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def members_of(cifar: Cifar, content: dict[str, bytes]) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [member(f"{cifar.binary_folder}/{name}", data) for name, data in content.items()]


def with_archive(cifar: Cifar, data: bytes, urls: tuple[str, ...] = ()) -> Cifar:
    """The layout whose official archive is `data`."""
    digest = hashlib.sha256(data).hexdigest()
    return replace(cifar, archive=replace(cifar.archive, size=len(data), sha256=digest, urls=urls))


def packed(cifar: Cifar, content: dict[str, bytes], urls: tuple[str, ...] = ()) -> tuple[Cifar, bytes]:
    data = gzip.compress(tar_of(members_of(cifar, content)), 1, mtime=0)
    return with_archive(cifar, data, urls), data


def packed_pickles(cifar: Cifar, content: dict[str, bytes]) -> tuple[Cifar, bytes]:
    """The Python archive of these records, and the layout whose Python archive it is."""
    folder = cifar.pickled_folder
    members = [member(f"{folder}/batches.meta", b"not read")]
    members += [
        member(f"{folder}/{file.pickled}", python2_pickle(cifar, content[file.binary])) for file in files_of(cifar)
    ]
    data = gzip.compress(tar_of(members), 1, mtime=0)
    archive = replace(cifar.pickled_archive, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    return replace(cifar, pickled_archive=archive), data


def python2_pickle(cifar: Cifar, data: bytes) -> bytes:
    """The binary file `data` as Python 2's cPickle (protocol 2) wrote it for the official Python archive."""
    width = len(cifar.label_limits)
    rows = np.frombuffer(data, np.uint8).reshape(-1, cifar.record_bytes)

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    pixels = rows[:, width:].tobytes()
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + text(b"b")
        + b"\x87R(K\x01"
        + b"M"
        + struct.pack("<H", len(rows))
        + b"M"
        + struct.pack("<H", 3072)
        + b"\x86"
        + dtype
        + b"\x89T"
        + struct.pack("<I", len(pixels))
        + pixels
        + b"tb"
    )
    entries = text(b"data") + array
    for column, key in enumerate(cifar.label_keys):
        labels = b"".join(b"K" + bytes([value]) for value in rows[:, column].tolist())
        entries += text(key.encode()) + b"]q" + bytes([column]) + b"(" + labels + b"e"
    entries += text(b"batch_label") + text(b"training batch 1 of 5")
    return b"\x80\x02}(" + entries + b"u."


class Server(ThreadingHTTPServer):
    """Serves `content` at every path; the path's first word says how: see Handler. Notes (path, Range) of requests."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.requests: list[tuple[str, str | None]] = []
        self.held_up: list[str] = []  # by endless answers
        self.released = threading.Event()

    def url(self, behaviour: str, name: str = "file.tar.gz") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{behaviour}/{name}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that hang up are part of the tests


# Answers that never come to an end: what is sent at once, and what then again and again.
_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "status": (b"HTTP/1.1 200 ", b"O"),
    "header": (b"HTTP/1.1 200 OK\r\nServer: ", b"x"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "interim": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "redirect": (b"HTTP/1.1 302 Found\r\nLocation: /good/file.tar.gz\r\n\r\n", b"x"),
    "refusal": (b"HTTP/1.1 403 Forbidden\r\nServer: ", b"x"),
    "chunk": (_CHUNKED + b"1;", b"x"),
    "trailer": (_CHUNKED + b"2\r\n\x1f\x8b\r\n0\r\n", b"A: b\r\n"),
}
REDIRECTS = {
    "ftp": "ftp://127.0.0.1:1/file.tar.gz",
    "file": "file:///etc/hostname",
    "data": "data:application/gzip;base64,H4s=",
    "unknown": "gopher://127.0.0.1/file.tar.gz",
    "broken": "http://[127.0.0.1/file.tar.gz",
}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_CONNECT(self) -> None:
        self.send_error(407)  # asked for as a proxy, it refuses

    def do_GET(self) -> None:
        if not self.path.startswith("/"):
            return self.send_error(407)
        self.server.requests.append((self.path, self.headers.get("Range")))
        behaviour, _, argument = self.path.split("/")[1].partition("-")
        content = self.server.content
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(match.group(1)) if match and behaviour not in ("norange", "norangedrop") else 0
        if behaviour == "status":
            return self.send_error(int(argument))
        if behaviour == "endless":
            return self._dribble(*ENDLESS[argument])
        if behaviour == "redirect":
            self.send_response(302)
            self.send_header("Location", REDIRECTS[argument])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if behaviour in ("html", "htmlchunked"):
            page = b"<!DOCTYPE html><title>Log in to the network</title>"
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            if behaviour == "html":
                self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)
            return None
        if behaviour == "refuse" and match:
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        if behaviour == "wrong":
            content = content[:1000] + bytes(100) + content[1100:]
        if behaviour == "short":
            content = content[: int(argument)]
        if match and start:
            self.send_response(206)
            first = start + 1 if behaviour == "shifted" else start
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if behaviour in ("drop", "norangedrop"):
            self.wfile.write(body[: int(argument)])
        elif behaviour == "reset":
            self.wfile.write(body[: int(argument)])
            time.sleep(0.1)  # what is underway is lost with the connection
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif behaviour == "stall":
            self.wfile.write(body[: int(argument)])
            self.wfile.flush()
            self.server.released.wait(20)
        elif behaviour == "trickle":
            for byte in range(0, 200):
                self.wfile.write(body[byte : byte + 1])
                self.wfile.flush()
                if self.server.released.wait(0.05):
                    break
        elif behaviour == "slow":
            for position in range(0, len(body), 8192):
                self.wfile.write(body[position : position + 8192])
                self.wfile.flush()
                time.sleep(0.02)
        else:
            self.wfile.write(body)
        return None

    def _dribble(self, begin: bytes, again: bytes) -> None:
        """Send `begin`, then `again` twenty times a second, until the client or the test has gone; one that stays for ten seconds
        has been held up."""
        self.close_connection = True
        self.wfile.write(begin)
        for _ in range(200):
            self.wfile.write(again)
            self.wfile.flush()
            if self.server.released.wait(0.05):
                return
        self.server.held_up.append(self.path)


@contextmanager
def serve(content: bytes) -> Iterator[Server]:
    server = Server(content)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
