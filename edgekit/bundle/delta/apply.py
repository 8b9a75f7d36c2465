"""Apply a delta: streaming, in bounded memory, and nothing is believed that the signed digest does not confirm.

The base is hashed first, then the target's bytes are made from its first to its last and hashed as they are written; whoever
calls this gives the file its name afterwards. The codec ``tsub1`` needs numpy and the standard library; ``hdiff`` needs the
package hdiffpatch.

    >>> with delta.open("rb") as source, part.open("wb") as out:              # doctest: +SKIP
    ...     apply_delta(source, base, out, ref=ref, size_bytes=blob.size_bytes)
"""

from __future__ import annotations

import hashlib
import importlib
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle.delta.layout import (
    FILTERS,
    MAX_SIDE_BYTES,
    PREFIX,
    Header,
    Kind,
    Region,
    malformed,
    pack,
    packed_header_size,
    parse_header,
    unpack,
)
from edgekit.bundle.delta.predict import channel_of, multiply, rescale, unfold
from edgekit.bundle.delta.rans import BLOCK_BYTES, MAX_TABLES, Decoder, Tables, tables_of
from edgekit.errors import DeviceError, TrustError
from edgekit.schema.digest import CHUNK_BYTES, hex_of, short
from edgekit.schema.release import DeltaRef

CHUNK = 1 << 18
"""Elements of WIDE whose planes lie together: a part of the format."""
_STEP = 1 << 16
"""Bytes that are predicted at a time; each takes some ten numbers of 8 bytes on the way."""
MAX_TABLE_BYTES = MAX_TABLES * 512
MAX_BLOCK_BYTES = 4 * BLOCK_BYTES
MAX_HDIFF_BYTES = 256 << 20
"""hdiffpatch works in memory; larger deltas and results are not applied with it."""
_HDIFF_NAME = re.compile(rb"HDIFF13&[a-z0-9]{0,16}\0")
_MAX_VARINT_BYTES = 9
_CODED = frozenset({Kind.SUBTRACT, Kind.RESCALE})
Bytes = NDArray[np.uint8]


def apply_delta(delta: BinaryIO, base: Path, out: BinaryIO, *, ref: DeltaRef, size_bytes: int) -> None:
    """Make a blob from another one.

    Args:
        delta: the delta's bytes, seekable; its own digest was checked by whoever fetched it.
        base: the blob that it begins with.
        out: where the result is written.
        ref: what signed metadata says: the digests of base and result, and the codec.
        size_bytes: of the result, signed too; not a byte more is written.

    Raises:
        ArtifactError: ``delta.malformed``.
        TrustError: ``delta.digest_mismatch`` when the result is not what was signed.
        DeviceError: ``delta.base_missing``, ``delta.base_changed``, or ``delta.unsupported`` when a package is missing.
    """
    _check_base(base, ref)
    writer = _Writer(out, size_bytes)
    if ref.codec == "hdiff":
        _apply_hdiff(delta, base, writer)
    else:
        _apply_tsub(delta, base, writer)
    writer.check(ref)


class _Writer:
    """Counts, bounds and hashes what is written."""

    def __init__(self, out: BinaryIO, size: int) -> None:
        self._out, self._written = out, 0
        self.size_bytes = size
        self._state = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._written += len(data)
        if self._written > self.size_bytes:
            raise malformed("it makes more than the result's signed size")
        self._state.update(data)
        self._out.write(data)

    def check(self, ref: DeltaRef) -> None:
        if self._written != self.size_bytes or "sha256:" + self._state.hexdigest() != ref.target:
            raise TrustError(
                "delta.digest_mismatch",
                f"delta: its result has sha256:{self._state.hexdigest()[:12]}… ({self._written} bytes), "
                f"signed is sha256:{short(ref.target)}… ({self.size_bytes} bytes).",
                hint="The whole file is fetched.",
            )


def _check_base(base: Path, ref: DeltaRef) -> None:
    state = hashlib.sha256()
    try:
        with base.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                state.update(chunk)
    except OSError as error:
        raise DeviceError("delta.base_missing", f"{base}: {error.strerror}; the delta begins with it.") from error
    if state.hexdigest() != hex_of(ref.base):
        raise DeviceError("delta.base_changed", f"{base}: is not the blob {ref.base} that the delta begins with.")


# --- hdiffpatch


def _apply_hdiff(delta: BinaryIO, base: Path, writer: _Writer) -> None:
    try:
        hdiffpatch = importlib.import_module("hdiffpatch")
    except ImportError as error:
        raise DeviceError(
            "delta.unsupported", "this delta needs the package hdiffpatch.", hint="pip install 'edgekit[agent,hdiff]'"
        ) from error
    data = delta.read(MAX_HDIFF_BYTES + 1)
    if len(data) > MAX_HDIFF_BYTES or base.stat().st_size > MAX_HDIFF_BYTES:
        raise malformed("it is larger than what is applied in memory")
    if _hdiff_result_size(data) != writer.size_bytes:
        raise malformed("it does not make the result's signed size")
    try:
        result = hdiffpatch.apply(base.read_bytes(), data)
    except OSError:
        raise
    except Exception as error:  # the package raises its own types
        raise malformed(f"hdiffpatch cannot apply it: {error}") from error
    for at in range(0, len(result), CHUNK_BYTES):
        writer.write(memoryview(result)[at : at + CHUNK_BYTES])


def _hdiff_result_size(data: bytes) -> int:
    """What hdiffpatch allocates before it looks at anything else: the first number behind the format's name."""
    name = _HDIFF_NAME.match(data)
    size = 0
    for byte in data[name.end() : name.end() + _MAX_VARINT_BYTES] if name else b"":
        size = size << 7 | byte & 0x7F
        if byte < 0x80:
            return size
    raise malformed("it is not one of hdiffpatch")


# --- tsub1


def read_header(delta: BinaryIO) -> tuple[Header, int]:
    """The header of a delta, and where it ends; no more is read than that.

    Raises:
        ArtifactError: ``delta.malformed``.
    """
    prefix = delta.read(PREFIX.size)
    return parse_header(prefix + delta.read(packed_header_size(prefix)))


def _apply_tsub(delta: BinaryIO, base: Path, writer: _Writer) -> None:
    header, end = read_header(delta)
    if header.base_size != base.stat().st_size or header.target_size > writer.size_bytes:
        raise malformed("it is for files of other sizes")
    with base.open("rb") as old:
        parts = _Parts(delta, header, end, old)
        for region in header.regions:
            for chunk in _make(region, parts, old):
                writer.write(chunk)
    parts.check_end()


class _Stream:
    """A packed part that is unpacked as it is read."""

    def __init__(self, file: BinaryIO, begin: int, size: int) -> None:
        self._file, self._at, self._end = file, begin, begin + size
        self._unpacker = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=FILTERS)
        self._is_empty = size == 0

    def read(self, count: int) -> bytes:
        """Exactly ``count`` bytes."""
        parts, left = [], count
        while left:
            parts.append(self._some(left))
            left -= len(parts[-1])
        return b"".join(parts)

    def _some(self, limit: int) -> bytes:
        if self._is_empty or self._unpacker.eof:
            raise malformed("a packed part is too short")
        data = b""
        if self._unpacker.needs_input:
            self._file.seek(self._at)
            data = self._file.read(min(1 << 16, self._end - self._at))
            self._at += len(data)
            if not data:
                raise malformed("a packed part is cut off")
        try:
            return self._unpacker.decompress(data, limit)
        except (lzma.LZMAError, EOFError) as error:
            raise malformed(f"a packed part is damaged: {error}") from error

    def check_end(self) -> None:
        """All of it was needed."""
        if self._is_empty:
            return
        while not self._unpacker.eof:
            if self._some(1):
                raise malformed("a packed part is longer than its use")
        if self._at != self._end or self._unpacker.unused_data:
            raise malformed("a packed part is longer than its use")


class _Parts:
    """What follows the header."""

    def __init__(self, delta: BinaryIO, header: Header, end: int, old: BinaryIO) -> None:
        self._delta = delta
        self.side = _side(header, unpack(self._read(end, header.side_size), MAX_SIDE_BYTES), old)
        at = end + header.side_size
        packed_tables = self._read(at, header.tables_size, limit=MAX_TABLE_BYTES)
        self._tables = load_tables(packed_tables) if packed_tables else None
        total = sum(region.length for region in header.regions if region.kind in _CODED)
        self._decoder = Decoder(self._tables, total) if self._tables is not None else None
        self._block_at = at + header.tables_size
        self._blocks = iter(header.blocks)
        self._contexts = _contexts(header)
        self._ready = np.zeros(0, np.uint8)
        planes = self._block_at + sum(header.blocks)
        self.planes = _Stream(delta, planes, header.planes_size)
        self.literals = _Stream(delta, planes + header.planes_size, header.literals_size)

    def _read(self, at: int, size: int, *, limit: int = MAX_SIDE_BYTES) -> bytes:
        if size > limit:
            raise malformed("a part is larger than it may be")
        self._delta.seek(at)
        data = self._delta.read(size)
        if len(data) != size:
            raise malformed("it is cut off")
        return data

    def scales(self, region: Region) -> NDArray[np.float32]:
        """The new scales that a region names."""
        piece = self.side[region.new_scales : region.new_scales + 4 * region.scales]
        if len(piece) != 4 * region.scales:
            raise malformed("a tensor's scales lie outside the side bytes")
        return np.frombuffer(piece, "<f4")

    def residuals(self, count: int) -> Bytes:
        """The next residuals."""
        while len(self._ready) < count:
            self._ready = np.concatenate([self._ready, self._next_block()])
        taken, self._ready = self._ready[:count], self._ready[count:]
        return taken

    def _next_block(self) -> Bytes:
        contexts = next(self._contexts, None)
        size = next(self._blocks, None)
        if contexts is None or size is None or self._tables is None or self._decoder is None:
            raise malformed("it has fewer residuals than its tensors need")
        data = self._read(self._block_at, size, limit=MAX_BLOCK_BYTES)
        self._block_at += size
        if int(contexts.max()) >= len(self._tables.frequencies):
            raise malformed("a tensor names a table that it does not have")
        return self._decoder.decode(data, contexts)

    def check_end(self) -> None:
        """Nothing is left over: each byte of a delta means something."""
        if len(self._ready) or next(self._blocks, None) is not None:
            raise malformed("it has more residuals than its tensors need")
        if self._decoder is not None:
            self._decoder.check_end()
        self.planes.check_end()
        self.literals.check_end()


def _side(header: Header, planes: bytes, old: BinaryIO) -> bytes:
    """The new scales: differences to pieces of the base."""
    if sum(length for _, length in header.origins) != len(planes):
        raise malformed("its scales are not as many as their origins")
    return _widen(b"".join(_base(old, begin, length) for begin, length in header.origins), planes, 4)


def _contexts(header: Header) -> Iterator[Bytes]:
    """The table of each residual, block by block."""
    waiting: list[Bytes] = []
    count = 0
    for region in header.regions:
        if region.kind not in _CODED:
            continue
        classes = np.frombuffer(header.classes, np.uint8, region.channels, region.classes)
        for start in range(0, region.length, _STEP):
            size = min(_STEP, region.length - start)
            waiting.append(classes[channel_of(start, size, channels=region.channels, inner=region.inner)])
            count += size
            if count >= BLOCK_BYTES:
                joined = np.concatenate(waiting)
                yield joined[:BLOCK_BYTES]
                waiting, count = [joined[BLOCK_BYTES:]], count - BLOCK_BYTES
    if count:
        yield np.concatenate(waiting)


def load_tables(packed: bytes) -> Tables:
    """Tables as :func:`save_tables` writes them.

    Raises:
        ArtifactError: ``delta.malformed``.
    """
    raw = unpack(packed, MAX_TABLES * 512)
    if not raw or len(raw) % 512:
        raise malformed("its tables are cut off")
    folded = np.frombuffer(raw, "<u2").reshape(-1, 256).astype(np.uint64)
    return tables_of(folded[:, _FOLD])


def save_tables(tables: Tables) -> bytes:
    """Tables in the order 0, -1, 1, -2, 2, …: small differences are frequent, so what is alike lies together."""
    folded = np.empty_like(tables.frequencies)
    folded[:, _FOLD] = tables.frequencies
    return pack(folded.astype("<u2").tobytes())


_FOLD = np.array([2 * byte if byte < 128 else 2 * (255 - byte) + 1 for byte in range(256)])
"""Where the frequency of a byte lies."""


def _make(region: Region, parts: _Parts, old: BinaryIO) -> Iterator[bytes]:
    """A region's bytes, chunk by chunk."""
    if region.kind == Kind.SIDE:
        piece = parts.side[region.offset : region.offset + region.length]
        if len(piece) != region.length:
            raise malformed("a region lies outside the side bytes")
        yield piece
        return
    if region.kind == Kind.PRODUCT:
        yield multiply(parts.scales(region), region.offset)
        return
    scales = _Scales(region, parts, old) if region.kind == Kind.RESCALE else None
    step = _STEP if region.kind in _CODED else CHUNK * region.width
    for start in range(0, region.length, step):
        size = min(step, region.length - start)
        if region.kind == Kind.LITERAL:
            yield parts.literals.read(size)
            continue
        found = _base(old, region.offset + start, size)
        if region.kind == Kind.COPY:
            yield found
        elif region.kind == Kind.WIDE:
            yield _widen(found, parts.planes.read(size), region.width)
        else:
            values = np.frombuffer(found, np.uint8)
            if scales is not None:
                values = scales.predict(values, start)
            yield (values + parts.residuals(size)).tobytes()


def _base(old: BinaryIO, at: int, size: int) -> bytes:
    old.seek(at)
    data = old.read(size)
    if len(data) != size:
        raise DeviceError("delta.base_changed", "the base became shorter while it was read.")
    return data


def _widen(old: bytes, planes: bytes, width: int) -> bytes:
    """Old integers plus differences that are folded and in planes."""
    found: bytes = (np.frombuffer(old, f"<u{width}") + unfold(planes, width)).astype(f"<u{width}").tobytes()
    return found


class _Scales:
    """Old and new scales of a weight."""

    def __init__(self, region: Region, parts: _Parts, old: BinaryIO) -> None:
        self._region = region
        self._new = parts.scales(region)
        self._old = np.frombuffer(_base(old, region.old_scales, 4 * region.scales), "<f4")

    def predict(self, values: Bytes, start: int) -> Bytes:
        region = self._region
        if region.scales == 1:
            channel = np.zeros(len(values), np.int64)
        else:
            channel = channel_of(start, len(values), channels=region.channels, inner=region.inner)
        return rescale(values, self._old[channel], self._new[channel], is_signed=region.is_signed, zero_point=region.zero_point)
