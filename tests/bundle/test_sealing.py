"""Sealed blobs: who can open what, and that nothing else gets through."""

from __future__ import annotations

import errno
import resource
import sys
import tracemalloc

import msgspec
import pytest
from releases import BORN, candidate_folder, linear_model, tiny_bundle

from edgekit.bundle.opening import content_of, find_identities, load_identities, open_sealed, opened_variant
from edgekit.bundle.reader import parse_manifest, read_bundle, verify_bundle
from edgekit.bundle.sealing import make_identity, read_recipients, seal_models
from edgekit.bundle.writer import Draft, draft_bundle, write_bundle
from edgekit.cli.bundle import _open
from edgekit.cli.main import main
from edgekit.errors import ArtifactError, DeviceError, EdgekitError, EnvironmentFault, UsageError
from edgekit.schema.base import encode_json
from edgekit.schema.digest import digest_bytes, digest_file
from edgekit.schema.manifest import BlobRef, Sealed
from edgekit.trust.signer import generate_signer

MODEL = b"weights" * 50


class Key:
    """An identity file with its recipient."""

    def __init__(self, folder, name):
        self.private, self.public = folder / f"{name}.age", folder / f"{name}.age.pub"
        self.recipient = make_identity(self.private, self.public)

    @property
    def secret(self):
        return self.private.read_text().splitlines()[-1]

    def load(self):
        return load_identities(self.private)


@pytest.fixture(scope="module")
def signer():
    return generate_signer()


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    return Key(tmp_path_factory.mktemp("keys"), "device")


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    return Key(tmp_path_factory.mktemp("keys"), "group")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return Key(tmp_path_factory.mktemp("keys"), "stranger")


def draft_of(path, signer) -> Draft:
    """The draft behind a tiny bundle."""
    bundle = read_bundle(tiny_bundle(path, signer, model=MODEL))
    return Draft(bundle.manifest, {ref.digest: bundle.blob(ref.digest) for ref in bundle.manifest.blobs})


@pytest.fixture
def sealed(tmp_path, signer, device, group):
    return seal_models(draft_of(tmp_path / "plain.edgekit", signer), [device.recipient, group.recipient])


def sealed_model(draft, folder):
    """The sealed model of a draft, as a file with its reference."""
    ref = next(ref for ref in draft.manifest.blobs if ref.role == "model")
    path = folder / "sealed"
    content = draft.blobs[ref.digest]
    path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return path, ref


def refusal(call, *arguments) -> EdgekitError:
    with pytest.raises(EdgekitError) as caught:
        call(*arguments)
    return caught.value


def test_sealed_bundle_opens_for_each_recipient(tmp_path, signer, sealed, device, group):
    path = write_bundle(sealed.manifest, sealed.blobs, signer=signer, out=tmp_path / "sealed.edgekit")
    bundle = verify_bundle(path, [signer.public_key])
    assert MODEL not in path.read_bytes()
    variant = bundle.manifest.variants[0]
    by_digest = {ref.digest: ref for ref in bundle.manifest.blobs}
    assert {by_digest[variant.model].path, by_digest[variant.golden].path} == {"model.onnx.age", "golden.msgpack.age"}
    opened = opened_variant(bundle.manifest, variant)
    assert opened.model == digest_bytes(MODEL)
    for number, key in enumerate((device, group)):
        for digest, content in ((variant.model, opened.model), (variant.golden, opened.golden)):
            part, target = tmp_path / f"part{number}", tmp_path / f"{number}{content[-8:]}"
            part.write_bytes(bundle.blob(digest))
            open_sealed(part, target, by_digest[digest], key.load())
            assert digest_file(target) == content
            assert target.stat().st_mode & 0o777 == 0o600


def test_evidence_stays_readable(tmp_path, signer, device):
    draft = draft_bundle(candidate_folder(tmp_path / "out"), name="kws", version="1.0", open_session=_open, created_at=BORN)
    folder = tmp_path / "sealed"
    folder.mkdir()
    sealed = seal_models(draft, [device.recipient], folder=folder)
    assert {ref.role: ref.sealed is not None for ref in sealed.manifest.blobs} == {
        "model": True,
        "golden": True,
        "candidate": False,
        "report": False,
    }
    assert sealed.manifest.candidate == draft.manifest.candidate
    out = write_bundle(sealed.manifest, sealed.blobs, signer=signer, out=tmp_path / "b.edgekit").read_bytes()
    golden = draft.blobs[draft.manifest.variants[0].golden]
    assert linear_model() not in out
    assert golden not in out
    assert b"msgpack" in out  # the names are in the manifest, so this look into the bytes finds what is there


def test_not_a_recipient_refused_before_and_while_opening(tmp_path, sealed, stranger, device):
    part, ref = sealed_model(sealed, tmp_path)
    early = refusal(lambda: find_identities([ref], str(stranger.private), name="kws@1"))
    late = refusal(open_sealed, part, tmp_path / "out", ref, stranger.load())
    assert (early.code, late.code) == ("device.sealed_not_recipient",) * 2
    assert not (tmp_path / "out").exists()
    assert find_identities([ref], str(device.private), name="kws@1").recipients == (device.recipient,)
    assert find_identities([content_of(ref)], "", name="kws@1") is None


def test_no_identity_refused(sealed, tmp_path):
    refs = sealed.manifest.blobs
    assert refusal(lambda: find_identities(refs, "", name="kws@1")).code == "device.sealed_no_identity"
    gone = refusal(lambda: find_identities(refs, str(tmp_path / "gone"), name="kws@1"))
    assert gone.code == "device.sealed_no_identity"


def test_every_flipped_byte_refused(tmp_path, sealed, device):
    part, ref = sealed_model(sealed, tmp_path)
    good, identities, target = part.read_bytes(), device.load(), tmp_path / "out"
    codes = set()
    for place in range(len(good)):
        flipped = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
        part.write_bytes(flipped)
        signed = msgspec.structs.replace(ref, digest=digest_bytes(flipped))  # a publisher who packed damaged bytes
        codes.add(refusal(open_sealed, part, target, signed, identities).code)
        assert not target.exists()
    assert codes <= {"bundle.sealed_damaged", "device.sealed_not_recipient"}
    assert "bundle.sealed_damaged" in codes


@pytest.mark.parametrize("length", [0, 10, 200, -17, -1])
def test_cut_off_blob_refused(tmp_path, sealed, device, length):
    part, ref = sealed_model(sealed, tmp_path)
    cut = part.read_bytes()[:length]
    part.write_bytes(cut)
    signed = msgspec.structs.replace(ref, digest=digest_bytes(cut))
    assert refusal(open_sealed, part, tmp_path / "out", signed, device.load()).code == "bundle.sealed_damaged"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"digest": digest_bytes(b"other")}, {"size_bytes": 349}, {"size_bytes": 351}])
def test_other_content_than_promised_refused(tmp_path, sealed, device, change):
    part, ref = sealed_model(sealed, tmp_path)
    ref = msgspec.structs.replace(ref, sealed=msgspec.structs.replace(ref.sealed, **change))
    error = refusal(open_sealed, part, tmp_path / "out", ref, device.load())
    assert (type(error), error.code) == (ArtifactError, "bundle.sealed_damaged")
    assert not (tmp_path / "out").exists()


def test_part_that_rotted_on_this_disk_is_not_the_publishers_fault(tmp_path, sealed, device):
    part, ref = sealed_model(sealed, tmp_path)
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    error = refusal(open_sealed, part, tmp_path / "out", ref, device.load())
    assert (type(error), error.code) == (DeviceError, "slot.damaged")


def test_disk_that_refuses_is_named_and_leaves_nothing(tmp_path, signer, device):
    content = tmp_path / "content"
    content.write_bytes(bytes(6 << 20))
    draft = draft_of(tmp_path / "plain.edgekit", signer)
    ref = BlobRef(path="m", role="model", digest=digest_file(content), size_bytes=6 << 20)
    variant = msgspec.structs.replace(draft.manifest.variants[0], model=ref.digest)
    manifest = msgspec.structs.replace(draft.manifest, blobs=(ref, draft.manifest.blobs[1]), variants=(variant,))
    sealed = seal_models(Draft(manifest, {**draft.blobs, ref.digest: content}), [device.recipient])
    part, ref = sealed_model(sealed, tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, before[1]))
    try:
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is looked at
            open_sealed(part, tmp_path / "out", ref, device.load())
        less = msgspec.structs.replace(ref, sealed=msgspec.structs.replace(ref.sealed, size_bytes=100))
        longer = refusal(open_sealed, part, tmp_path / "out", less, device.load())  # stopped before the disk refuses
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert longer.code == "bundle.sealed_damaged"
    assert not (tmp_path / "out").exists()


def test_memory_stays_bounded(tmp_path, signer, device):
    size = 48 << 20
    content = tmp_path / "content"
    with content.open("wb") as file:
        file.truncate(size)
    draft = draft_of(tmp_path / "plain.edgekit", signer)
    ref = BlobRef(path="m", role="model", digest=digest_file(content), size_bytes=size)
    variant = msgspec.structs.replace(draft.manifest.variants[0], model=ref.digest)
    manifest = msgspec.structs.replace(draft.manifest, blobs=(ref, draft.manifest.blobs[1]), variants=(variant,))
    tracemalloc.start()
    try:
        sealed = seal_models(Draft(manifest, {**draft.blobs, ref.digest: content}), [device.recipient], folder=tmp_path)
        ref = next(ref for ref in sealed.manifest.blobs if ref.role == "model")
        open_sealed(sealed.blobs[ref.digest], tmp_path / "out", ref, device.load())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out").stat().st_size == size
    assert peak < 8 << 20


def test_identity_that_others_can_read_refused(tmp_path, device):
    copy = tmp_path / "copy.age"
    copy.write_text(device.private.read_text())
    copy.chmod(0o640)
    error = refusal(load_identities, copy)
    assert error.code == "device.sealed_identity"
    assert "0640" in error.message


def test_key_material_is_in_no_message(tmp_path, device):
    path = tmp_path / "broken.age"
    path.touch(mode=0o600)
    path.write_text(device.secret[:-1] + "B\n")
    errors = [
        refusal(load_identities, path),
        refusal(lambda: seal_models(Draft(None, {}), [device.secret])),
        refusal(lambda: seal_models(Draft(None, {}), [device.secret.lower()])),
    ]
    assert [error.code for error in errors] == ["device.sealed_identity", "sealing.recipient", "sealing.recipient"]
    for error in errors:
        assert device.secret[20:40].upper() not in f"{error.message} {error.hint} {error!r}".upper()
    assert device.secret not in repr(device.load())


def test_file_with_several_identities_opens_what_any_of_them_can(tmp_path, sealed, stranger, group):
    both = tmp_path / "both.age"
    both.touch(mode=0o600)
    both.write_text(stranger.private.read_text() + "\n# the group's\n" + group.private.read_text())
    part, ref = sealed_model(sealed, tmp_path)
    identities = find_identities([ref], str(both), name="kws@1")
    open_sealed(part, tmp_path / "out", ref, identities)
    assert (tmp_path / "out").read_bytes() == MODEL


def test_missing_library_named(tmp_path, sealed, device, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyrage", None)
    opening = refusal(lambda: find_identities(sealed.manifest.blobs, str(device.private), name="kws@1"))
    assert (type(opening), opening.code) == (DeviceError, "device.sealed_no_library")
    assert "edgekit[sealed]" in opening.hint
    sealing = refusal(lambda: seal_models(sealed, [device.recipient]))
    assert (type(sealing), sealing.code) == (EnvironmentFault, "pyrage.missing")


def test_recipients_from_file_and_each_once(tmp_path, sealed, device, group, signer):
    file = tmp_path / "line-3.txt"
    file.write_text(f"# line 3\n{device.recipient}\n\n{group.recipient}\n{device.recipient}\n")
    names = read_recipients([f"@{file}", group.recipient])
    made = seal_models(draft_of(tmp_path / "p.edgekit", signer), names)
    assert {ref.sealed.recipients for ref in made.manifest.blobs} == {(device.recipient, group.recipient)}
    file.write_text("# nobody\n")
    assert refusal(read_recipients, [f"@{file}"]).code == "sealing.recipient"
    gone = refusal(read_recipients, ["@/gone"])
    assert (type(gone), gone.code) == (UsageError, "sealing.recipient")


def test_sealing_nobody_or_twice_refused(tmp_path, sealed, signer, device):
    draft = draft_of(tmp_path / "p.edgekit", signer)
    assert refusal(seal_models, draft, []).code == "sealing.recipient"
    assert refusal(seal_models, draft, ["age1nonsense"]).code == "sealing.recipient"
    assert refusal(seal_models, sealed, [device.recipient]).code == "sealing.twice"


def test_manifest_that_seals_wrongly_refused(sealed):
    manifest = sealed.manifest
    model, golden = manifest.blobs

    def fault(*blobs):
        error = refusal(parse_manifest, encode_json(msgspec.structs.replace(manifest, blobs=blobs)))
        assert error.code == "manifest.malformed"
        return error.message

    def how(ref, **change):
        return msgspec.structs.replace(ref, sealed=msgspec.structs.replace(ref.sealed, **change))

    evidence = BlobRef(
        path="candidate.json",
        role="candidate",
        digest=digest_bytes(b"c"),
        size_bytes=1,
        sealed=Sealed(digest=digest_bytes(b"d"), size_bytes=1, recipients=("age1",)),
    )
    assert "not allowed" in fault(model, golden, evidence)
    assert "not allowed" in fault(how(model, recipients=()), golden)
    assert "twice" in fault(model, how(golden, digest=model.sealed.digest))
    leaked = BlobRef(path="leak", role="report", digest=model.sealed.digest, size_bytes=1)
    assert "open" in fault(model, golden, leaked)


def test_pack_sealed_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    candidate_folder(tmp_path / "out")
    assert main(["bundle", "keygen", "--out", "publisher"]) == 0
    assert main(["bundle", "keygen", "--scheme", "age", "--out", "cam"]) == 0
    printed = capsys.readouterr()
    recipient = (tmp_path / "cam.age.pub").read_text().strip()
    assert printed.out.splitlines()[-1] == recipient
    assert "AGE-SECRET-KEY" not in printed.out + printed.err
    assert (tmp_path / "cam.age").stat().st_mode & 0o777 == 0o600
    assert main(["bundle", "keygen", "--scheme", "age", "--out", "cam.age"]) == 2
    arguments = ["bundle", "pack", "out", "--name", "kws", "--version", "1.0", "--key", "publisher.pem"]
    assert main([*arguments, "--recipient", "@cam.age.pub"]) == 0
    assert main([*arguments, "--recipient", "age1x"]) == 2
    capsys.readouterr()
    assert main(["bundle", "verify", "kws-1.0.edgekit", "--key", "publisher.pub"]) == 0
    assert main(["bundle", "inspect", "kws-1.0.edgekit"]) == 0
    shown = capsys.readouterr().out
    assert f"for {recipient}" in shown
    assert "model.onnx.age" in shown
    assert linear_model() not in (tmp_path / "kws-1.0.edgekit").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cam.age",
        "cam.age.pub",
        "kws-1.0.edgekit",
        "out",
        "publisher.pem",
        "publisher.pub",
    ]
