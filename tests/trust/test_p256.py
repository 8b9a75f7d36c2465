"""P-256 in plain Python against published vectors and against ``cryptography``."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import ArtifactError
from edgekit.trust.p256 import PrivateKey, public_key_info

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
SECRETS = st.one_of(st.integers(1, ORDER - 1), st.sampled_from([1, 2, 3, ORDER - 1, ORDER - 2, 1 << 255]))


def theirs(key: PrivateKey) -> ec.EllipticCurvePrivateKey:
    found = serialization.load_pem_private_key(key.to_pem().encode(), None)
    assert isinstance(found, ec.EllipticCurvePrivateKey)
    return found


@pytest.mark.parametrize(
    ("message", "r", "s"),
    [
        (
            b"sample",
            0xEFD48B2AACB6A8FD1140DD9CD45E81D69D2C877B56AAF991C34D0EA84EAF3716,
            0xF7CB1C942D657C41D436C7A1B6E29F65F3E900DBB9AFF4064DC4AB2F843ACDA8,
        ),
        (
            b"test",
            0xF1ABB023518351CD71D881567B1EA663ED3EFCF6C5132B354F28D3B0B7D38367,
            0x019F4113742A2B14BD25926B49C649155F267E60D3814B4C0CC84250E46F0083,
        ),
    ],
)
def test_signature_is_the_one_of_rfc_6979(message, r, s):
    key = PrivateKey(0xC9AFA9D845BA75166B5C215767B1D6934E50C3DB36E89B127B8A622B120F6721)
    assert decode_dss_signature(key.sign(message)) == (r, s)


@settings(max_examples=25, deadline=None)
@given(secret=SECRETS, message=st.binary(max_size=200))
def test_key_and_signature_are_what_openssl_takes(secret, message):
    key = PrivateKey(secret)
    other = theirs(key)
    numbers = other.public_key().public_numbers()
    assert key.public == (numbers.x, numbers.y)
    assert other.private_numbers().private_value == secret
    other.public_key().verify(key.sign(message), message, ec.ECDSA(hashes.SHA256()))
    info = other.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert public_key_info(key.public) == info


@settings(max_examples=15, deadline=None)
@given(secret=SECRETS)
def test_key_written_by_openssl_is_read(secret):
    made = ec.derive_private_key(secret, ec.SECP256R1())
    pem = made.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    assert PrivateKey.from_pem(pem) == PrivateKey(secret)
    assert PrivateKey.from_pem(PrivateKey(secret).to_pem()) == PrivateKey(secret)


def test_two_new_keys_differ_and_do_not_show_themselves():
    one, other = PrivateKey.generate(), PrivateKey.generate()
    assert one != other
    assert str(one.secret) not in repr(one)
    assert f"{one.secret:x}" not in repr(one)


def test_what_is_no_p256_key_is_refused():
    other_curve = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    good = PrivateKey.generate().to_pem()
    for bad in (
        "",
        "nothing",
        other_curve,
        good.replace("PRIVATE KEY", "PUBLIC KEY"),
        good[:80] + "\n-----END PRIVATE KEY-----",
    ):
        with pytest.raises(ArtifactError) as caught:
            PrivateKey.from_pem(bad)
        assert caught.value.code == "certificate.malformed"
