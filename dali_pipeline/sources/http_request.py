"""One request over http or https, with a time limit for each part of its answer, however slowly that arrives.

urllib's own limit is for one read of the socket: a server that sends a byte of a header, or an interim answer (HTTP 100),
now and then would be waited for without end. Here a read ends at a moment that the caller sets.
"""

from __future__ import annotations

import io
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from http.client import HTTPConnection, HTTPMessage, HTTPResponse, HTTPSConnection
from typing import IO, Any
from urllib.parse import urlsplit

SCHEMES = ("http", "https")


class Deadline:
    """The moment at which reading ends with TimeoutError."""

    def __init__(self, seconds: float) -> None:
        self.extend(seconds)

    def extend(self, seconds: float) -> None:
        """From now on so many seconds are left."""
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left; raises TimeoutError where none are."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def open_url(url: str, headers: dict[str, str], deadline: Deadline) -> HTTPResponse:
    """The answer to a GET of an http or https address, with its headers read: they, and those of every redirect, have until
    `deadline`, as has every later read of the answer. Goes through the proxy that the environment names.

    Raises what urllib does: HTTPError for an answer that is none of success, also for a redirect to another scheme; OSError
    (TimeoutError at the deadline), HTTPException or ValueError where there is no answer.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
        _Http(deadline),
        _Https(deadline),
    ):
        opener.add_handler(handler)
    answer: HTTPResponse = opener.open(urllib.request.Request(url, headers=headers), timeout=deadline.left())
    return answer


def proxy_for(url: str) -> str | None:
    """The proxy through which `url` is asked for and where it is named: "proxy.example:3128 (https_proxy)"; None where there
    is none. A password in the proxy's address is left out."""
    try:
        parts = urlsplit(url)
    except ValueError:  # no address at all
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or (parts.hostname and urllib.request.proxy_bypass(parts.hostname)):
        return None
    name = f"{parts.scheme}_proxy"
    name = next((found for found in (name, name.upper()) if os.environ.get(found)), "the system's settings")
    return f"{proxy.rpartition('@')[2].rpartition('//')[2].rstrip('/')} ({name})"


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in SCHEMES:
            raise urllib.error.HTTPError(
                req.full_url, code, f"redirects to {newurl}, not an http or https address", headers, fp
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self._connect = partial(_connection, HTTPConnection, deadline)

    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(self._connect, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self._connect = partial(_connection, HTTPSConnection, deadline)

    def https_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(self._connect, req)


def _connection(kind: Callable[..., HTTPConnection], deadline: Deadline, host: str, **options: Any) -> HTTPConnection:
    connection = kind(host, **options)
    # a proxy's answer to CONNECT is read through this class too
    connection.response_class = partial(_Answer, deadline)  # type: ignore[assignment]
    return connection


class _Answer(HTTPResponse):
    def __init__(self, deadline: Deadline, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_UntilDeadline(sock, deadline))


class _UntilDeadline(io.RawIOBase):
    """The bytes of a socket. A read raises TimeoutError at the deadline."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._socket, self._deadline = sock, deadline
        self._raw: Any = sock.makefile("rb", buffering=0)  # keeps the socket open after its own close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(self._deadline.left())
        count: int | None = self._raw.readinto(buffer)
        return count

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()
