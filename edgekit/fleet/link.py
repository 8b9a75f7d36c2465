"""A connection to a broker as bytes: a TCP socket, with TLS or without, that never blocks and can be woken.

All of it belongs to one thread, except :meth:`Link.wake`.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl

from edgekit.fleet.config import BrokerAddress

CONNECT_SECONDS = 10.0
RECEIVE_BYTES = 256 * 1024
_CLOSED = b""


class Link:
    """An open connection.

    Raises:
        OSError: what the network says, from the constructor and from every method but ``wake``.
    """

    def __init__(self, address: BrokerAddress) -> None:
        raw = socket.create_connection((address.host, address.port), timeout=CONNECT_SECONDS)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            context = address.tls_context()
            self._socket = context.wrap_socket(raw, server_hostname=address.host) if context else raw
        except BaseException:
            raw.close()
            raise
        self._socket.settimeout(0.0)
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.settimeout(0.0)
        self._wake_write.settimeout(0.0)
        self._out = bytearray()

    def send(self, data: bytes) -> None:
        """Send soon: what the socket does not take now waits for :meth:`wait`."""
        self._out += data
        self._flush()

    def _flush(self) -> None:
        while self._out:
            try:
                sent = self._socket.send(self._out)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            del self._out[:sent]

    def wait(self, seconds: float, *, is_reading: bool = True) -> bytes | None:
        """Wait for bytes, a wake-up or the end of the time, and send what waits.

        Args:
            seconds: the longest wait.
            is_reading: take bytes; without it they stay in the system's buffers, and the broker has to wait.

        Returns:
            The bytes; None when there are none.

        Raises:
            ConnectionError: the broker closed the connection.
        """
        has_more = is_reading and isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0
        ready = self._poll(0.0 if has_more else seconds, is_reading=is_reading)
        if ready & select.POLLOUT:
            self._flush()
        if not has_more and not ready & ~select.POLLOUT:
            return None
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        if data == _CLOSED:
            raise ConnectionError("the broker closed the connection")
        return data

    def _poll(self, seconds: float, *, is_reading: bool) -> int:
        """What the socket is ready for."""
        poll, place = select.poll(), self._socket.fileno()
        poll.register(self._wake_read, select.POLLIN)
        poll.register(place, select.POLLIN * is_reading | select.POLLOUT * bool(self._out))
        ready = dict(poll.poll(max(0.0, seconds) * 1000))
        if self._wake_read.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._wake_read.recv(4096)
        return ready.get(place, 0)

    def wake(self) -> None:
        """End a :meth:`wait` now; from any thread."""
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")

    def close(self) -> None:
        """Send what the system still takes, and close."""
        with contextlib.suppress(OSError):
            self._flush()
        for each in (self._socket, self._wake_read, self._wake_write):
            with contextlib.suppress(OSError):
                each.close()
