"""The bundle file's layout, pure: which bytes a list of entries must be stored as.

A bundle is a zip whose every byte is decided by its entries: STORED, sorted by name, dated 1980-01-01, mode 0644, no extra
fields, no comments, no data descriptors, no gaps. Writer and reader share this module: the writer writes these bytes, the
reader demands them, so there is no place in the file that nobody looks at.

    >>> blob_name("sha256:" + "0" * 64)[:13]
    'blobs/sha256/'
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from edgekit.errors import ArtifactError
from edgekit.schema.digest import hex_of

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "signature.dsse.json"
BLOB_PREFIX = "blobs/sha256/"

MAX_BYTES = 0xFFFF_FFFE
"""Entries and offsets must stay below this: larger ones need zip64, which this layout does not have."""
MAX_ENTRIES = 4096
MAX_NAME_BYTES = 256

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_VERSION_NEEDED = 10
_VERSION_MADE_BY = (3 << 8) | 20
"""Unix, zip 2.0."""
_TIME, _DATE = 0, (1 << 5) | 1
"""1980-01-01 00:00, the earliest that zip can say."""
_ATTRIBUTES = 0o100644 << 16
END_BYTES = _END.size
LOCAL_HEADER_BYTES = _LOCAL.size


@dataclass(frozen=True)
class Entry:
    """One stored file: its name in the zip, its size and the CRC-32 of its content."""

    name: str
    size_bytes: int
    crc32: int


@dataclass(frozen=True)
class Placed:
    """An entry with where it lies: the header's bytes at ``header_offset``, the content right behind them."""

    entry: Entry
    header_offset: int
    header: bytes

    @property
    def data_offset(self) -> int:
        """Where the content begins."""
        return self.header_offset + len(self.header)


@dataclass(frozen=True)
class Layout:
    """Every byte of the file but the contents: the placed entries, then the directory at ``directory_offset``."""

    placed: tuple[Placed, ...]
    directory_offset: int
    directory: bytes

    @property
    def size_bytes(self) -> int:
        """The file's size."""
        return self.directory_offset + len(self.directory)


def blob_name(digest: str) -> str:
    """The name of a blob in the bundle and in a repository: ``blobs/sha256/<hex>``."""
    return BLOB_PREFIX + hex_of(digest)


def arrange(entries: Iterable[Entry]) -> Layout:
    """The one layout of these entries.

    Raises:
        ArtifactError: ``bundle.too_large`` when sizes, offsets or the number of entries need zip64.
    """
    ordered = sorted(entries, key=lambda entry: entry.name)
    if len(ordered) > MAX_ENTRIES:
        raise ArtifactError("bundle.too_large", f"{len(ordered)} files: a bundle holds at most {MAX_ENTRIES}.")
    placed, offset = [], 0
    for entry in ordered:
        item = Placed(entry=entry, header_offset=offset, header=_local_header(entry))
        offset = item.data_offset + entry.size_bytes
        if offset > MAX_BYTES:
            raise ArtifactError("bundle.too_large", f"{entry.name}: the bundle would be larger than {MAX_BYTES} bytes.")
        placed.append(item)
    records = b"".join(_central_record(item) for item in placed)
    count = len(placed)
    end = _END.pack(_END_MAGIC, 0, 0, count, count, len(records), offset, 0)
    return Layout(placed=tuple(placed), directory_offset=offset, directory=records + end)


def _local_header(entry: Entry) -> bytes:
    name = entry.name.encode("ascii")
    sizes = (entry.crc32, entry.size_bytes, entry.size_bytes)
    return _LOCAL.pack(_LOCAL_MAGIC, _VERSION_NEEDED, 0, 0, _TIME, _DATE, *sizes, len(name), 0) + name


def _central_record(item: Placed) -> bytes:
    entry, name = item.entry, item.entry.name.encode("ascii")
    versions = (_VERSION_MADE_BY, _VERSION_NEEDED)
    sizes = (entry.crc32, entry.size_bytes, entry.size_bytes)
    rest = (len(name), 0, 0, 0, 0, _ATTRIBUTES, item.header_offset)
    return _CENTRAL.pack(_CENTRAL_MAGIC, *versions, 0, 0, _TIME, _DATE, *sizes, *rest) + name


def parse_end(tail: bytes) -> tuple[int, int, int]:
    """What the last bytes of a file say: number of entries, offset and size of the directory.

    Raises:
        ArtifactError: ``bundle.malformed`` when they are not the end of a zip.
    """
    if len(tail) != END_BYTES:
        raise ArtifactError("bundle.malformed", "too short to be a bundle")
    magic, _, _, _, count, size, offset, _ = _END.unpack(tail)
    if magic != _END_MAGIC:
        raise ArtifactError("bundle.malformed", "it does not end like a bundle")
    return count, offset, size


def parse_directory(records: bytes, count: int) -> tuple[Entry, ...]:
    """The entries that a directory names; only what is needed to rebuild it is read.

    Raises:
        ArtifactError: ``bundle.malformed`` when a record is cut off or a name is not a bundle's.
    """
    entries = tuple(_parse_records(records, count))
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise ArtifactError("bundle.malformed", "a name occurs twice in it")
    return entries


def _parse_records(records: bytes, count: int) -> Iterator[Entry]:
    position = 0
    for _ in range(count):
        if position + _CENTRAL.size > len(records):
            raise ArtifactError("bundle.malformed", "its directory is cut off")
        fields = _CENTRAL.unpack_from(records, position)
        crc32, size, name_bytes = fields[7], fields[9], fields[10]
        position += _CENTRAL.size
        name = records[position : position + name_bytes]
        position += name_bytes
        yield Entry(name=_checked_name(name), size_bytes=size, crc32=crc32)


def _checked_name(raw: bytes) -> str:
    name = raw.decode("ascii", errors="replace")
    is_blob = name.startswith(BLOB_PREFIX) and len(name) == len(BLOB_PREFIX) + 64
    if name in {MANIFEST_NAME, SIGNATURE_NAME} or (is_blob and set(name[len(BLOB_PREFIX) :]) <= set("0123456789abcdef")):
        return name
    raise ArtifactError("bundle.malformed", f"it holds {name[:MAX_NAME_BYTES]!r}, which is not a bundle's name")


def directory_records_size(names: Sequence[str]) -> int:
    """How many bytes the directory's records of these names take, without the end record."""
    return sum(_CENTRAL.size + len(name) for name in names)
