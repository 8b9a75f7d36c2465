"""Digest and checksum of a bundle's blobs, which are computed in two threads."""

from __future__ import annotations

import random

import pytest
from releases import tiny_bundle

from edgekit.bundle.layout import Entry, Placed, arrange, parse_directory, parse_end
from edgekit.bundle.reader import read_bundle, verify_bundle
from edgekit.errors import EdgekitError
from edgekit.schema.digest import CHUNK_BYTES
from edgekit.trust.signer import generate_signer

SIGNER = generate_signer()


def contents_of(data: bytes) -> dict[str, tuple[Entry, bytes]]:
    count, offset, size = parse_end(data[-22:])
    layout = arrange(parse_directory(data[offset : offset + size], count))

    def content(placed: Placed) -> bytes:
        return data[placed.data_offset : placed.data_offset + placed.entry.size_bytes]

    return {placed.entry.name: (placed.entry, content(placed)) for placed in layout.placed}


def with_wrong_checksum(data: bytes, name: str) -> bytes:
    """The bundle that the layout makes when one entry's checksum is another: header and directory agree on it."""
    contents = contents_of(data)
    entry, content = contents[name]
    contents[name] = (Entry(name=name, size_bytes=entry.size_bytes, crc32=entry.crc32 ^ 1), content)
    layout = arrange(entry for entry, _ in contents.values())
    body = b"".join(placed.header + contents[placed.entry.name][1] for placed in layout.placed)
    return body + layout.directory


@pytest.fixture
def bundle(tmp_path):
    return tiny_bundle(tmp_path / "kws.edgekit", SIGNER, model=random.Random(3).randbytes(1000))


def test_rebuilt_bundle_is_the_same_file(bundle):
    """What the next tests change is the checksum and nothing else."""
    data = bundle.read_bytes()
    name = next(iter(contents_of(data)))
    assert with_wrong_checksum(with_wrong_checksum(data, name), name) == data


def test_wrong_checksum_in_header_and_directory(bundle):
    data = bundle.read_bytes()
    for name in contents_of(data):
        bundle.write_bytes(with_wrong_checksum(data, name))
        with pytest.raises(EdgekitError) as caught:
            verify_bundle(bundle, [SIGNER.public_key])
        assert caught.value.code == "bundle.malformed"


def test_wrong_checksum_is_seen_by_who_copies_the_blobs(bundle):
    data = bundle.read_bytes()
    model = read_bundle(bundle).manifest.variants[0].model
    bundle.write_bytes(with_wrong_checksum(data, f"blobs/sha256/{model.removeprefix('sha256:')}"))
    unread = verify_bundle(bundle, [SIGNER.public_key], is_hashed=False)
    for read in (unread.blob, unread.check):
        with pytest.raises(EdgekitError) as caught:
            read(model)
        assert caught.value.code == "bundle.digest_mismatch"


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 6 * CHUNK_BYTES, 6 * CHUNK_BYTES + 1])
def test_blobs_of_one_chunk_and_of_many(tmp_path, size):
    model = random.Random(size).randbytes(size)
    bundle = verify_bundle(tiny_bundle(tmp_path / "kws.edgekit", SIGNER, model=model), [SIGNER.public_key])
    digest = bundle.manifest.variants[0].model
    assert bundle.blob(digest) == model
    bundle.check(digest)
