"""Requests and certificates without any package, against ``cryptography``."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.agent.certificates import make_request, read_certificates
from edgekit.errors import ArtifactError
from edgekit.trust import der
from edgekit.trust.p256 import PrivateKey, public_key_info


@settings(max_examples=15, deadline=None)
@given(name=st.from_regex(r"[a-z0-9][a-z0-9_-]{0,30}/[a-z0-9][a-z0-9_-]{0,30}", fullmatch=True))
def test_request_is_what_an_authority_takes(name):
    key = PrivateKey.generate()
    request = x509.load_pem_x509_csr(make_request(key, name).encode())
    assert request.is_signature_valid
    assert request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == name
    info = request.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert info == public_key_info(key.public)


def test_request_without_a_name_is_valid():
    request = x509.load_pem_x509_csr(make_request(PrivateKey.generate(), "").encode())
    assert request.is_signature_valid
    assert list(request.subject) == []


@pytest.mark.parametrize("end", [datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC), datetime(2061, 6, 7, tzinfo=UTC)])
def test_certificate_is_read_as_it_is(end):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "A"), x509.NameAttribute(NameOID.COMMON_NAME, "lab/cam-ü")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1 << 150)
        .not_valid_before(end - timedelta(days=400))
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM)
    first, second = read_certificates(b"key first\n" + pem + pem)
    assert first == second
    assert first.common_name == "lab/cam-ü"
    assert (first.not_before, first.not_after) == (made.not_valid_before_utc, made.not_valid_after_utc)
    assert first.fingerprint == f"sha256:{made.fingerprint(hashes.SHA256()).hex()}"
    assert first.raw == made.public_bytes(serialization.Encoding.DER)


@given(data=st.binary(min_size=1, max_size=200))
def test_other_bytes_are_refused(data):
    with pytest.raises(ArtifactError) as caught:
        read_certificates(der.to_pem(data, "CERTIFICATE"))
    assert caught.value.code == "certificate.malformed"


def test_file_without_a_certificate_has_none():
    assert read_certificates("") == ()
    assert read_certificates(PrivateKey.generate().to_pem()) == ()


def test_device_needs_no_package_for_its_certificate():
    code = "import sys, edgekit.agent.enrolment, edgekit.agent.renewal; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"cryptography", "asn1crypto", "urllib3", "tuf", "typer"} & set(loaded) == set()
