"""MQTT 5 and 3.1.1 control packets to bytes and back, without any I/O: what the ingest and the simulator speak.

It has what an edgekit client needs: QoS 0 and 1 in both directions, wills, subscriptions, the properties that count here.
QoS 2 is read as an error, since nothing of ours publishes with it. Bytes that break the standard raise ``PacketError`` and
nothing else, whatever they are; how long a packet may become the caller says, so that a peer cannot fill the memory.

>>> reader = PacketReader()
>>> reader.feed(encode_publish("ek/1/lab/pi-1/w", b"hello", qos=1, packet_id=7))
[Publish(topic='ek/1/lab/pi-1/w', payload=b'hello', packet_id=7, qos=1, is_retained=False, is_duplicate=False)]
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, NamedTuple

from edgekit.errors import ArtifactError, UsageError

Version = Literal[4, 5]
"""The protocol level: 4 is MQTT 3.1.1, 5 is MQTT 5."""
MAX_PACKET_BYTES = 1 << 20
MAX_REMAINING = 268_435_455
_MAX_STRING = 65_535
_HIGH_BIT = 0x80
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")


class PacketError(ArtifactError):
    """Bytes that are no MQTT: ``mqtt.malformed``, or ``mqtt.too_large``."""

    def __init__(self, message: str, code: str = "mqtt.malformed") -> None:
        super().__init__(code, message)


class Kind(IntEnum):
    """The control packets' types."""

    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    SUBSCRIBE = 8
    SUBACK = 9
    UNSUBSCRIBE = 10
    UNSUBACK = 11
    PINGREQ = 12
    PINGRESP = 13
    DISCONNECT = 14


class Publish(NamedTuple):
    """A message. ``packet_id`` is 0 with QoS 0. A tuple, since thousands a second are made."""

    topic: str
    payload: bytes
    packet_id: int = 0
    qos: int = 0
    is_retained: bool = False
    is_duplicate: bool = False


@dataclass(frozen=True, kw_only=True)
class ConnAck:
    """The answer to a connect; ``reason`` 0 is success."""

    reason: int
    is_session_present: bool = False
    receive_maximum: int = 65_535
    maximum_packet_bytes: int = 0
    """0: the broker sets none."""
    keep_alive_s: int | None = None
    """What the broker wants instead of what was asked for."""
    assigned_client_id: str = ""
    reason_text: str = ""


@dataclass(frozen=True, kw_only=True)
class PubAck:
    """A message of ours has arrived; a ``reason`` from 128 on is a refusal."""

    packet_id: int
    reason: int = 0


@dataclass(frozen=True, kw_only=True)
class SubAck:
    """The answer to a subscribe or unsubscribe, one reason a filter."""

    packet_id: int
    reasons: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PingResponse:
    """The broker is there."""


@dataclass(frozen=True, kw_only=True)
class Disconnect:
    """The broker ends the connection."""

    reason: int = 0
    reason_text: str = ""


Packet = Publish | ConnAck | PubAck | SubAck | PingResponse | Disconnect

REASONS = {
    0x80: "unspecified error",
    0x81: "malformed packet",
    0x82: "protocol error",
    0x83: "implementation specific error",
    0x84: "unsupported protocol version",
    0x85: "client identifier not valid",
    0x86: "bad user name or password",
    0x87: "not authorized",
    0x88: "server unavailable",
    0x89: "server busy",
    0x8A: "banned",
    0x8B: "server shutting down",
    0x8D: "keep alive timeout",
    0x8E: "session taken over",
    0x8F: "topic filter invalid",
    0x90: "topic name invalid",
    0x93: "receive maximum exceeded",
    0x94: "topic alias invalid",
    0x95: "packet too large",
    0x97: "quota exceeded",
    0x98: "administrative action",
    0x9A: "retain not supported",
    0x9B: "QoS not supported",
    0x9C: "use another server",
    0x9D: "server moved",
    0x9E: "shared subscriptions not supported",
    0x9F: "connection rate exceeded",
}
_OLD_REASONS = {1: 0x84, 2: 0x85, 3: 0x88, 4: 0x86, 5: 0x87}
"""3.1.1's return codes of CONNACK as reasons of MQTT 5."""


def describe_reason(reason: int) -> str:
    """A reason code for people.

    >>> describe_reason(0x87)
    '0x87 not authorized'
    """
    return f"0x{reason:02x} {REASONS.get(reason, 'unknown reason')}"


# writing


@dataclass(frozen=True, kw_only=True)
class Will:
    """What the broker publishes when the connection is lost."""

    topic: str
    payload: bytes
    qos: int = 1
    is_retained: bool = False
    delay_s: int = 0
    """MQTT 5 only."""


@dataclass(frozen=True, kw_only=True)
class ConnectOptions:
    """A connect. ``session_s`` is how long the session outlives the connection (MQTT 5); 3.1.1 keeps any that is not clean."""

    client_id: str
    version: Version = 5
    is_clean_start: bool = True
    keep_alive_s: int = 60
    session_s: int = 0
    receive_maximum: int = 0
    """Unacknowledged QoS 1 messages that the broker may send; 0 leaves the standard's 65,535."""
    maximum_packet_bytes: int = 0
    username: str = ""
    password: str = ""
    will: Will | None = None


@dataclass(frozen=True, kw_only=True)
class Filter:
    """One subscription. ``retain_handling``: 0 sends retained messages, 1 only for a new subscription, 2 never."""

    pattern: str
    qos: int = 1
    retain_handling: Literal[0, 1, 2] = 0


def _length(number: int) -> bytes:
    """A variable byte integer.

    >>> _length(321).hex()
    'c102'
    """
    if number < _HIGH_BIT:
        return bytes((number,))
    if number > MAX_REMAINING:
        raise UsageError("mqtt.too_large", f"a packet of {number} bytes: MQTT allows {MAX_REMAINING}.")
    out = bytearray()
    while number:
        number, low = number >> 7, number & 0x7F
        out.append(low | (_HIGH_BIT if number else 0))
    return bytes(out)


def _binary(data: bytes) -> bytes:
    if len(data) > _MAX_STRING:
        raise UsageError("mqtt.too_large", f"a text of {len(data)} bytes: MQTT allows {_MAX_STRING}.")
    return _U16.pack(len(data)) + data


def _text(text: str) -> bytes:
    return _binary(text.encode())


def _frame(kind: Kind, flags: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return bytes((kind << 4 | flags,)) + _length(len(body)) + body


def _properties(*parts: bytes) -> bytes:
    body = b"".join(parts)
    return _length(len(body)) + body


def encode_connect(options: ConnectOptions) -> bytes:
    """CONNECT."""
    is_new, will = options.version == 5, options.will
    flags = options.is_clean_start << 1 | bool(options.username) << 7 | bool(options.password) << 6
    if will is not None:
        flags |= 0x04 | will.qos << 3 | will.is_retained << 5
    parts = [_text("MQTT"), bytes((options.version, flags)), _U16.pack(options.keep_alive_s)]
    if is_new:
        wanted = [
            (0x11, options.session_s, _U32),
            (0x21, options.receive_maximum, _U16),
            (0x27, options.maximum_packet_bytes, _U32),
        ]
        parts.append(_properties(*(bytes((name,)) + form.pack(value) for name, value, form in wanted if value)))
    parts.append(_text(options.client_id))
    if will is not None:
        if is_new:
            parts.append(_properties(b"\x18" + _U32.pack(will.delay_s) if will.delay_s else b""))
        parts += [_text(will.topic), _binary(will.payload)]
    parts += [_text(text) for text in (options.username, options.password) if text]
    return _frame(Kind.CONNECT, 0, *parts)


def encode_publish(
    topic: str,
    payload: bytes,
    *,
    qos: int = 0,
    packet_id: int = 0,
    is_retained: bool = False,
    is_duplicate: bool = False,
    version: Version = 5,
    expiry_s: int = 0,
) -> bytes:
    """PUBLISH, QoS 0 or 1.

    Args:
        topic: without wildcards.
        payload: the message.
        qos: 0 or 1.
        packet_id: 1 to 65,535 with QoS 1.
        is_retained: the broker keeps it for later subscribers.
        is_duplicate: it was sent before, and not acknowledged.
        version: of the protocol.
        expiry_s: the broker forgets it after so long (MQTT 5); 0: never.

    Raises:
        UsageError: ``mqtt.too_large``.
    """
    name = topic.encode()
    head = _U16.pack(len(name)) + name if len(name) <= _MAX_STRING else _binary(name)
    if qos:
        head += _U16.pack(packet_id)
    if version == 5:
        head += b"\x05\x02" + _U32.pack(expiry_s) if expiry_s else b"\x00"
    first = 0x30 | qos << 1 | is_retained | is_duplicate << 3
    return bytes((first,)) + _length(len(head) + len(payload)) + head + payload


def encode_puback(packet_id: int) -> bytes:
    """PUBACK with success, which is the same in both versions."""
    return b"\x40\x02" + _U16.pack(packet_id)


def encode_subscribe(packet_id: int, filters: Sequence[Filter], *, version: Version = 5) -> bytes:
    """SUBSCRIBE."""
    parts = [_U16.pack(packet_id), b"\x00" if version == 5 else b""]
    for item in filters:
        options = item.qos | item.retain_handling << 4 if version == 5 else item.qos
        parts += [_text(item.pattern), bytes((options,))]
    return _frame(Kind.SUBSCRIBE, 2, *parts)


def encode_unsubscribe(packet_id: int, patterns: Sequence[str], *, version: Version = 5) -> bytes:
    """UNSUBSCRIBE."""
    parts = [_U16.pack(packet_id), b"\x00" if version == 5 else b"", *map(_text, patterns)]
    return _frame(Kind.UNSUBSCRIBE, 2, *parts)


def encode_pingreq() -> bytes:
    """PINGREQ."""
    return b"\xc0\x00"


def encode_disconnect(*, reason: int = 0, session_s: int | None = None, version: Version = 5) -> bytes:
    """DISCONNECT.

    Args:
        reason: 0 for a normal end, 4 to have the will published.
        session_s: how long the broker keeps the session from now on (MQTT 5); None leaves what the connect said.
        version: of the protocol.
    """
    if version == 5 and (reason or session_s is not None):
        expiry = b"" if session_s is None else b"\x11" + _U32.pack(session_s)
        return _frame(Kind.DISCONNECT, 0, bytes((reason,)), _properties(expiry))
    return b"\xe0\x00"


# reading

_FIXED = {1: 1, 2: 4, 17: 4, 19: 2, 23: 1, 24: 4, 25: 1, 33: 2, 34: 2, 35: 2, 36: 1, 37: 1, 39: 4, 40: 1, 41: 1, 42: 1}
"""Bytes of each property of one size."""
_STRINGS = frozenset((3, 8, 9, 18, 21, 22, 26, 28, 31))
_PAIR = 38
_VARIABLE = 11
_RECEIVE_MAXIMUM, _MAXIMUM_PACKET, _KEEP_ALIVE, _CLIENT_ID, _REASON_TEXT = 33, 39, 19, 18, 31


@dataclass
class _Cursor:
    """A place in the bytes of one packet; everything that is read past its end is an error."""

    data: bytes
    at: int = 0

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise PacketError(f"a packet ends after {len(self.data)} bytes: expected {end - len(self.data)} more.")
        found, self.at = self.data[self.at : end], end
        return found

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def number(self) -> int:
        """A variable byte integer."""
        value = 0
        for shift in (0, 7, 14, 21):
            byte = self.u8()
            value |= (byte & 0x7F) << shift
            if not byte & _HIGH_BIT:
                return value
        raise PacketError("a length of more than four bytes.")

    def text(self) -> str:
        data = self.take(self.u16())
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise PacketError(f"a text of {len(data)} bytes is not UTF-8.") from error

    @property
    def is_done(self) -> bool:
        return self.at >= len(self.data)

    def properties(self) -> dict[int, int | str]:
        """The properties, by identifier; user properties and the like are passed over."""
        size = self.number()
        part = _Cursor(self.take(size))
        found: dict[int, int | str] = {}
        while not part.is_done:
            name = part.number()
            if name in _FIXED:
                found[name] = int.from_bytes(part.take(_FIXED[name]), "big")
            elif name in _STRINGS:
                found[name] = part.text() if name not in {9, 22} else str(len(part.take(part.u16())))
            elif name == _VARIABLE:
                found[name] = part.number()
            elif name == _PAIR:
                part.text()
                part.text()
            else:
                raise PacketError(f"property {name}: MQTT 5 has none of that number.")
        return found


@dataclass
class PacketReader:
    """Bytes as they come from a socket, to packets; what is not whole yet waits for more.

    Args:
        version: of the protocol.
        max_bytes: a longer packet is refused as soon as its length is known.
    """

    version: Version = 5
    max_bytes: int = MAX_PACKET_BYTES
    _parts: list[bytes] = field(default_factory=list)
    _held: int = 0
    _needed: int = 0
    """Bytes that the packet at hand has in all, as far as that is known."""

    def feed(self, data: bytes) -> list[Packet]:
        """The packets that are whole with these bytes.

        Raises:
            PacketError: ``mqtt.malformed``, ``mqtt.too_large``; the connection is of no more use.
        """
        if self._held + len(data) < self._needed:
            self._parts.append(data)
            self._held += len(data)
            return []
        if self._parts:
            data = b"".join((*self._parts, data))
            self._parts.clear()
        packets: list[Packet] = []
        at = self._read_all(data, packets)
        rest = data[at:]
        if rest:
            self._parts.append(rest)
        self._held = len(rest)
        return packets

    def _read_all(self, data: bytes, packets: list[Packet]) -> int:
        """Read every whole packet; where the first that is not begins."""
        at, size, read_one, is_new = 0, len(data), self._read_one, self.version == 5
        self._needed = 0
        while size - at >= 2:
            first, length = data[at], data[at + 1]
            begin = at + 2
            if length & _HIGH_BIT:
                length, begin = self._read_length(data, at + 1)
                if begin < 0:
                    return at
            end = begin + length
            if length > self.max_bytes:
                raise PacketError(f"a packet of {length} bytes: at most {self.max_bytes} are read.", "mqtt.too_large")
            if end > size:
                self._needed = end - at
                return at
            if first >> 4 == 3:
                packets.append(_read_publish(first, data, begin, end, is_new=is_new))
            else:
                packets.append(read_one(first, data[begin:end]))
            at = end
        return at

    @staticmethod
    def _read_length(data: bytes, at: int) -> tuple[int, int]:
        """A remaining length and where the packet's body begins; -1 while its bytes are not all here."""
        value = 0
        for place in range(4):
            if at + place >= len(data):
                return 0, -1
            byte = data[at + place]
            value |= (byte & 0x7F) << 7 * place
            if not byte & _HIGH_BIT:
                return value, at + place + 1
        raise PacketError("a length of more than four bytes.")

    def _read_one(self, first: int, body: bytes) -> Packet:
        kind, flags = first >> 4, first & 0x0F
        if flags:
            raise PacketError(f"packet type {kind} has the flags {flags}: expected 0.")
        cursor = _Cursor(body)
        match kind:
            case Kind.CONNACK:
                return self._read_connack(cursor)
            case Kind.PUBACK:
                return PubAck(packet_id=cursor.u16(), reason=0 if cursor.is_done else cursor.u8())
            case Kind.SUBACK | Kind.UNSUBACK:
                packet_id = cursor.u16()
                if self.version == 5:
                    cursor.properties()
                return SubAck(packet_id=packet_id, reasons=tuple(body[cursor.at :]))
            case Kind.PINGRESP:
                return PingResponse()
            case Kind.DISCONNECT:
                reason = 0 if cursor.is_done else cursor.u8()
                found = {} if cursor.is_done else cursor.properties()
                return Disconnect(reason=reason, reason_text=str(found.get(_REASON_TEXT, "")))
            case _:
                raise PacketError(f"packet type {kind}: no broker sends that.")

    def _read_connack(self, cursor: _Cursor) -> ConnAck:
        flags, reason = cursor.u8(), cursor.u8()
        if self.version != 5:
            return ConnAck(reason=_OLD_REASONS.get(reason, 0x80) if reason else 0, is_session_present=bool(flags & 1))
        found = {} if cursor.is_done else cursor.properties()
        keep_alive = found.get(_KEEP_ALIVE)
        return ConnAck(
            reason=reason,
            is_session_present=bool(flags & 1),
            receive_maximum=int(found.get(_RECEIVE_MAXIMUM, 65_535)),
            maximum_packet_bytes=int(found.get(_MAXIMUM_PACKET, 0)),
            keep_alive_s=None if keep_alive is None else int(keep_alive),
            assigned_client_id=str(found.get(_CLIENT_ID, "")),
            reason_text=str(found.get(_REASON_TEXT, "")),
        )


def _read_publish(first: int, data: bytes, at: int, end: int, *, is_new: bool) -> Publish:
    """A PUBLISH whose body is ``data[at:end]``."""
    qos = first >> 1 & 3
    if qos > 1:
        raise PacketError(f"a message with QoS {qos}: 0 and 1 are read.")
    begin = at + 2
    if begin > end:
        raise PacketError("a message without a topic.")
    at = begin + (data[at] << 8 | data[at + 1])
    body = at + 2 * qos + is_new
    if body > end:
        raise PacketError("a message that ends in its topic.")
    packet_id = data[at] << 8 | data[at + 1] if qos else 0
    if qos and not packet_id:
        raise PacketError("a message of QoS 1 without a packet identifier.")
    if is_new and data[body - 1]:
        cursor = _Cursor(data[body - 1 : end])
        cursor.properties()
        body += cursor.at - 1
    try:
        topic = data[begin:at].decode()
    except UnicodeDecodeError as error:
        raise PacketError("a topic that is not UTF-8.") from error
    return Publish(topic, data[body:end], packet_id, qos, bool(first & 1), bool(first & 8))
