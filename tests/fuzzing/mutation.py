"""Damage with a plan: a valid input and a program of random bytes give an input that is nearly valid.

The program decides every choice and is read from its start; what it does not say is 0, which means "leave it". So a short
program is a small damage, hypothesis shrinks programs to it, and an engine that changes a byte of it changes one choice.

    >>> mutate_json(Sample.of_json(b'{"a": 1}'), Dice(b"")) == b'{"a": 1}'
    True
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Literal

import msgspec

MAX_INPUT_BYTES = 1 << 18
Kind = Literal["value", "member", "key", "number"]


class Dice:
    """Choices out of a program's bytes; 0 when it has ended."""

    def __init__(self, program: bytes) -> None:
        self._program, self._at = program, 0

    def below(self, limit: int) -> int:
        """One of 0..limit-1."""
        width = 1 if limit <= 256 else 2 if limit <= 65536 else 4
        return int.from_bytes(self.take(width), "little") % max(1, limit)

    def take(self, count: int) -> bytes:
        """The program's next bytes; fewer at its end."""
        piece = self._program[self._at : self._at + count]
        self._at += len(piece)
        return piece

    def one(self, choices):
        """One of these."""
        return choices[self.below(len(choices))]


@dataclass(frozen=True)
class Span:
    """A part of a sample that a mutation may replace."""

    begin: int
    end: int
    kind: Kind


@dataclass(frozen=True)
class Sample:
    """A valid input and its parts."""

    data: bytes
    spans: tuple[Span, ...]

    @classmethod
    def of_json(cls, text: bytes) -> Sample:
        """With a span for every value, key and member."""
        spans: list[Span] = []
        _scan(text, _blank(text, 0), spans)
        return cls(text, tuple(spans))

    @classmethod
    def of_fields(cls, data: bytes, fields: list[tuple[int, int]]) -> Sample:
        """With a span for each little-endian number: offset, width."""
        return cls(data, tuple(Span(at, at + width, "number") for at, width in fields))

    def of_kind(self, *kinds: Kind) -> tuple[Span, ...]:
        """The spans of these kinds."""
        return tuple(span for span in self.spans if span.kind in kinds)


_SCALAR = re.compile(rb'"(?:[^"\\]|\\.)*"|[^\s,\]}]+')
_BLANK = re.compile(rb"\s*")


def _blank(text: bytes, at: int) -> int:
    return _BLANK.match(text, at).end()


def _scan(text: bytes, at: int, spans: list[Span]) -> int:
    """Note the value at a place and all that is in it; returns its end."""
    begin = at
    if text[at : at + 1] in {b"{", b"["}:
        closing = b"}" if text[at : at + 1] == b"{" else b"]"
        at = _blank(text, at + 1)
        while text[at : at + 1] != closing:
            member = at
            if closing == b"}":
                end = _SCALAR.match(text, at).end()
                spans.append(Span(at, end, "key"))
                at = _blank(text, _blank(text, end) + 1)
            at = _blank(text, _scan(text, at, spans))
            is_last = text[at : at + 1] != b","
            at = at if is_last else _blank(text, at + 1)
            spans.append(Span(member, at, "member"))
        at += 1
    else:
        at = _SCALAR.match(text, at).end()
    spans.append(Span(begin, at, "value"))
    return at


SHA = b"sha256:" + b"0" * 64
NASTY = (
    b"null", b"true", b"false", b"0", b"1", b"-1", b"-0", b"0.0", b"-0.0", b"0.5", b"1e5", b"1e308", b"-1e308", b"1e400",
    b"5e-324", b"1e-400", b"NaN", b"Infinity", b"-Infinity", b"255", b"256", b"65536", b"4294967295", b"4294967296",
    b"9007199254740991", b"9007199254740992", b"9223372036854775807", b"9223372036854775808", b"-9223372036854775809",
    b"18446744073709551615", b"18446744073709551616", b"1" + b"0" * 40, b"-1" + b"0" * 300, b"1" + b"0" * 4300,
    b"1" + b"0" * 9000, b"01", b"+1", b"0x1", b"1.", b".1", b"1_000",
    b'""', b'" "', b'"a"', b'"\\u0000"', b'"\\ud800"', b'"\\udc00"', b'"\\ud800\\udc00"', b'"\\ud83d"', b'"\xed\xa0\x80"',
    b'"\xff"', b'"\xc0\x80"', b'"\xf4\x90\x80\x80"', '"\u202e\u0000"'.encode(), '"\ufeff"'.encode(), '"e\u0301"'.encode(),
    '"\u0661\u0662"'.encode(), b'"..."', b'"../../etc/passwd"', b'"/etc/passwd"', b'"a/../b"', b'"a\\\\b"', b'"%s%n{0}"',
    b'"' + b"A" * 300 + b'"', b'"' + b"A" * 70000 + b'"', b'"' + b"1" * 5000 + b'"', '"{}"'.format("\u00e9" * 2000).encode(),
    b'"' + SHA + b'"', b'"' + SHA + b'\\n"', b'"' + SHA.upper() + b'"', b'"sha256:"', b'"sha512:' + b"0" * 128 + b'"',
    b'"2026-11-01T12:00:00"', b'"2026-11-01T12:00:00Z"', b'"2026-11-01T12:00:00+14:00"', b'"0001-01-01T00:00:00+14:00"',
    b'"9999-12-31T23:59:59-14:00"', b'"0000-01-01T00:00:00Z"', b'"2026-02-30T00:00:00Z"', b'"2026-11-01T23:59:60Z"',
    b'"2026-11-01T24:00:00Z"', b'"1969-12-31T23:59:59.999999999Z"', b'"2026-11-01"', b'"99999-01-01T00:00:00Z"',
    b"[]", b"{}", b"[null]", b"[[]]", b'{"":{}}', b'{"a":1,"a":2}', b'[1,"2",{}]',
    b"//x", b"'a'", b",", b"", b"\x00", b"\xef\xbb\xbf1",
)  # fmt: skip
_DEPTHS = (1, 2, 50, 900, 1100, 5000, 50000)
_REPEATS = (2, 3, 17, 70, 300, 5000)


def mutate_json(sample: Sample, dice: Dice) -> bytes:
    """Change, delete, double, nest, rename or exchange parts of a JSON text; then write it canonically, or not."""
    text = sample.data
    for span, piece in sorted(_json_edits(sample, dice), key=lambda edit: -edit[0].begin):
        text = text[: span.begin] + piece + text[span.end :]
    match dice.below(8):
        case 5:
            text = _formatted(text, -1)
        case 6 | 7:
            pass
        case _:
            text = _formatted(text, 2)
    return mutate_bytes(text, dice)[:MAX_INPUT_BYTES]


def _json_edits(sample: Sample, dice: Dice) -> list[tuple[Span, bytes]]:
    """Up to three edits of parts that do not overlap."""
    edits: list[tuple[Span, bytes]] = []
    for _ in range(dice.below(4)):
        span = dice.one(sample.spans)
        if all(span.end <= other.begin or other.end <= span.begin for other, _ in edits):
            edits.append((span, _json_piece(sample, span, dice)))
    return edits


def _json_piece(sample: Sample, span: Span, dice: Dice) -> bytes:
    """What stands in a span's place."""
    old = sample.data[span.begin : span.end]
    match span.kind:
        case "member":
            return old * dice.one((0, 2, 3)) if dice.below(4) else old.rstrip(b", \n") + b"," + old
        case "key":
            return dice.one((dice.one(NASTY), _other(sample, dice, "key"), old[:-1] + dice.take(1) + b'"'))
        case _:
            return _json_value(sample, old, dice)


def _json_value(sample: Sample, old: bytes, dice: Dice) -> bytes:
    match dice.below(10):
        case 0 | 1 | 2 | 3:
            return dice.one(NASTY)
        case 4 | 5:
            return _other(sample, dice, "value")
        case 6:
            depth = dice.one(_DEPTHS)
            opening, closing = dice.one(((b"[", b"]"), (b'{"a":', b"}")))
            return (opening * depth + old + closing * depth)[:MAX_INPUT_BYTES]
        case 7:
            return (b"[" + b",".join([old] * dice.one(_REPEATS)) + b"]")[:MAX_INPUT_BYTES]
        case 8:
            return _spliced(old, dice)
        case _:
            return dice.take(6)


def _spliced(old: bytes, dice: Dice) -> bytes:
    """A few characters put into a text or a number, or taken out of it."""
    at = 1 + dice.below(max(1, len(old) - 1))
    piece = dice.one((b"", b"0", b"9", b"-", b".", b"\\u0000", b"\\n", b"/", b" ", "\u00e9".encode(), dice.take(2)))
    return old[:at] + piece + old[at + dice.below(2) :]


def _other(sample: Sample, dice: Dice, kind: Kind) -> bytes:
    span = dice.one(sample.of_kind(kind))
    return sample.data[span.begin : span.end]


def _formatted(text: bytes, indent: int) -> bytes:
    """As the project writes JSON, where it is any."""
    try:
        return msgspec.json.format(text, indent=indent) + (b"\n" if indent > 0 else b"")
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return text


_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, (1 << 64) - 1)


def mutate_numbers(sample: Sample, dice: Dice) -> bytes:
    """Change up to three of a binary sample's numbers, then perhaps its bytes."""
    data = bytearray(sample.data)
    for _ in range(dice.below(4)):
        span = dice.one(sample.of_kind("number"))
        width = span.end - span.begin
        old = int.from_bytes(data[span.begin : span.end], "little")
        new = dice.one((dice.one(_NUMBERS), old + 1, old - 1, old ^ (1 << dice.below(8 * width)), len(data)))
        data[span.begin : span.end] = (new % (1 << (8 * width))).to_bytes(width, "little")
    return mutate_bytes(bytes(data), dice)


def mutate_bytes(data: bytes, dice: Dice) -> bytes:
    """Mostly nothing; else cut, flip, delete, double, insert or overwrite."""
    if dice.below(8) != 7 or not data:
        return data
    at = dice.below(len(data))
    end = min(len(data), at + 1 + dice.below(64))
    match dice.below(7):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([data[at] ^ (1 << dice.below(8))]) + data[at + 1 :]
        case 2:
            return data[:at] + data[end:]
        case 3:
            return data[:end] + data[at:]
        case 4:
            return data[:at] + dice.take(4) + data[at:]
        case 5:
            return data[:at] + dice.take(4) + data[at + 4 :]
        case _:
            return data[at:] + data[:at]


HUGE = (
    -1,
    0,
    1,
    2,
    3,
    7,
    255,
    256,
    1 << 16,
    1 << 20,
    1 << 31,
    (1 << 31) - 1,
    1 << 32,
    1 << 40,
    (1 << 53),
    (1 << 63) - 1,
    (1 << 64) - 1,
)


def mutate_tree(tree: object, dice: Dice) -> object:
    """One part of nested lists, numbers and bytes, replaced."""
    if isinstance(tree, list) and tree and dice.below(8) < 7:
        at = dice.below(len(tree))
        match dice.below(12):
            case 10:
                return tree[:at] + tree[at + 1 :]
            case 11:
                return tree[: at + 1] + tree[at:]
            case _:
                return [*tree[:at], mutate_tree(tree[at], dice), *tree[at + 1 :]]
    if isinstance(tree, bool):
        return dice.one((not tree, dice.one(HUGE), None))
    if isinstance(tree, int):
        return dice.one((dice.one(HUGE), tree + 1, tree - 1, tree * 2, tree ^ (1 << dice.below(40)), True, 0.5))
    if isinstance(tree, bytes):
        return mutate_bytes(tree, Dice(b"\x07" + dice.take(8)))
    return dice.one((None, 0, b"", [], "", [[]], {}))


def zip_numbers(data: bytes) -> list[tuple[int, int]]:
    """Where a stored zip has its numbers: offset and width of each field of every header."""
    fields: list[tuple[int, int]] = []
    for magic, layout in (
        (b"PK\x03\x04", "<4sHHHHHIIIHH"),
        (b"PK\x01\x02", "<4sHHHHHHIIIHHHHHII"),
        (b"PK\x05\x06", "<4sHHHHIIH"),
    ):
        for match in re.finditer(re.escape(magic), data):
            at = match.start() + 4
            for letter in layout[3:]:
                width = struct.calcsize(f"<{letter}")
                fields.append((at, width))
                at += width
    return [(at, width) for at, width in fields if at + width <= len(data)]
