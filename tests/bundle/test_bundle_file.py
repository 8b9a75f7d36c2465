from __future__ import annotations

import contextlib
import json
import random
import struct
import tracemalloc
import zipfile
import zlib
from dataclasses import replace

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from releases import BORN, tiny_bundle

from edgekit.bundle import layout
from edgekit.bundle.layout import MANIFEST_NAME, SIGNATURE_NAME, Entry, arrange, blob_name
from edgekit.bundle.reader import is_canonical_json, parse_manifest, read_bundle, verify_bundle
from edgekit.bundle.writer import write_bundle
from edgekit.errors import ArtifactError, EdgekitError, TrustError, UsageError
from edgekit.schema.base import encode_json
from edgekit.schema.digest import digest_bytes
from edgekit.trust.dsse import decode_envelope, encode_envelope
from edgekit.trust.signer import generate_signer, sign_envelope


@pytest.fixture(scope="module")
def signer():
    return generate_signer()


@pytest.fixture
def bundle(tmp_path, signer):
    return tiny_bundle(tmp_path / "kws.edgekit", signer)


def zip_bytes(entries: dict[str, bytes]) -> bytes:
    """Any entries in the bundle's own layout."""
    placed = arrange(Entry(name=n, size_bytes=len(d), crc32=zlib.crc32(d)) for n, d in entries.items())
    return b"".join(p.header + entries[p.entry.name] for p in placed.placed) + placed.directory


def entries_of(path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {info.filename: file.read(info) for info in file.infolist()}


def refusal(path, signer) -> EdgekitError:
    with pytest.raises(TrustError) as caught:
        verify_bundle(path, [signer.public_key])
    return caught.value


def test_bundle_round_trip(bundle, signer):
    found = verify_bundle(bundle, [signer.public_key])
    assert found.keyids == (signer.keyid,)
    assert found.is_verified
    assert found.blob(found.manifest.variants[0].model) == b"weights" * 50
    assert digest_bytes(found.manifest_bytes) == found.manifest_digest


def test_bundle_is_a_plain_zip_for_other_tools(bundle):
    with zipfile.ZipFile(bundle) as file:
        assert file.testzip() is None
        infos = file.infolist()
    assert [info.filename for info in infos] == sorted(info.filename for info in infos)
    assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
    assert {info.external_attr >> 16 for info in infos} == {0o100644}


def test_same_arguments_same_bytes(tmp_path, signer):
    first, second = (tiny_bundle(tmp_path / f"{i}.edgekit", signer).read_bytes() for i in (1, 2))
    assert first == second


@pytest.mark.fault("F12")
def test_every_flipped_byte_is_refused(bundle, signer, tmp_path):
    data = bundle.read_bytes()
    target = tmp_path / "flipped.edgekit"
    choice = random.Random(1)
    for index in range(len(data)):
        mask = choice.randrange(1, 256)
        target.write_bytes(data[:index] + bytes([data[index] ^ mask]) + data[index + 1 :])
        with pytest.raises(TrustError):
            verify_bundle(target, [signer.public_key])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_extended_or_mixed_bytes_are_refused(bundle, signer, tmp_path, data):
    whole = bundle.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    changed = whole[:start] + data.draw(st.binary(max_size=40)) + whole[end:]
    if changed == whole:
        return
    target = tmp_path / "changed.edgekit"
    target.write_bytes(changed)
    with pytest.raises(TrustError):
        verify_bundle(target, [signer.public_key])


@given(st.binary(max_size=300))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_raise_our_errors_only(tmp_path, data):
    target = tmp_path / "any.edgekit"
    target.write_bytes(data)
    with pytest.raises(EdgekitError):
        read_bundle(target)


@given(st.lists(st.tuples(st.sampled_from("abcdef0123456789"), st.binary(max_size=50)), max_size=6))
def test_layout_round_trip(parts):
    contents = {f"blobs/sha256/{i:063x}{letter}": data for i, (letter, data) in enumerate(parts)}
    data = zip_bytes(contents)
    count, offset, size = layout.parse_end(data[-layout.END_BYTES :])
    entries = layout.parse_directory(data[offset : offset + size], count)
    assert {e.name: e.size_bytes for e in entries} == {n: len(d) for n, d in contents.items()}
    assert arrange(entries).size_bytes == len(data)


def test_signed_by_another_key(bundle, signer):
    stranger = generate_signer()
    error = refusal(bundle, stranger)
    assert error.code == "bundle.untrusted_key"
    assert signer.keyid[:12] in error.message
    assert stranger.keyid[:12] in error.message


def test_no_trusted_key_is_a_usage_error(bundle):
    with pytest.raises(UsageError) as caught:
        verify_bundle(bundle, [])
    assert caught.value.code == "bundle.no_keys"


def test_several_publishers_and_threshold(tmp_path, signer):
    second = generate_signer()
    both = tiny_bundle(tmp_path / "both.edgekit", [signer, second])
    keys = [signer.public_key, second.public_key]
    assert set(verify_bundle(both, keys, threshold=2).keyids) == {signer.keyid, second.keyid}
    one = tiny_bundle(tmp_path / "one.edgekit", signer)
    with pytest.raises(TrustError) as caught:
        verify_bundle(one, [signer.public_key, signer.public_key], threshold=2)
    assert caught.value.code == "bundle.untrusted_key"


def rebuilt(path, tmp_path, change) -> object:
    entries = entries_of(path)
    change(entries)
    target = tmp_path / "rebuilt.edgekit"
    target.write_bytes(zip_bytes(entries))
    return target


def test_unsigned(bundle, signer, tmp_path):
    assert refusal(rebuilt(bundle, tmp_path, lambda e: e.pop(SIGNATURE_NAME)), signer).code == "bundle.unsigned"

    def empty(entries):
        envelope = decode_envelope(entries[SIGNATURE_NAME])
        entries[SIGNATURE_NAME] = encode_envelope(msgspec.structs.replace(envelope, signatures=()))

    assert refusal(rebuilt(bundle, tmp_path, empty), signer).code == "bundle.unsigned"


def test_signature_renamed_to_the_trusted_key(bundle, signer, tmp_path):
    mallory = generate_signer()

    def forge(entries):
        envelope = decode_envelope(sign_envelope(entries[MANIFEST_NAME], [mallory], payload_type=layout_type()))
        forged = msgspec.structs.replace(envelope.signatures[0], keyid=signer.keyid)
        entries[SIGNATURE_NAME] = encode_envelope(msgspec.structs.replace(envelope, signatures=(forged,)))

    assert refusal(rebuilt(bundle, tmp_path, forge), signer).code == "bundle.signature_invalid"


def layout_type() -> str:
    from edgekit.schema.manifest import MANIFEST_MEDIA_TYPE

    return MANIFEST_MEDIA_TYPE


def test_signature_of_another_manifest(bundle, signer, tmp_path):
    other = tiny_bundle(tmp_path / "other.edgekit", signer, version="2.0.0")

    def swap(entries):
        entries[SIGNATURE_NAME] = entries_of(other)[SIGNATURE_NAME]

    assert refusal(rebuilt(bundle, tmp_path, swap), signer).code == "bundle.signature_invalid"


def test_blob_of_the_same_length_swapped(bundle, signer, tmp_path):
    def swap(entries):
        name = blob_name(digest_bytes(b"weights" * 50))
        entries[name] = b"WEIGHTS" * 50

    error = refusal(rebuilt(bundle, tmp_path, swap), signer)
    assert error.code == "bundle.digest_mismatch"
    assert "model.onnx" in error.message


def test_blob_of_another_size(bundle, signer, tmp_path):
    def cut(entries):
        name = blob_name(digest_bytes(b"weights" * 50))
        entries[name] = entries[name][:-1]

    assert refusal(rebuilt(bundle, tmp_path, cut), signer).code == "bundle.digest_mismatch"


@pytest.mark.parametrize("name", ["blobs/sha256/" + "0" * 64])
def test_blob_that_the_manifest_does_not_name(bundle, signer, tmp_path, name):
    def add(entries):
        entries[name] = b"smuggled"

    error = refusal(rebuilt(bundle, tmp_path, add), signer)
    assert error.code == "bundle.malformed"
    assert "not in the manifest" in error.message


def test_blob_missing(bundle, signer, tmp_path):
    path = rebuilt(bundle, tmp_path, lambda e: e.pop(blob_name(digest_bytes(b"weights" * 50))))
    assert "not in the file" in refusal(path, signer).message


@pytest.mark.fault("F12")
@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "a\\b", "blobs/sha256/", "blobs/sha256/" + "A" * 64, "manifest.json/", "x\x00y", "é"]
)
def test_foreign_names(bundle, signer, tmp_path, name):
    target = tmp_path / "zip.edgekit"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as file:
        for known, data in entries_of(bundle).items():
            file.writestr(known, data)
        info = zipfile.ZipInfo("placeholder")
        info.filename = name
        file.writestr(info, b"x")
    assert refusal(target, signer).code == "bundle.malformed"


@pytest.mark.fault("F12")
@pytest.mark.parametrize("form", ["deflated", "time", "comment", "extra", "duplicate", "mode"])
def test_zip_that_another_tool_wrote(bundle, signer, tmp_path, form):
    target = tmp_path / "zip.edgekit"
    compression = zipfile.ZIP_DEFLATED if form == "deflated" else zipfile.ZIP_STORED
    with (
        pytest.warns(UserWarning, match="Duplicate name") if form == "duplicate" else contextlib.nullcontext(),
        zipfile.ZipFile(target, "w") as file,
    ):
        for name, data in sorted(entries_of(bundle).items()):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0) if form != "time" else (2026, 1, 1, 0, 0, 0))
            info.compress_type, info.create_system = compression, 3
            info.external_attr = (0o100644 if form != "mode" else 0o120777) << 16
            if form == "extra":
                info.extra = struct.pack("<HH", 0x9999, 0)
            file.writestr(info, data)
        if form == "duplicate":
            file.writestr(zipfile.ZipInfo("manifest.json"), b"{}")
        if form == "comment":
            file.comment = b"hello"
    assert refusal(target, signer).code == "bundle.malformed"


@pytest.mark.fault("F12")
def test_bytes_before_between_and_after(bundle, signer, tmp_path):
    data = bundle.read_bytes()
    for name, changed in {"before": b"x" + data, "after": data + b"x", "newline": data + b"\n", "empty": b""}.items():
        target = tmp_path / name
        target.write_bytes(changed)
        assert refusal(target, signer).code == "bundle.malformed"


@pytest.mark.fault("F12")
def test_sizes_that_need_zip64_are_refused():
    with pytest.raises(ArtifactError) as caught:
        arrange([Entry(name=blob_name("sha256:" + "0" * 64), size_bytes=0xFFFF_FFFF, crc32=0)])
    assert caught.value.code == "bundle.too_large"


@pytest.mark.fault("F12")
def test_sparse_file_above_four_gigabytes(tmp_path, signer):
    target = tmp_path / "sparse.edgekit"
    with target.open("wb") as file:
        file.truncate(5 << 30)
    assert refusal(target, signer).code == "bundle.malformed"


def test_missing_file_and_folder(tmp_path, signer):
    for path in (tmp_path / "nope.edgekit", tmp_path):
        with pytest.raises(UsageError) as caught:
            verify_bundle(path, [signer.public_key])
        assert caught.value.code == "bundle.not_found"


def test_file_exchanged_after_the_check(bundle, signer):
    found = verify_bundle(bundle, [signer.public_key])
    data = bundle.read_bytes()
    at = data.index(b"weights")
    bundle.write_bytes(data[:at] + b"WEIGHTS" + data[at + 7 :])
    with pytest.raises(TrustError) as caught:
        found.blob(found.manifest.variants[0].model)
    assert caught.value.code == "bundle.digest_mismatch"


def test_unknown_blob_is_a_usage_error(bundle):
    with pytest.raises(UsageError):
        read_bundle(bundle).blob("sha256:" + "0" * 64)


def test_large_model_is_not_copied_into_memory(tmp_path, signer):
    model = random.Random(0).randbytes(24 << 20)
    path = tiny_bundle(tmp_path / "large.edgekit", signer, model=model)
    del model
    tracemalloc.start()
    verify_bundle(path, [signer.public_key])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20


@pytest.mark.parametrize(
    "change",
    [
        lambda m: replace_(m, blobs=m.blobs + m.blobs[:1]),
        lambda m: replace_(m, blobs=(replace_(m.blobs[0], path="../x"), *m.blobs[1:])),
        lambda m: replace_(m, blobs=(replace_(m.blobs[0], path="/x"), *m.blobs[1:])),
        lambda m: replace_(m, blobs=(replace_(m.blobs[0], path=m.blobs[1].path), *m.blobs[1:])),
        lambda m: replace_(m, variants=()),
        lambda m: replace_(m, variants=(replace_(m.variants[0], model="sha256:" + "0" * 64),)),
        lambda m: replace_(m, variants=(replace_(m.variants[0], golden=m.variants[0].model),)),
    ],
)
def test_manifest_that_contradicts_itself(bundle, change):
    manifest = read_bundle(bundle).manifest
    with pytest.raises(ArtifactError) as caught:
        parse_manifest(encode_json(change(manifest)))
    assert caught.value.code == "manifest.malformed"


def replace_(record, **changes):
    return msgspec.structs.replace(record, **changes)


def test_manifest_with_a_field_from_the_future_is_read(bundle):
    data = read_bundle(bundle).manifest_bytes
    record = json.loads(data) | {"encrypted_for": ["device-1"]}
    newer = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
    assert parse_manifest(newer).name == "kws"


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1}',
        b'{\n  "a": 1\n}',
        b'{\n  "a": 1,\n  "a": 1\n}\n',
        b'{\n  "a": 1.50\n}\n',
        b'{\n  "\\u0061": 1\n}\n',
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{\n  "a": 1e5\n}\n',
        b'{\n  "a": 1e400\n}\n',
    ],
)
def test_json_that_is_not_canonical(text):
    assert not is_canonical_json(text)


SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)


@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_canonical_json_round_trip(value):
    assert is_canonical_json(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def test_write_bundle_refuses_wrong_blobs(bundle, signer, tmp_path):
    found = read_bundle(bundle)
    blobs = {ref.digest: found.blob(ref.digest) for ref in found.manifest.blobs}
    first = next(iter(blobs))
    for wrong, code in (
        ({**blobs, first: b"x"}, "bundle.digest_mismatch"),
        ({k: v for k, v in blobs.items() if k != first}, "bundle.missing_blob"),
        ({**blobs, "sha256:" + "0" * 64: b""}, "bundle.missing_blob"),
    ):
        out = tmp_path / "out.edgekit"
        with pytest.raises(ArtifactError) as caught:
            write_bundle(found.manifest, wrong, signer=signer, out=out)
        assert caught.value.code == code
        assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kws.edgekit"]


def test_perturbed_model_with_old_golden_samples_can_be_packed(bundle, signer, tmp_path):
    """What the demonstration does: correct digests and signature, wrong weights."""
    found = read_bundle(bundle)
    old, broken = found.manifest.variants[0].model, b"broken" * 60
    refs = tuple(
        replace_(ref, digest=digest_bytes(broken), size_bytes=len(broken)) if ref.digest == old else ref
        for ref in found.manifest.blobs
    )
    manifest = replace_(
        found.manifest, blobs=refs, variants=(replace_(found.manifest.variants[0], model=digest_bytes(broken)),)
    )
    blobs = {r.digest: found.blob(r.digest) for r in found.manifest.blobs if r.digest != old} | {digest_bytes(broken): broken}
    path = write_bundle(manifest, blobs, signer=signer, out=tmp_path / "broken.edgekit")
    assert verify_bundle(path, [signer.public_key]).blob(digest_bytes(broken)) == broken


def test_bundle_is_frozen(bundle):
    found = read_bundle(bundle)
    assert replace(found, is_verified=True).manifest is found.manifest
    assert found.manifest.created_at == BORN
