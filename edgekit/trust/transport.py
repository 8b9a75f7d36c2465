"""HTTP GET with bounds: time to the headers, gaps, minimum rate, size; no redirect leaves the server.

Bytes are handed out as they come and never decoded, so that what is counted and hashed is what travelled. Whoever serves the
bytes is not trusted: a server that drips, stalls, redirects or never ends costs bounded time and bounded bytes.

    >>> with Transport().get("http://127.0.0.1:8600/metadata/timestamp.json") as answer:  # doctest: +SKIP
    ...     data = b"".join(answer.chunks(max_bytes=16384))
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Self
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

Fault = Literal["unreachable", "cut", "slow", "status", "too_long", "redirect", "encoding", "tls"]
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 3
_OK_STATUS = frozenset({200, 206})


class TransportError(Exception):
    """A request that failed; ``fault`` says how. Callers translate it to the error of their own family."""

    def __init__(self, fault: Fault, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.fault: Fault = fault
        self.status = status


@dataclass(frozen=True, kw_only=True)
class TransportOptions:
    """Bounds and TLS files. ``min_bytes_per_s`` holds on average once ``grace_s`` has passed."""

    connect_timeout_s: float = 10.0
    read_timeout_s: float = 20.0
    """The longest silence."""
    headers_timeout_s: float = 30.0
    """From the request to the end of the answer's headers."""
    min_bytes_per_s: float = 256.0
    grace_s: float = 15.0
    ca_file: str | None = None
    client_cert_file: str | None = None
    client_key_file: str | None = None
    user_agent: str = "edgekit"


class Answer:
    """An open answer: status and headers are here, the body is not read yet."""

    def __init__(self, response: urllib3.response.BaseHTTPResponse, options: TransportOptions, url: str) -> None:
        self._response, self._options, self._url = response, options, url
        self.status: int = response.status
        self.headers: Mapping[str, str] = response.headers
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()

    @property
    def length(self) -> int | None:
        """The Content-Length, where it is a number."""
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() else None

    def chunks(self, *, max_bytes: int, chunk_bytes: int = 1 << 16) -> Iterator[bytes]:
        """The body as it comes.

        Raises:
            TransportError: ``too_long`` before more than ``max_bytes`` are handed out, ``slow``, ``cut``.
        """
        if self.length is not None and self.length > max_bytes:
            raise TransportError("too_long", f"{self._url}: {self.length} bytes, at most {max_bytes} are expected")
        received = 0
        while chunk := self._read(min(chunk_bytes, max_bytes - received + 1)):
            received += len(chunk)
            if received > max_bytes:
                raise TransportError("too_long", f"{self._url}: more than the {max_bytes} bytes that are expected")
            self._check_rate(received)
            yield chunk

    def _read(self, size: int) -> bytes:
        # read1 returns after one receive: a drip cannot hide behind a large read
        with _translated(self._url):
            return self._response.read1(size, decode_content=False) or b""

    def _check_rate(self, received: int) -> None:
        spent = time.monotonic() - self._started
        if spent > self._options.grace_s and received < spent * self._options.min_bytes_per_s:
            rate = received / spent
            raise TransportError(
                "slow", f"{self._url}: {rate:.0f} bytes/s, at least {self._options.min_bytes_per_s:.0f} are wanted"
            )


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    """Errors of urllib3 and of sockets as ours."""
    try:
        yield
    except urllib3.exceptions.SSLError as error:
        raise TransportError("tls", f"{url}: TLS failed: {error}") from error
    except (urllib3.exceptions.ConnectTimeoutError, urllib3.exceptions.NewConnectionError) as error:
        raise TransportError("unreachable", f"{url}: cannot connect") from error
    except (urllib3.exceptions.TimeoutError, TimeoutError) as error:
        raise TransportError("slow", f"{url}: the server fell silent") from error
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise TransportError("cut", f"{url}: the connection broke: {error}") from error


class Transport:
    """Connections to one server, one request at a time."""

    def __init__(self, options: TransportOptions | None = None) -> None:
        self.options = options or TransportOptions()
        self._pools: dict[tuple[str, str | None, int | None], urllib3.HTTPConnectionPool] = {}
        self._connections: weakref.WeakSet[HTTPConnection] = weakref.WeakSet()

    def close(self) -> None:
        """Close every connection; a later request opens new ones."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def get(self, url: str, *, headers: Mapping[str, str] | None = None, ok: frozenset[int] = _OK_STATUS) -> Answer:
        """Ask for a file.

        Args:
            url: http or https.
            headers: further request headers.
            ok: statuses that are an answer; others are a ``status`` fault.

        Raises:
            TransportError: ``unreachable``, ``cut``, ``slow``, ``status``, ``redirect``, ``encoding`` or ``tls``.
        """
        origin = _origin(url)
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._request(url, headers or {})
            if response.status not in _REDIRECTS:
                return self._checked(response, url, ok)
            location = _joined(url, response.headers.get("Location", ""))
            response.close()
            if _origin(location) != origin:
                raise TransportError("redirect", f"{url}: redirects to another server, {location}; that is not followed")
            url = location
        raise TransportError("redirect", f"{url}: redirects without end")

    def _checked(self, response: urllib3.response.BaseHTTPResponse, url: str, ok: frozenset[int]) -> Answer:
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if response.status not in ok:
            response.close()
            raise TransportError("status", f"{url}: HTTP {response.status}", status=response.status)
        if encoding not in {"identity", ""}:
            response.close()
            raise TransportError("encoding", f"{url}: sent as {encoding}, which was not asked for")
        return Answer(response, self.options, url)

    def _request(self, url: str, headers: Mapping[str, str]) -> urllib3.response.BaseHTTPResponse:
        sent = {"User-Agent": self.options.user_agent, "Accept-Encoding": "identity", **headers}
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        is_late = threading.Event()
        watchdog = threading.Timer(self.options.headers_timeout_s, self._shut_down, [is_late])
        watchdog.daemon = True
        watchdog.start()
        try:
            with _translated(url):
                pool = self._pool(url)
                response = pool.urlopen("GET", target, headers=sent, preload_content=False, redirect=False, retries=False)
        finally:
            watchdog.cancel()
        if is_late.is_set():  # the end of a cut connection was taken for the end of the headers
            response.close()
            raise TransportError("slow", f"{url}: no complete answer within {self.options.headers_timeout_s:.0f} s")
        return response

    def _shut_down(self, is_late: threading.Event) -> None:
        """End what is open: headers that drip would else pass every timeout between two bytes."""
        is_late.set()
        for connection in list(self._connections):
            if isinstance(connection.sock, socket.socket):
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _pool(self, url: str) -> urllib3.HTTPConnectionPool:
        origin = _origin(url)
        if origin not in self._pools:
            self._pools[origin] = self._new_pool(origin, url)
        return self._pools[origin]

    def _new_pool(self, origin: tuple[str, str | None, int | None], url: str) -> urllib3.HTTPConnectionPool:
        scheme, host, port = origin
        if scheme not in {"http", "https"} or not host:
            raise TransportError("unreachable", f"{url}: not an http or https address")
        timeout = urllib3.Timeout(connect=self.options.connect_timeout_s, read=self.options.read_timeout_s)
        pool: urllib3.HTTPConnectionPool
        if scheme == "https":
            options = self.options
            pool = urllib3.HTTPSConnectionPool(
                host,
                port,
                timeout=timeout,
                maxsize=1,
                cert_reqs="CERT_REQUIRED",
                ca_certs=options.ca_file,
                cert_file=options.client_cert_file,
                key_file=options.client_key_file,
            )
        else:
            pool = urllib3.HTTPConnectionPool(host, port, timeout=timeout, maxsize=1)
        pool.ConnectionCls = _watched(self._connections, is_tls=scheme == "https")
        return pool


def _watched(connections: weakref.WeakSet[HTTPConnection], *, is_tls: bool) -> type[HTTPConnection]:
    """A connection class that enrols its connections, so that the watchdog reaches their sockets."""
    base: type[HTTPConnection] = HTTPSConnection if is_tls else HTTPConnection

    class Watched(base):  # type: ignore[misc, valid-type]
        def connect(self) -> None:
            connections.add(self)
            super().connect()

    return Watched


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise TransportError("redirect", f"{url}: redirects to {location[:200]!r}, which is not an address") from error


def _origin(url: str) -> tuple[str, str | None, int | None]:
    try:
        parts = urlsplit(url)
        return parts.scheme.lower(), parts.hostname, parts.port
    except ValueError as error:
        raise TransportError("unreachable", f"{url}: not a valid address") from error
