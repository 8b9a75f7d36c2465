"""A static HTTP server for a repository: HEAD, Range, validators and cache headers; three folders and nothing else.

Only names that a repository has are looked up, one path component at a time and never through a symbolic link, so that keys,
configuration and whatever else lies around cannot be reached. Metadata is signed and blobs are named by their digest: the
server is not trusted by anybody.

    >>> with RepositoryServer(Path("repository"), "127.0.0.1", 0) as server:  # doctest: +SKIP
    ...     print(server.url)
    http://127.0.0.1:43210
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import socket
import ssl
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import unquote, urlsplit

from edgekit.errors import EnvironmentFault, RepositoryError, UsageError
from edgekit.trust.tls import ServerTls

logger = logging.getLogger(__name__)

_HEX = "[0-9a-f]{64}"
_NAME = r"[0-9A-Za-z](?:[0-9A-Za-z.+_-]{0,62}[0-9A-Za-z])?"
_IMMUTABLE = re.compile(
    rf"blobs/sha256/({_HEX})\Z|targets/(?:models/{_NAME}/{_NAME}/(?:{_NAME}/)?({_HEX})\.manifest|({_HEX})\.recalls)\.json\Z"
)
_VERSIONED = re.compile(r"metadata/[0-9]{1,18}\.[a-z][a-z0-9_-]{0,63}\.json\Z")
_MUTABLE = "metadata/timestamp.json"
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})\Z")
_COPY_BYTES = 1 << 18
_IDLE_SECONDS = 30


@dataclass(frozen=True)
class Served:
    """An open file with what is sent about it."""

    file: BinaryIO
    size_bytes: int
    etag: str
    cache: str
    kind: str


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """The first and last byte of a single range; None where the whole file is to be sent (no range, several, not understood).

    Raises:
        ValueError: the range lies outside the file.
    """
    match = _RANGE.match(text.replace(" ", ""))
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, end = max(0, size - int(last)), size - 1
        if int(last) == 0:
            raise ValueError("an empty suffix")
    else:
        start, end = int(first), min(int(last) if last else size - 1, size - 1)
        if last and int(last) < int(first):
            return None
    if start >= size:
        raise ValueError("outside the file")
    return start, end


def open_served(root: Path, path: str) -> Served | None:
    """Open what a request path names; None when there is no such file, or nobody may have it."""
    immutable = _IMMUTABLE.match(path)
    if not (immutable or _VERSIONED.match(path) or path == _MUTABLE):
        return None
    file = _open_beneath(root, path)
    if file is None:
        return None
    size = os.fstat(file.fileno()).st_size
    cache = "no-cache" if path == _MUTABLE else "public, max-age=31536000, immutable"
    kind = "application/octet-stream" if path.startswith("blobs/") else "application/json"
    if immutable:
        etag = next(filter(None, immutable.groups()))
    else:
        etag = hashlib.sha256(file.read()).hexdigest()
        file.seek(0)
    return Served(file=file, size_bytes=size, etag=f'"{etag}"', cache=cache, kind=kind)


def _open_beneath(root: Path, path: str) -> BinaryIO | None:
    """Open a regular file below ``root`` without following a link in any component."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        *parents, name = path.split("/")
        for parent in parents:
            inner = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return None
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return os.fdopen(descriptor, "rb")


class _Handler(BaseHTTPRequestHandler):
    server: RepositoryServer
    protocol_version = "HTTP/1.1"
    server_version = "edgekit"
    sys_version = ""
    timeout = _IDLE_SECONDS
    disable_nagle_algorithm = True
    """Headers and body are two packets; waiting for the first one's receipt would cost 40 ms a request."""

    def do_GET(self) -> None:
        self._answer(is_head=False)

    def do_HEAD(self) -> None:
        self._answer(is_head=True)

    def _answer(self, *, is_head: bool) -> None:
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # a body that nobody reads must not be taken for the next request
        path = unquote(urlsplit(self.path).path).removeprefix("/")
        served = open_served(self.server.root, path)
        if served is None:
            self._empty(HTTPStatus.NOT_FOUND)
            return
        with served.file:
            self._send(served, is_head=is_head)

    def _send(self, served: Served, *, is_head: bool) -> None:
        if self.headers.get("If-None-Match") == served.etag:
            self._empty(HTTPStatus.NOT_MODIFIED, {"ETag": served.etag, "Cache-Control": served.cache})
            return
        wanted = self.headers.get("Range", "") if self.headers.get("If-Range", served.etag) == served.etag else ""
        try:
            part = parse_range(wanted, served.size_bytes)
        except ValueError:
            self._empty(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, {"Content-Range": f"bytes */{served.size_bytes}"})
            return
        first, last = part or (0, served.size_bytes - 1)
        self.send_response(HTTPStatus.PARTIAL_CONTENT if part else HTTPStatus.OK)
        headers = {
            "Content-Type": served.kind,
            "Content-Length": str(last - first + 1),
            "Accept-Ranges": "bytes",
            "ETag": served.etag,
            "Cache-Control": served.cache,
            "X-Content-Type-Options": "nosniff",
        }
        if part:
            headers["Content-Range"] = f"bytes {first}-{last}/{served.size_bytes}"
        self._headers(headers)
        if not is_head:
            self._copy(served.file, first, last - first + 1)

    def _copy(self, file: BinaryIO, first: int, count: int) -> None:
        file.seek(first)
        while count and (chunk := file.read(min(_COPY_BYTES, count))):
            self.wfile.write(chunk)
            count -= len(chunk)
        if count:
            self.close_connection = True  # the file became shorter: the client must see the gap

    def _empty(self, status: HTTPStatus, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        rest = {} if status == HTTPStatus.NOT_MODIFIED else {"Content-Length": "0", "Cache-Control": "no-store"}
        self._headers({**rest, **(headers or {})})

    def _headers(self, headers: dict[str, str]) -> None:
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's signature
        logger.debug("http client=%s %s", self.client_address[0], format % args)


class RepositoryServer(ThreadingHTTPServer):
    """Serves a repository's public folders, one thread per connection.

    Args:
        root: the repository's folder.
        host: an address of this machine.
        port: 0 takes a free one.
        cert: PEM certificate chain; with ``key`` the server speaks TLS.
        key: PEM private key.
        client_ca: PEM certificates; with TLS, only their clients are served.
        crl: PEM revocation lists, one of each of those.

    Raises:
        RepositoryError: ``repository.not_found``.
        EnvironmentFault: ``port.in_use``, ``port.forbidden``, ``address.unknown``.
        UsageError: ``tls.files``.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        root: Path,
        host: str,
        port: int,
        *,
        cert: Path | None = None,
        key: Path | None = None,
        client_ca: Path | None = None,
        crl: Path | None = None,
    ) -> None:
        if not (root / "metadata").is_dir():
            raise RepositoryError(
                "repository.not_found", f"{root}: no repository here.", hint=f'Create one: "edgekit repo init {root}".'
            )
        context = _tls(cert, key, client_ca, crl)
        self.root = root
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._thread: threading.Thread | None = None
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise _bind_error(error, host, port) from error
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self._scheme = "https" if context else "http"

    @property
    def url(self) -> str:
        """Where it serves."""
        host, port = self.server_address[:2]
        name = host.decode() if isinstance(host, bytes | bytearray) else str(host)
        return f"{self._scheme}://[{name}]:{port}" if ":" in name else f"{self._scheme}://{name}:{port}"

    def server_bind(self) -> None:
        """Bind without the base class's reverse look-up of the host's name, which may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class's signature
        """A client that goes away is not an event."""
        logger.debug("http client=%s went away", client_address)

    def __enter__(self) -> Self:
        """Serve in a thread."""
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def _tls(cert: Path | None, key: Path | None, client_ca: Path | None, crl: Path | None) -> ssl.SSLContext | None:
    if cert is None and key is None:
        if client_ca is not None or crl is not None:
            text = "clients show their certificates to a server with TLS only."
            raise UsageError("tls.files", text, hint="Give --tls-cert and --tls-key, too.")
        return None
    if cert is None or key is None:
        raise UsageError("tls.files", "TLS needs a certificate and its key.", hint="Give both --tls-cert and --tls-key.")
    return ServerTls(cert=cert, key=key, client_ca=client_ca, crl=crl).context()


def _bind_error(error: OSError, host: str, port: int) -> EnvironmentFault:
    where = f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return EnvironmentFault(
            "port.in_use",
            f"port {port} on {host} is in use already.",
            hint="Give another one with --port, or stop what uses it.",
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return EnvironmentFault("port.forbidden", f"{where}: not allowed to listen there.", hint="Ports from 1024 on are free.")
    return EnvironmentFault("address.unknown", f"{where}: cannot listen there: {error.strerror or error}.")


def serve_repository(
    folder: Path,
    host: str = "127.0.0.1",
    port: int = 8600,
    *,
    cert: Path | None = None,
    key: Path | None = None,
    client_ca: Path | None = None,
    crl: Path | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until interrupted.

    Args:
        folder: of the repository.
        host: an address of this machine.
        port: 0 takes a free one.
        cert: PEM certificate chain, for TLS.
        key: its PEM private key.
        client_ca: PEM certificates; with TLS, only their clients are served.
        crl: PEM revocation lists, one of each of those.
        on_ready: told the address once connections are accepted.

    Raises:
        RepositoryError, EnvironmentFault, UsageError: as :class:`RepositoryServer`.
    """
    server = RepositoryServer(folder, host, port, cert=cert, key=key, client_ca=client_ca, crl=crl)
    if on_ready is not None:
        on_ready(server.url)
    try:
        server.serve_forever()
    finally:
        server.server_close()
