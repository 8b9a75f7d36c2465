"""The delta file, format ``tsub1``: which bytes come from where.

    "EKDELTA1"  u32 size of the header  header  side  tables  residuals (blocks)  planes  literals

All but the first two and the blocks are packed with LZMA. The target is written from its first byte to its last by the regions
of the header, in order. A region is a copy from the base, a literal, a part of ``side``, or tensor data that is predicted from
the base and corrected by residuals. ``side`` holds the new scales, as differences to scales of the base. Differences of numbers
of 2 and 4 bytes are folded (0, -1, 1, -2, …) and their bytes lie in planes, the least significant first. Numbers are
little-endian. Everything that is read is bounded before it is allocated, and the header must be in its one canonical form.
"""

from __future__ import annotations

import lzma
import struct
from enum import IntEnum
from typing import Annotated, Any

import msgspec
import numpy as np

from edgekit.errors import ArtifactError

MAGIC = b"EKDELTA1"
PREFIX = struct.Struct("<8sI")
MAX_PACKED_HEADER_BYTES = 4 << 20
MAX_HEADER_BYTES = 16 << 20
MAX_SIDE_BYTES = 8 << 20
MAX_REGIONS = 200_000
MAX_SIZE = 1 << 40
_HINT = "It was damaged, or not made by edgekit; the whole file is fetched."
FILTERS: list[dict[str, Any]] = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 20, "lc": 3, "lp": 0, "pb": 0}]


class Kind(IntEnum):
    """What a region is."""

    COPY = 0
    LITERAL = 1
    SIDE = 2
    SUBTRACT = 3
    """Bytes: old + residual, modulo 256."""
    RESCALE = 4
    """Bytes of a quantized weight: old, brought to the new scale, + residual, modulo 256."""
    WIDE = 5
    """Little-endian integers of 2 or 4 bytes (floats by their bits): old + difference, folded and in planes."""
    PRODUCT = 6
    """float32 scales of a bias: those of its weight, in the side bytes, times the scale of the activation."""


class Region(msgspec.Struct, frozen=True, array_like=True):
    """One region of the target.

    ``offset`` is in the base for COPY, SUBTRACT, RESCALE and WIDE, in the side bytes for SIDE. ``width`` is WIDE's. A tensor's
    bytes are [outer, channels, inner]; ``classes`` names the table of each channel, by its place in the header's list.
    RESCALE: ``old_scales`` in the base and ``new_scales`` in the side are float32, one for each channel or one for all;
    ``is_signed`` and ``zero_point`` (old and new the same) say what the bytes mean. PRODUCT: ``offset`` is the factor's bits.
    """

    kind: int
    length: int
    offset: int = 0
    width: int = 1
    channels: int = 1
    inner: int = 1
    classes: int = 0
    old_scales: int = 0
    new_scales: int = 0
    scales: int = 1
    is_signed: bool = True
    zero_point: int = 0


class Header(msgspec.Struct, frozen=True):
    """The table of contents. Sizes are of the packed parts, in the order in which they follow.

    The digests of base and target are not in it: signed metadata has them.
    """

    base_size: int
    target_size: int
    regions: list[Region]
    classes: bytes
    origins: list[tuple[int, int]]
    """Pieces of the base (begin, length), which the side bytes are differences to; together they are as long."""
    side_size: int
    tables_size: int
    blocks: list[int]
    """Sizes of the residuals' blocks."""
    planes_size: int
    literals_size: int


def pack(data: bytes) -> bytes:
    """LZMA without container; nothing stays nothing."""
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=FILTERS) if data else b""


def unpack(data: bytes, limit: int) -> bytes:
    """The opposite of :func:`pack`.

    Raises:
        ArtifactError: ``delta.malformed`` when it is damaged or longer than ``limit``.
    """
    if not data:
        return b""
    try:
        decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=FILTERS)
        found = decompressor.decompress(data, limit + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise malformed(f"its packed data is damaged: {error}") from error
    if len(found) > limit or not decompressor.eof or decompressor.unused_data:
        raise malformed("its packed data is longer than it may be")
    return found


def malformed(why: str) -> ArtifactError:
    """A delta that cannot be used."""
    return ArtifactError(
        "delta.malformed", f"delta: {why}.", hint="It was damaged, or not made by edgekit; the whole file is fetched."
    )


_Pairs = Annotated[list[tuple[int, int]], msgspec.Meta(max_length=MAX_REGIONS)]
_Numbers = Annotated[list[int], msgspec.Meta(max_length=MAX_REGIONS)]
_Regions = Annotated[list[Region], msgspec.Meta(max_length=MAX_REGIONS)]
"""The length is checked before anything is made of what is in them: the record of a few bytes takes a hundred in memory."""


class _Columns(msgspec.Struct, frozen=True, array_like=True):
    """A header as it is written: the same things of all regions beside each other, which packs well.

    Where regions begin in the base is told by their order there: ``steps`` leads from each region's rank to the next one's, and
    ``gaps`` from the end of a region to the begin of the next in the base's order. A file whose parts only moved needs few
    bytes, and one whose parts did not move next to none. What only some kinds have is in ``rest``.
    """

    base_size: int
    target_size: int
    kinds: bytes
    lengths: _Numbers
    steps: bytes
    gaps: _Numbers
    rest: _Regions
    classes: bytes
    origins: _Pairs
    side_size: int
    tables_size: int
    blocks: _Numbers
    planes_size: int
    literals_size: int


_BASED = frozenset({Kind.COPY, Kind.SUBTRACT, Kind.RESCALE, Kind.WIDE})
_PLAIN = frozenset({Kind.COPY, Kind.LITERAL})


def _step_type(count: int) -> str:
    return "<u1" if count <= 1 << 8 else "<u2" if count <= 1 << 16 else "<u4"


def _columns(header: Header) -> _Columns:
    based = [region for region in header.regions if region.kind in _BASED]
    order = sorted(range(len(based)), key=lambda i: (based[i].offset, i))
    ranks = np.empty(len(based), np.int64)
    ranks[order] = np.arange(len(based))
    gaps, ended = [], 0
    for i in order:
        gaps.append(based[i].offset - ended)
        ended = based[i].offset + based[i].length
    return _Columns(
        header.base_size,
        header.target_size,
        bytes(region.kind & 0xFF for region in header.regions),
        [region.length for region in header.regions],
        np.diff(ranks, prepend=0).astype(_step_type(len(based))).tobytes(),
        gaps,
        [_without_offset(region) for region in header.regions if region.kind not in _PLAIN],
        header.classes,
        header.origins,
        header.side_size,
        header.tables_size,
        header.blocks,
        header.planes_size,
        header.literals_size,
    )


def _without_offset(region: Region) -> Region:
    return msgspec.structs.replace(region, offset=0) if region.kind in _BASED else region


def _header(columns: _Columns) -> Header:
    count = len(columns.kinds)
    if count > MAX_REGIONS or len(columns.lengths) != count or len(columns.gaps) > count:
        raise malformed("its columns do not fit")
    based = [length for kind, length in zip(columns.kinds, columns.lengths, strict=False) if kind in _BASED]
    if len(columns.gaps) != len(based):
        raise malformed("its columns do not fit")
    if any(not 0 < length <= MAX_SIZE for length in columns.lengths) or any(abs(gap) > MAX_SIZE for gap in columns.gaps):
        raise malformed("a region is out of bounds")
    offsets = iter(_offsets(columns, based))
    rest, regions = iter(columns.rest), []
    for kind, length in zip(columns.kinds, columns.lengths, strict=True):
        region = Region(kind, length) if kind in _PLAIN else next(rest, None)
        if region is None:
            raise malformed("its columns do not fit")
        regions.append(msgspec.structs.replace(region, offset=next(offsets)) if kind in _BASED else region)
    return Header(
        columns.base_size,
        columns.target_size,
        regions,
        columns.classes,
        columns.origins,
        columns.side_size,
        columns.tables_size,
        columns.blocks,
        columns.planes_size,
        columns.literals_size,
    )


def _offsets(columns: _Columns, lengths: list[int]) -> list[int]:
    """Where each region with a base begins in it."""
    count, kind = len(lengths), np.dtype(_step_type(len(lengths)))
    if len(columns.steps) != count * kind.itemsize:
        raise malformed("its columns do not fit")
    ranks = np.cumsum(np.frombuffer(columns.steps, kind), dtype=kind).astype(np.int64)
    order = np.full(count, -1, np.int64)
    if (ranks >= count).any():
        raise malformed("its columns do not fit")
    order[ranks] = np.arange(count)
    if (order < 0).any():
        raise malformed("its columns do not fit")
    found, ended = [0] * count, 0
    for gap, i in zip(columns.gaps, order.tolist(), strict=True):
        found[i] = ended + gap
        ended = found[i] + lengths[i]
    return found


def encode_header(header: Header) -> bytes:
    """The beginning of a delta file."""
    packed = pack(msgspec.msgpack.encode(_columns(header)))
    return PREFIX.pack(MAGIC, len(packed)) + packed


def packed_header_size(prefix: bytes) -> int:
    """How long the packed header is that follows the prefix.

    Raises:
        ArtifactError: ``delta.malformed``.
    """
    if len(prefix) != PREFIX.size:
        raise malformed("it is too short")
    magic, size = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise malformed("it does not begin like one")
    if not 0 < size <= MAX_PACKED_HEADER_BYTES:
        raise malformed("its header is too long")
    return int(size)


def parse_header(data: bytes) -> tuple[Header, int]:
    """Read the header at the beginning of a delta.

    Args:
        data: at least the prefix and the header.

    Returns:
        The header, and where it ends.

    Raises:
        ArtifactError: ``delta.malformed``.
    """
    size = packed_header_size(data[: PREFIX.size])
    end = PREFIX.size + size
    if len(data) < end:
        raise malformed("its header is cut off")
    raw = unpack(bytes(data[PREFIX.size : end]), MAX_HEADER_BYTES)
    try:
        header = _header(msgspec.msgpack.decode(raw, type=_Columns))
        is_canonical = msgspec.msgpack.encode(_columns(header)) == raw
    except (msgspec.DecodeError, msgspec.EncodeError, RecursionError, OverflowError) as error:
        raise malformed(f"its header cannot be read: {error}") from error
    if not is_canonical:
        raise malformed("its header is not canonical")
    _check(header)
    return header, end


def _check(header: Header) -> None:
    sizes = (
        header.base_size,
        header.target_size,
        header.side_size,
        header.tables_size,
        header.planes_size,
        header.literals_size,
    )
    if any(not 0 <= size <= MAX_SIZE for size in (*sizes, *header.blocks)):
        raise malformed("a size in it is out of bounds")
    if len(header.regions) > MAX_REGIONS or len(header.blocks) > MAX_REGIONS or header.side_size > MAX_SIDE_BYTES:
        raise malformed("it has too many parts")
    _check_origins(header)
    total = 0
    for region in header.regions:
        _check_region(region, header)
        total += region.length
    if total != header.target_size:
        raise malformed("its regions do not make the target")


def _check_origins(header: Header) -> None:
    total = 0
    for begin, length in header.origins:
        if begin < 0 or not 0 < length <= MAX_SIDE_BYTES or begin + length > header.base_size:
            raise malformed("scales lie outside the base")
        total += length
    if total > MAX_SIDE_BYTES or total % 4:
        raise malformed("its scales do not fit")


def _check_region(region: Region, header: Header) -> None:
    numbers = (region.offset, region.classes, region.old_scales, region.new_scales, region.scales)
    if region.length <= 0 or any(not 0 <= number <= MAX_SIZE for number in (*numbers, region.length)):
        raise malformed("a region is out of bounds")
    if region.kind not in set(Kind):
        raise malformed("a region is of no known kind")
    if region.kind in {Kind.COPY, Kind.SUBTRACT, Kind.RESCALE, Kind.WIDE} and region.offset + region.length > header.base_size:
        raise malformed("a region lies outside the base")
    if region.kind == Kind.PRODUCT and (region.offset >= 1 << 32 or region.length != 4 * region.scales):
        raise malformed("a product does not fit")
    if region.width not in ({2, 4} if region.kind == Kind.WIDE else {1}) or region.length % region.width:
        raise malformed("a region has a wrong width")
    if region.kind in {Kind.SUBTRACT, Kind.RESCALE}:
        per = region.channels * region.inner
        if not 0 < region.channels <= region.length or not 0 < region.inner <= region.length or region.length % per:
            raise malformed("a tensor's shape does not fit its size")
        if region.classes + region.channels > len(header.classes):
            raise malformed("a tensor has no classes")
    if region.kind == Kind.RESCALE:
        if region.scales not in {1, region.channels} or not -128 <= region.zero_point <= 255:
            raise malformed("a tensor's scales do not fit")
        if region.old_scales + 4 * region.scales > header.base_size:
            raise malformed("a tensor's scales lie outside the base")
