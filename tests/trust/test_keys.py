from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import TrustError, UsageError
from edgekit.trust.dsse import Envelope, EnvelopeSignature, decode_envelope, encode_envelope, valid_keys, verify_envelope
from edgekit.trust.keys import PublicKey, load_public_key, load_public_keys, parse_public_key, save_public_key
from edgekit.trust.signer import generate_signer, load_signer, save_signer, sign_envelope

KIND = "application/vnd.test"


@pytest.fixture
def signer():
    return generate_signer()


def test_keyid_is_that_of_securesystemslib(signer):
    assert signer.tuf_signer().public_key.keyid == signer.keyid


@pytest.mark.parametrize("form", ["pem", "json"])
def test_public_key_file_round_trip(signer, tmp_path, form):
    path = tmp_path / "k.pub"
    if form == "pem":
        save_public_key(signer.public_key, path)
    else:
        path.write_text(json.dumps(signer.tuf_signer().public_key.to_dict() | {"keyid": signer.keyid}))
    assert load_public_key(path) == signer.public_key


def test_pem_is_the_one_of_cryptography(signer):
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    assert load_pem_public_key(signer.public_key.to_pem().encode()).public_bytes_raw() == signer.public_key.public


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "key.malformed"),
        ("-----BEGIN PUBLIC KEY-----\n!!\n-----END PUBLIC KEY-----", "key.malformed"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "key.malformed"),
        ('{"keytype":"rsa","scheme":"rsa","keyval":{"public":"' + "00" * 32 + '"}}', "key.malformed"),
        ('{"keytype":"ed25519","scheme":"ed25519","keyval":{"public":"00"}}', "key.malformed"),
        ('{"keyid":"ab","keytype":"ed25519","scheme":"ed25519","keyval":{"public":"' + "00" * 32 + '"}}', "key.malformed"),
        ("-----BEGIN PRIVATE KEY-----\n", "key.private"),
    ],
)
def test_public_key_malformed(text, code):
    with pytest.raises(UsageError) as caught:
        parse_public_key(text, name="k.pub")
    assert caught.value.code == code
    assert "k.pub" in caught.value.message


@given(st.text(max_size=200))
def test_public_key_text_raises_our_errors_only(text):
    with pytest.raises(UsageError):
        parse_public_key(text)


def test_missing_public_key_names_the_file(tmp_path):
    with pytest.raises(UsageError, match=r"nope\.pub"):
        load_public_key(tmp_path / "nope.pub")


def test_same_material_in_two_files_counts_once(signer, tmp_path):
    for name in ("a.pub", "b.pub"):
        save_public_key(signer.public_key, tmp_path / name)
    assert load_public_keys(tmp_path) == (signer.public_key,)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_private_key_is_created_0600(signer, tmp_path, umask, monkeypatch):
    modes = []
    real = os.open

    def spy(path, flags, mode=0o777, **kwargs):
        descriptor = real(path, flags, mode, **kwargs)
        if flags & os.O_CREAT:
            modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", spy)
    before = os.umask(umask)
    try:
        save_signer(signer, tmp_path / "k.pem")
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert stat.S_IMODE((tmp_path / "k.pem").stat().st_mode) == 0o600
    assert load_signer(tmp_path / "k.pem").keyid == signer.keyid


def test_private_key_is_never_replaced(signer, tmp_path):
    save_signer(signer, tmp_path / "k.pem")
    with pytest.raises(UsageError) as caught:
        save_signer(generate_signer(), tmp_path / "k.pem")
    assert caught.value.code == "key.exists"
    assert load_signer(tmp_path / "k.pem").keyid == signer.keyid


def test_private_key_that_cannot_be_written_leaves_no_file(signer, tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError) as caught:
        save_signer(signer, tmp_path / "k.pem")
    assert caught.value.code == "key.unwritable"
    assert list(tmp_path.iterdir()) == []


def test_private_key_is_not_written_through_a_dangling_link(signer, tmp_path):
    (tmp_path / "k.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError):
        save_signer(signer, tmp_path / "k.pem")
    assert not (tmp_path / "elsewhere").exists()


def test_public_key_is_not_taken_for_a_private_one(signer, tmp_path):
    save_public_key(signer.public_key, tmp_path / "k.pub")
    with pytest.raises(UsageError) as caught:
        load_signer(tmp_path / "k.pub")
    assert caught.value.code == "key.public"
    assert ".pem" in caught.value.hint


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_private_key_readable_by_others(signer, tmp_path, mode):
    save_signer(signer, tmp_path / "k.pem")
    (tmp_path / "k.pem").chmod(mode)
    with pytest.raises(UsageError) as caught:
        load_signer(tmp_path / "k.pem")
    assert caught.value.code == "key.mode"
    assert "chmod 600" in caught.value.hint


def test_private_key_with_passphrase(signer, tmp_path, monkeypatch):
    path = tmp_path / "k.pem"
    monkeypatch.setenv("EDGEKIT_KEY_PASSPHRASE", "correct horse")
    save_signer(signer, path)
    assert b"ENCRYPTED" in path.read_bytes()
    assert load_signer(path).keyid == signer.keyid
    for wrong in ("", "battery staple"):
        monkeypatch.setenv("EDGEKIT_KEY_PASSPHRASE", wrong)
        with pytest.raises(UsageError) as caught:
            load_signer(path)
        assert caught.value.code == "key.passphrase"


@pytest.mark.parametrize("data", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", b"\xff" * 50])
def test_private_key_malformed(tmp_path, data):
    path = tmp_path / "k.pem"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(UsageError) as caught:
        load_signer(path)
    assert caught.value.code == "key.malformed"


def test_signer_does_not_show_its_key(signer):
    assert signer.to_pem().decode().splitlines()[1] not in repr(signer)


def test_envelope_verifies_and_agrees_with_securesystemslib(signer):
    from securesystemslib.dsse import Envelope as Theirs

    data = sign_envelope(b"payload", [signer], payload_type=KIND)
    assert verify_envelope(data, [signer.public_key], payload_type=KIND) == b"payload"
    theirs = Theirs.from_dict(json.loads(data))
    assert theirs.verify([signer.tuf_signer().public_key], 1)


def test_envelope_of_another_type_or_key(signer):
    data = sign_envelope(b"payload", [signer], payload_type=KIND)
    with pytest.raises(TrustError) as caught:
        verify_envelope(data, [signer.public_key], payload_type="application/other")
    assert caught.value.code == "trust.payload_type"
    with pytest.raises(TrustError) as caught:
        verify_envelope(data, [generate_signer().public_key], payload_type=KIND)
    assert caught.value.code == "trust.signature"


def test_threshold_counts_key_material_once(signer):
    data = sign_envelope(b"payload", [signer, signer], payload_type=KIND)
    with pytest.raises(TrustError):
        verify_envelope(data, [signer.public_key, PublicKey(signer.public_key.public)], payload_type=KIND, threshold=2)
    envelope = decode_envelope(data)
    twice = Envelope(payload_type=KIND, payload=b"payload", signatures=envelope.signatures * 2)
    with pytest.raises(TrustError):
        verify_envelope(encode_envelope(twice), [signer.public_key] * 2, payload_type=KIND, threshold=2)
    second = generate_signer()
    both = sign_envelope(b"payload", [signer, second], payload_type=KIND)
    assert verify_envelope(both, [signer.public_key, second.public_key], payload_type=KIND, threshold=2) == b"payload"


def test_signature_renamed_to_a_trusted_keyid(signer):
    mallory = generate_signer()
    envelope = decode_envelope(sign_envelope(b"payload", [mallory], payload_type=KIND))
    forged = EnvelopeSignature(keyid=signer.keyid, sig=envelope.signatures[0].sig)
    renamed = Envelope(payload_type=KIND, payload=b"payload", signatures=(forged,))
    assert valid_keys(renamed, [signer.public_key]) == ()


def test_every_flipped_byte_of_an_envelope_is_refused(signer):
    data = sign_envelope(b"payload", [signer], payload_type=KIND)
    from edgekit.errors import EdgekitError

    for index in range(len(data)):
        flipped = data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]
        with pytest.raises(EdgekitError):
            verify_envelope(flipped, [signer.public_key], payload_type=KIND)


WITHOUT_CRYPTOGRAPHY = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cryptography":
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
from pathlib import Path
from edgekit.trust.dsse import verify_envelope
from edgekit.trust.keys import load_public_key
data, key = Path(sys.argv[1]).read_bytes(), load_public_key(Path(sys.argv[2]))
print(verify_envelope(data, [key], payload_type="application/vnd.test").decode())
try:
    verify_envelope(data.replace(b"cGF5", b"cGF6"), [key], payload_type="application/vnd.test")
except Exception as error:
    print(error.code)
assert "cryptography" not in sys.modules
"""


def test_envelope_verifies_without_cryptography(signer, tmp_path):
    (tmp_path / "e.json").write_bytes(sign_envelope(b"payload", [signer], payload_type=KIND))
    save_public_key(signer.public_key, tmp_path / "k.pub")
    command = [sys.executable, "-c", WITHOUT_CRYPTOGRAPHY, str(tmp_path / "e.json"), str(tmp_path / "k.pub")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["payload", "trust.signature"], done.stderr


def test_keys_and_envelopes_load_no_cryptography():
    code = "import sys, edgekit.trust.dsse, edgekit.bundle.reader, edgekit.bundle.golden\n"
    code += "print([m for m in ('cryptography', 'tuf', 'securesystemslib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
