"""A device against whoever delivers its desired state: each refusal with the attack that it stops."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import ArtifactError, TrustError, UsageError
from edgekit.schema.base import encode_json
from edgekit.schema.desired import DESIRED_MEDIA_TYPE, MAX_JITTER_S, DesiredModel, DesiredState, UpdatePolicy
from edgekit.schema.digest import digest_bytes
from edgekit.schema.release import Release, ReleaseInfo
from edgekit.trust.desired import MAX_AHEAD, MAX_DESIRED_BYTES, select_release, verify_desired
from edgekit.trust.desired_signer import sign_desired
from edgekit.trust.dsse import EnvelopeSignature, decode_envelope, encode_envelope, signed_bytes
from edgekit.trust.keys import PublicKey
from edgekit.trust.signer import generate_signer, sign_envelope

NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
DIGEST = digest_bytes(b"manifest 7")
STATE = DesiredState(
    device="cam-7",
    seq=42,
    issued_at=NOW - timedelta(minutes=1),
    expires_at=NOW + timedelta(days=1),
    models={"kws": DesiredModel(counter=7, manifest=DIGEST)},
)
DIRECTOR, SECOND, STRANGER = generate_signer(), generate_signer(), generate_signer()


def changed(**fields):
    return msgspec.structs.replace(STATE, **fields)


def verify(data, *, keys=(DIRECTOR,), device="cam-7", last_seq=41, now=NOW, threshold=1):
    trusted = [key.public_key for key in keys]
    return verify_desired(data, trusted, device=device, last_seq=last_seq, now=now, threshold=threshold)


def refusal(data, kind=TrustError, **how):
    with pytest.raises(kind) as caught:
        verify(data, **how)
    return caught.value.code


def signed(state=STATE, *signers):
    return sign_desired(state, signers or (DIRECTOR,))


def signed_text(text, *, payload_type=DESIRED_MEDIA_TYPE):
    """What a director signs that does not go through this project's own signing."""
    return sign_envelope(text, [DIRECTOR], payload_type=payload_type)


def test_desired_state_that_was_signed_comes_back_equal():
    policy = UpdatePolicy(not_before=NOW, jitter_s=600.0, is_metered=True, is_full_allowed=False)
    assert verify(signed(changed(policy=policy))) == changed(policy=policy)


SIGNED = signed()


@given(position=st.integers(0, len(SIGNED) - 1), flip=st.integers(1, 255))
def test_one_flipped_byte_never_verifies(position, flip):
    data = bytearray(SIGNED)
    data[position] ^= flip
    with pytest.raises((ArtifactError, TrustError)):
        verify(bytes(data))


@pytest.mark.parametrize("length", [0, 1, 100, len(SIGNED) - 1])
def test_envelope_cut_off(length):
    assert refusal(SIGNED[:length], ArtifactError) == "envelope.malformed"


def test_bytes_appended_to_the_envelope():
    assert refusal(SIGNED + b"\n", ArtifactError) == "envelope.malformed"


@pytest.mark.fault("F17")
def test_signed_by_a_stranger():
    assert refusal(signed(STATE, STRANGER)) == "trust.signature"


def test_stranger_who_calls_himself_the_director():
    envelope = decode_envelope(SIGNED)
    forged = STRANGER.sign(signed_bytes(envelope.payload, envelope.payload_type))
    claim = EnvelopeSignature(keyid=DIRECTOR.keyid, sig=forged)
    assert refusal(encode_envelope(msgspec.structs.replace(envelope, signatures=(claim,)))) == "trust.signature"


def test_no_signature_at_all():
    assert refusal(encode_envelope(msgspec.structs.replace(decode_envelope(SIGNED), signatures=()))) == "trust.signature"


def test_no_trusted_key():
    assert refusal(SIGNED, keys=()) == "trust.signature"


def test_payload_exchanged_under_the_signatures():
    other = encode_json(changed(models={"kws": DesiredModel(counter=8, manifest=digest_bytes(b"other"))}))
    assert refusal(encode_envelope(msgspec.structs.replace(decode_envelope(SIGNED), payload=other))) == "trust.signature"


def test_envelope_of_another_purpose_by_the_same_key():
    kind = "application/vnd.edgekit.manifest.v1+json"
    assert refusal(signed_text(encode_json(STATE), payload_type=kind)) == "trust.payload_type"


def test_envelope_relabelled_as_a_desired_state():
    envelope = decode_envelope(signed_text(encode_json(STATE), payload_type="application/vnd.edgekit.manifest.v1+json"))
    relabelled = msgspec.structs.replace(envelope, payload_type=DESIRED_MEDIA_TYPE)
    assert refusal(encode_envelope(relabelled)) == "trust.signature"


@pytest.mark.fault("F17")
def test_one_of_two_needed_keys():
    both = (DIRECTOR, SECOND)
    assert refusal(SIGNED, keys=both, threshold=2) == "trust.signature"
    assert verify(signed(STATE, *both), keys=both, threshold=2) == STATE


@pytest.mark.fault("F17")
def test_one_key_that_signed_twice_is_one_key():
    envelope = decode_envelope(SIGNED)
    twice = encode_envelope(msgspec.structs.replace(envelope, signatures=envelope.signatures * 2))
    assert refusal(twice, keys=(DIRECTOR, SECOND), threshold=2) == "trust.signature"


def test_one_key_that_is_listed_twice_is_one_key():
    again = PublicKey(bytes(DIRECTOR.public_key.public))
    with pytest.raises(TrustError) as caught:
        verify_desired(SIGNED, [DIRECTOR.public_key, again], device="cam-7", last_seq=0, now=NOW, threshold=2)
    assert caught.value.code == "trust.signature"


@pytest.mark.fault("F17")
def test_other_devices_desired_state_delivered_here():
    assert refusal(signed(changed(device="cam-8"))) == "desired.other_device"


@pytest.mark.parametrize("device", ["cam-7 ", "CAM-7", "cam-\uff17", "", "cam-7\x00"])
def test_name_that_looks_like_this_devices(device):
    assert refusal(signed(changed(device=device))) == "desired.other_device"


@pytest.mark.fault("F17")
def test_same_one_delivered_again():
    assert refusal(SIGNED, last_seq=42) == "desired.replayed"


@pytest.mark.fault("F17")
def test_older_one_delivered_after_a_newer():
    assert refusal(SIGNED, last_seq=43) == "desired.replayed"
    assert verify(SIGNED, last_seq=41).seq == 42


@pytest.mark.fault("F17")
def test_expired_from_the_moment_on():
    assert refusal(SIGNED, now=STATE.expires_at) == "desired.expired"
    assert verify(SIGNED, now=STATE.expires_at - timedelta(microseconds=1)) == STATE


def test_expiry_in_another_zone_is_the_same_moment():
    late = changed(expires_at=(NOW + timedelta(hours=1)).astimezone(timezone(timedelta(hours=14))))
    assert refusal(signed(late), now=NOW + timedelta(hours=2)) == "desired.expired"
    assert verify(signed(late), now=NOW + timedelta(minutes=59)).expires_at == late.expires_at


def test_clock_behind_the_issue_by_more_than_the_tolerance():
    assert refusal(SIGNED, now=STATE.issued_at - MAX_AHEAD - timedelta(seconds=1)) == "desired.from_future"
    assert verify(SIGNED, now=STATE.issued_at - MAX_AHEAD) == STATE


def test_clock_at_its_first_day():
    assert refusal(SIGNED, now=datetime(1970, 1, 1, tzinfo=UTC)) == "desired.from_future"


def test_envelope_larger_than_the_bound():
    assert refusal(SIGNED + b" " * (MAX_DESIRED_BYTES - len(SIGNED) + 1), ArtifactError) == "desired.too_large"
    assert refusal(SIGNED + b" " * (MAX_DESIRED_BYTES - len(SIGNED)), ArtifactError) == "envelope.malformed"


TEXT = encode_json(STATE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"seq": 42', b'"seq":42'),
        (b'"seq": 42,', b'"seq": 1,\n  "seq": 42,'),
        (b'"seq": 42', b'"seq": 42.5'),
        (b'"seq": 42', b'"seq": -1'),
        (b'"seq": 42', b'"seq": 9007199254740992'),
        (b'"seq": 42', b'"seq": 1' + b"0" * 300),
        (b'"seq": 42', b'"seq": 1' + b"0" * 6000),
        (b'"seq": 42', b'"seq": "42"'),
        (b'"seq": 42', b'"seq": true'),
        (b'"counter": 7', b'"counter": 1' + b"0" * 40),
        (b'"kws"', b'"../kws"'),
        (b'"kws"', b'"KWS"'),
        (b"sha256:", b"sha512:"),
        (b'"cam-7"', b'"\\ud800"'),
        (b'"cam-7"', b'"\xed\xa0\x80"'),
        (b'11:59:00Z"', b'11:59:00"'),
        (b'12:00:00Z"', b'12:00:00"'),
        (b'"jitter_s": 0.0', b'"jitter_s": -1.0'),
        (b'"jitter_s": 0.0', b'"jitter_s": 604801.0'),
        (b'"jitter_s": 0.0', b'"jitter_s": 1e999'),
        (b'"jitter_s": 0.0', b'"jitter_s": NaN'),
        (b'"not_before": null', b'"not_before": "2026-11-01T12:00:00"'),
        (b"{", b"[" * 9000 + b"{"),
        (b"{", b""),
    ],
    ids=lambda part: part[:24].decode(errors="replace") if isinstance(part, bytes) else None,
)
def test_payload_that_the_director_signed_and_should_not_have(old, new):
    assert TEXT.count(old) >= 1
    data = signed_text(TEXT.replace(old, new, 1))
    assert refusal(data, ArtifactError) == "desired.malformed"


def test_payload_that_is_not_json():
    assert refusal(signed_text(b"\xff\xfe{}"), ArtifactError) == "desired.malformed"


def test_expiry_before_the_issue():
    data = signed_text(encode_json(changed(expires_at=STATE.issued_at)))
    assert refusal(data, ArtifactError) == "desired.malformed"


def test_times_at_the_edge_of_the_calendar():
    edge = changed(
        issued_at=datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14))),
        expires_at=datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone(timedelta(hours=-14))),
    )
    assert verify(signed(edge)) == edge
    assert refusal(signed(msgspec.structs.replace(edge, expires_at=edge.issued_at + timedelta(days=1)))) == "desired.expired"


def test_field_of_a_newer_version_is_passed_over():
    assert verify(signed_text(TEXT.replace(b'"seq": 42', b'"seq": 42,\n  "novel": "x"'))) == STATE


def test_callers_mistakes_are_not_verdicts():
    with pytest.raises(ValueError, match="aware"):
        verify(SIGNED, now=datetime(2026, 11, 1))  # noqa: DTZ001 - that is the mistake
    with pytest.raises(ValueError, match="threshold"):
        verify(SIGNED, threshold=0)


def release(counter, digest, *, name="kws", channel="production"):
    info = ReleaseInfo(
        name=name,
        version="1.0.0",
        channel=channel,
        counter=counter,
        published_at=NOW,
        installed_bytes=1,
        runtimes=("onnxruntime",),
    )
    return Release(info=info, manifest_path=f"models/{name}/1.0.0/manifest.json", manifest_digest=digest, manifest_size_bytes=1)


def test_release_that_is_named_is_selected_among_the_listed():
    listed = [release(6, digest_bytes(b"6")), release(7, DIGEST), release(8, digest_bytes(b"8"))]
    assert select_release(STATE, listed, "kws") is listed[1]


@pytest.mark.fault("F17")
@pytest.mark.parametrize(
    "listed",
    [
        [],
        [release(7, digest_bytes(b"another manifest"))],
        [release(8, DIGEST)],
        [release(7, DIGEST, name="kws2")],
    ],
    ids=["nothing", "other manifest", "other counter", "other model"],
)
def test_release_that_signed_metadata_does_not_list(listed):
    with pytest.raises(TrustError) as caught:
        select_release(STATE, listed, "kws")
    assert caught.value.code == "desired.unknown_release"


def test_model_that_the_desired_state_does_not_name():
    with pytest.raises(TrustError) as caught:
        select_release(STATE, [release(7, DIGEST, name="vision")], "vision")
    assert caught.value.code == "desired.no_model"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"seq": -1}, "desired.malformed"),
        ({"seq": 2**64}, "desired.malformed"),
        ({"expires_at": STATE.issued_at}, "desired.malformed"),
        ({"expires_at": datetime(2030, 1, 1)}, "desired.malformed"),  # noqa: DTZ001 - that is the mistake
        ({"policy": UpdatePolicy(jitter_s=MAX_JITTER_S + 1)}, "desired.malformed"),
        ({"models": {"No Model": DesiredModel(counter=1, manifest=DIGEST)}}, "desired.malformed"),
        ({"models": {f"m{i}": DesiredModel(counter=1, manifest=DIGEST) for i in range(500)}}, "desired.too_large"),
    ],
)
def test_signer_refuses_what_a_device_would_refuse(fields, code):
    with pytest.raises(UsageError) as caught:
        sign_desired(changed(**fields), [DIRECTOR])
    assert caught.value.code == code


def test_signer_without_a_key():
    with pytest.raises(UsageError) as caught:
        sign_desired(STATE, [])
    assert caught.value.code == "desired.unsigned"


def test_verifying_loads_no_private_keys():
    code = "import sys, edgekit.trust.desired; sys.exit('edgekit.trust.signer' in sys.modules or 'cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
