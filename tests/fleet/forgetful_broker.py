"""A broker that takes messages and hangs up without a word, until it is told to acknowledge: as one that crashes."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from edgekit.fleet.packets import PacketReader


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError
        data += part
    return data


def _frames(connection: socket.socket) -> Iterator[bytes]:
    """Whole packets, as they come."""
    while True:
        head = _receive(connection, 2)
        length, shift = head[1] & 0x7F, 7
        while head[-1] & 0x80:
            head += _receive(connection, 1)
            length |= (head[-1] & 0x7F) << shift
            shift += 7
        yield head + _receive(connection, length)


class ForgetfulBroker:
    """Speaks MQTT 5 and 3.1.1; ``taken`` are topic and payload of each message with QoS 1, ``confirmed`` those acknowledged."""

    def __init__(self, *, patience: int = 1) -> None:
        """Hang up after so many messages, while ``is_acknowledging`` is not set."""
        self.patience, self.is_acknowledging = patience, False
        self.taken: list[tuple[str, bytes]] = []
        self.confirmed: list[tuple[str, bytes]] = []
        self.connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        is_new, seen = True, 0
        with contextlib.suppress(OSError), connection:
            for frame in _frames(connection):
                kind = frame[0] >> 4
                if kind == 1:
                    is_new = frame[frame.index(b"MQTT") + 4] == 5
                    connection.sendall(b"\x20\x03\x00\x00\x00" if is_new else b"\x20\x02\x00\x00")
                elif kind == 3 and frame[0] & 0x06:
                    (message,) = PacketReader(version=5 if is_new else 4).feed(frame)
                    self.taken.append((message.topic, message.payload))
                    seen += 1
                    if self.is_acknowledging:
                        self.confirmed.append((message.topic, message.payload))
                        connection.sendall(b"\x40\x02" + message.packet_id.to_bytes(2, "big"))
                    elif seen >= self.patience:
                        return
                elif kind == 8:
                    connection.sendall(b"\x90\x04" + frame[2:4] + b"\x00\x01" if is_new else b"\x90\x03" + frame[2:4] + b"\x01")
                elif kind == 12:
                    connection.sendall(b"\xd0\x00")

    def stop(self) -> None:
        self._socket.close()
