"""A small HTTP/1.1 server for one process: an asyncio protocol over the httptools parser, and nothing else.

Kept: answers in the order of the requests (pipelining), one write per answer, bounded head and body, a time limit on slow
senders, ``Expect: 100-continue``. While draining, each last answer of a connection says ``Connection: close``, and an idle
connection is closed only when it has been silent for the whole grace period, so that no client loses a request that it
was about to send. Never here: TLS, compression, chunked answers.

The accept loop is our own, because ``asyncio.Server.close`` can drop a connection that was accepted in the same turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from http import HTTPStatus

import httptools
import msgspec

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 << 10
MAX_PIPELINED = 16
MAX_CONNECTIONS = 512
"""Of one server; each one more is told so and closed."""
IDLE_SECONDS = 75.0
SWEEP_SECONDS = 0.5
ACCEPTS_PER_TURN = 64
ACCEPT_RETRY_S = 1.0
_REASONS = {status.value: status.phrase for status in HTTPStatus}


@dataclass(slots=True)
class Request:
    """One request. ``received`` is the monotonic time of its first byte's arrival in this process."""

    method: str
    path: str
    headers: dict[bytes, bytes]
    body: bytes
    received: float
    is_keep_alive: bool


@dataclass(slots=True)
class Answer:
    """One answer; ``after`` runs when it has been written, so that bookkeeping costs the client nothing."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str = "application/json"
    after: Callable[[], None] | None = None


Handler = Callable[[Request], Answer | Awaitable[Answer]]


def error_answer(status: int, message: str, *, code: str, headers: Iterable[tuple[str, str]] = ()) -> Answer:
    """An error in the Open Inference Protocol's form, with our stable code beside it."""
    body = msgspec.json.encode({"error": message, "code": code})
    return Answer(status=status, body=body, headers=tuple(headers))


def format_answer(answer: Answer, *, is_closing: bool, is_head: bool = False) -> bytes:
    """The bytes of an answer; the answer to HEAD has no body, whatever its length says."""
    head = [f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, 'Unknown')}"]
    head.append(f"content-type: {answer.content_type}\r\ncontent-length: {len(answer.body)}")
    head += [f"{name}: {value}" for name, value in answer.headers]
    if is_closing:
        head.append("connection: close")
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + (b"" if is_head else answer.body)


@dataclass
class Limits:
    """Bounds of one server."""

    max_body_bytes: int = 16 << 20
    request_seconds: float = 30.0
    drain_seconds: float = 5.0
    max_connections: int = MAX_CONNECTIONS


class _Refusal(Exception):  # noqa: N818 - control flow inside the parser's callbacks
    """The request being parsed is refused."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


class _Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._queue: deque[Request | Answer] = deque()
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False
        self._is_paused = False
        self._is_write_paused = False
        self.touched = time.monotonic()
        self._reset()

    def _reset(self) -> None:
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._started = 0.0

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._server.remember(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._is_closing = True
        self._server.forget(self)

    def pause_writing(self) -> None:
        self._is_write_paused = True
        self._pause()

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._pump()

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            return
        self.touched = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._ignore_upgrade()
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if not isinstance(cause, _Refusal):
                raise
            self._refuse(cause.answer)
        except httptools.HttpParserError as error:
            self._refuse(error_answer(400, f"not an HTTP request: {error}", code="http.malformed"))
        self._pump()

    # --- the parser's side

    def on_message_begin(self) -> None:
        self._reset()
        self._started = self.touched

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value
        self._count_head(len(name) + len(value))

    def _count_head(self, count: int) -> None:
        self._head_bytes += count
        if self._head_bytes > MAX_HEAD_BYTES:
            raise _Refusal(
                error_answer(431, f"the request's head is larger than {MAX_HEAD_BYTES} B", code="http.head_too_large")
            )

    def on_headers_complete(self) -> None:
        length = self._headers.get(b"content-length", b"0")
        if length.isdigit():
            self._check_body(int(length))
        if self._headers.get(b"expect", b"").lower() == b"100-continue" and self._transport:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._check_body(self._body_bytes)
        self._body.append(body)

    def _check_body(self, count: int) -> None:
        limit = self._server.limits.max_body_bytes
        if count > limit:
            raise _Refusal(error_answer(413, f"the request's body is larger than {limit} B", code="http.body_too_large"))

    def on_message_complete(self) -> None:
        request = Request(
            method=self._parser.get_method().decode("ascii"),
            path=self._url.decode("latin-1").split("?", 1)[0],
            headers=self._headers,
            body=self._body[0] if len(self._body) == 1 else b"".join(self._body),
            received=self._started,
            is_keep_alive=self._parser.should_keep_alive(),
        )
        self._started = 0.0
        self._queue.append(request)
        if len(self._queue) >= MAX_PIPELINED:
            self._pause()

    # --- answering

    def _pause(self) -> None:
        if self._transport and not self._is_paused and not self._transport.is_closing():
            self._is_paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._transport and self._is_paused and not self._transport.is_closing():
            self._is_paused = False
            self._transport.resume_reading()

    def _refuse(self, answer: Answer) -> None:
        """Answer in turn, then close: what follows on this connection cannot be parsed."""
        self._started = 0.0
        self._queue.append(answer)

    def _ignore_upgrade(self) -> None:
        """Answer in HTTP/1.1, as a server may, and close: the parser cannot go on after the offer of another protocol."""
        last = self._queue.pop() if self._queue else None
        if isinstance(last, Request) and last.headers.get(b"content-length", b"0") == b"0":
            last.is_keep_alive = False
            self._queue.append(last)
        else:
            self._refuse(error_answer(400, "protocol upgrades are not supported", code="http.upgrade"))

    def _pump(self) -> None:
        """Answer everything that can be answered now, in order."""
        while self._queue and self._task is None and not (self._is_closing or self._is_write_paused):
            item = self._queue.popleft()
            if isinstance(item, Answer):
                self._send(item, is_keep_alive=False)
                return
            result = self._server.handle(item)
            if isinstance(result, Answer):
                self._send(result, is_keep_alive=item.is_keep_alive, is_head=item.method == "HEAD")
            else:
                self._task = asyncio.ensure_future(self._finish(result, item))
        if len(self._queue) < MAX_PIPELINED // 2 and not self._is_write_paused:
            self._resume()

    async def _finish(self, pending: Awaitable[Answer], request: Request) -> None:
        try:
            answer = await pending
        except Exception:
            logger.exception("event=request_failed path=%s", request.path)
            answer = error_answer(500, "internal error; the agent's log has the trace", code="agent.bug")
        self._task = None
        self._send(answer, is_keep_alive=request.is_keep_alive, is_head=request.method == "HEAD")
        self._pump()

    def _send(self, answer: Answer, *, is_keep_alive: bool, is_head: bool = False) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            self._is_closing = True
        else:
            is_last = not is_keep_alive or (self._server.is_draining and not self._queue and not self._started)
            transport.write(format_answer(answer, is_closing=is_last, is_head=is_head))
            self.touched = time.monotonic()
            if is_last:
                self._is_closing = True
                transport.close()
        if answer.after:
            answer.after()

    @property
    def is_idle(self) -> bool:
        """Whether no request is being read or answered."""
        return not self._queue and self._task is None and not self._started

    def sweep(self, now: float) -> None:
        """Close when it is silent for too long."""
        limits = self._server.limits
        if self._transport is None or self._task is not None:
            return
        if (self._is_closing or self._is_write_paused) and now - self.touched > limits.request_seconds:
            self._transport.abort()  # the client does not read what it asked for
            return
        if self._started:
            if now - self._started > limits.request_seconds:
                self._refuse(
                    error_answer(408, f"the request did not arrive within {limits.request_seconds:g} s", code="http.slow")
                )
                self._pump()
            return
        if self.is_idle and now - self.touched > (limits.drain_seconds if self._server.is_draining else IDLE_SECONDS):
            self._is_closing = True
            self._transport.close()


@dataclass
class Server:
    """Accepts on a socket that somebody else bound, and answers through a handler."""

    handler: Handler
    limits: Limits = field(default_factory=Limits)
    connections: set[_Connection] = field(default_factory=set)
    is_draining: bool = False
    refused_connections: int = 0
    _listeners: list[socket.socket] = field(default_factory=list)
    _drained: asyncio.Event = field(default_factory=asyncio.Event)
    _has_some: asyncio.Event = field(default_factory=asyncio.Event)
    _sweeper: asyncio.Task[None] | None = None
    _accepting: set[asyncio.Task[object]] = field(default_factory=set)

    def handle(self, request: Request) -> Answer | Awaitable[Answer]:
        """The handler's answer; a bug in it is a 500."""
        try:
            return self.handler(request)
        except Exception:
            logger.exception("event=request_failed path=%s", request.path)
            return error_answer(500, "internal error; the agent's log has the trace", code="agent.bug")

    def start(self, listener: socket.socket) -> None:
        """Begin to accept; may be called for several listeners."""
        listener.setblocking(False)  # noqa: FBT003 - the socket's own signature
        self._listeners.append(listener)
        loop = asyncio.get_running_loop()
        loop.add_reader(listener.fileno(), self._accept, listener)
        self._sweeper = self._sweeper or loop.create_task(self._sweep())

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPTS_PER_TURN):
            if listener not in self._listeners:
                return
            try:
                client, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.error("event=accept_failed error=%s", error)  # noqa: TRY400 - out of descriptors: the trace says nothing
                loop.remove_reader(listener.fileno())  # else it would fail again at once, for ever
                loop.call_later(ACCEPT_RETRY_S, self._accept_again, listener)
                return
            client.setblocking(False)  # noqa: FBT003 - the same
            if len(self.connections) + len(self._accepting) >= self.limits.max_connections:
                self._turn_away(client)
                continue
            with contextlib.suppress(OSError):
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = loop.create_task(loop.connect_accepted_socket(lambda: _Connection(self), client))
            self._accepting.add(task)
            task.add_done_callback(self._accepted)

    def _turn_away(self, client: socket.socket) -> None:
        """Say that there are too many connections, as far as the socket's buffer takes it, and close."""
        self.refused_connections += 1
        message = f"{self.limits.max_connections} connections are open already"
        answer = error_answer(503, message, code="http.too_many_connections", headers=(("retry-after", "1"),))
        with contextlib.suppress(OSError):
            client.send(format_answer(answer, is_closing=True))
        client.close()

    def _accept_again(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)

    def _accepted(self, task: asyncio.Task[object]) -> None:
        self._accepting.discard(task)
        if not task.cancelled() and task.exception():
            logger.warning("event=connection_failed error=%s", task.exception())
        self._note_drained()

    async def _sweep(self) -> None:
        while True:
            if not self.connections:
                self._has_some.clear()
                await self._has_some.wait()  # an idle server costs nothing
            await asyncio.sleep(SWEEP_SECONDS)
            now = time.monotonic()
            for connection in tuple(self.connections):
                connection.sweep(now)

    def remember(self, connection: _Connection) -> None:
        """A connection began."""
        self.connections.add(connection)
        self._has_some.set()

    def forget(self, connection: _Connection) -> None:
        """A connection ended."""
        self.connections.discard(connection)
        self._note_drained()

    def _note_drained(self) -> None:
        if self.is_draining and not self.connections and not self._accepting:
            self._drained.set()

    def stop_accepting(self) -> None:
        """Take no more connections; those in the backlog stay for whoever else accepts on the socket."""
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener.fileno())
            listener.close()
        self._listeners.clear()

    async def drain(self, *, limit_seconds: float) -> bool:
        """Answer what is there and end every connection.

        Returns:
            Whether all ended by themselves within the limit; those that did not are cut.
        """
        self.is_draining = True
        self.stop_accepting()
        self._note_drained()
        try:
            await asyncio.wait_for(self._drained.wait(), limit_seconds)
        except TimeoutError:
            return False
        finally:
            if self._sweeper:
                self._sweeper.cancel()
        return True
