"""DER, as much of it as keys, certificate requests and certificates need: a writer, and a reader that goes down one path.

>>> sequence(integer(5), utf8("x")).hex()
'30060201050c0178'
>>> [element.tag for element in read_all(sequence(integer(5), utf8("x")))[0].children()]
[2, 12]
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from edgekit.errors import ArtifactError

INTEGER, BIT_STRING, OCTET_STRING, OID, UTF8, SEQUENCE, SET = 0x02, 0x03, 0x04, 0x06, 0x0C, 0x30, 0x31
UTC_TIME, GENERALIZED_TIME = 0x17, 0x18
_MAX_DEPTH_BYTES = 1 << 20
_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----\s+([A-Za-z0-9+/=\s]+)-----END \1-----")


def element(tag: int, content: bytes) -> bytes:
    """One element: tag, length, content."""
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + content


def integer(value: int) -> bytes:
    """A number that is not negative."""
    return element(INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def bits(content: bytes) -> bytes:
    """Whole bytes as a bit string."""
    return element(BIT_STRING, b"\0" + content)


def octets(content: bytes) -> bytes:
    """An octet string."""
    return element(OCTET_STRING, content)


def oid(dotted: str) -> bytes:
    """An object identifier.

    >>> oid("1.2.840.10045.2.1").hex()
    '06072a8648ce3d0201'
    """
    first, second, *rest = (int(part) for part in dotted.split("."))
    content = bytearray()
    for number in (40 * first + second, *rest):
        groups = [number & 0x7F]
        while number := number >> 7:
            groups.append(0x80 | (number & 0x7F))
        content += bytes(reversed(groups))
    return element(OID, bytes(content))


def utf8(text: str) -> bytes:
    """A string."""
    return element(UTF8, text.encode())


def sequence(*parts: bytes) -> bytes:
    """Elements in order."""
    return element(SEQUENCE, b"".join(parts))


def set_of(*parts: bytes) -> bytes:
    """Elements of a set, in DER's order."""
    return element(SET, b"".join(sorted(parts)))


@dataclass(frozen=True)
class Element:
    """One element as it was read; ``raw`` is all of its bytes."""

    tag: int
    content: bytes
    raw: bytes

    def children(self) -> tuple[Element, ...]:
        """What is in it."""
        return read_all(self.content)

    def time(self) -> datetime:
        """The time that it holds."""
        try:
            text = self.content.decode("ascii")
            if self.tag == UTC_TIME:  # RFC 5280, 4.1.2.5.1: up to 49 it is this century
                text = f"{'20' if int(text[:2]) < 50 else '19'}{text}"
            return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
        except ValueError as error:
            raise ArtifactError("certificate.malformed", f"DER: {self.content[:32]!r} is no time.") from error


def read_all(data: bytes) -> tuple[Element, ...]:
    """The elements that stand one after the other.

    Raises:
        ArtifactError: ``certificate.malformed``.
    """
    found, at = [], 0
    while at < len(data):
        begin, size = at, 0
        if at + 2 > len(data):
            raise _cut()
        tag, first = data[at], data[at + 1]
        at += 2
        if first < 0x80:
            size = first
        else:
            count = first & 0x7F
            size = int.from_bytes(data[at : at + count], "big")
            at += count
        if first == 0x80 or size > _MAX_DEPTH_BYTES or at + size > len(data):
            raise _cut()
        at += size
        found.append(Element(tag, data[at - size : at], data[begin:at]))
    return tuple(found)


def _cut() -> ArtifactError:
    return ArtifactError("certificate.malformed", "DER: an element is longer than what there is.")


def to_pem(der: bytes, label: str) -> str:
    """PEM, lines of 64."""
    text = base64.b64encode(der).decode()
    lines = "\n".join(text[at : at + 64] for at in range(0, len(text), 64))
    return f"-----BEGIN {label}-----\n{lines}\n-----END {label}-----\n"


def from_pem(text: str | bytes, label: str) -> tuple[bytes, ...]:
    """The DER of every block of that label, in order; none is an empty tuple.

    Raises:
        ArtifactError: ``certificate.malformed`` for what is no base64.
    """
    data = text.encode() if isinstance(text, str) else text
    try:
        return tuple(
            base64.b64decode(b"".join(found[2].split()), validate=True)
            for found in _BLOCK.finditer(data)
            if found[1] == label.encode()
        )
    except (binascii.Error, ValueError) as error:
        raise ArtifactError("certificate.malformed", f"a {label} block is not base64.") from error
