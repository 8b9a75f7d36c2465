"""TLS of the repository and of the fleet server: who gets in, and what changes while they run."""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime, timedelta

import pytest

from edgekit.errors import UsageError
from edgekit.fleet.config import FleetConfig
from edgekit.fleet.server import FleetServer
from edgekit.repository.server import RepositoryServer
from edgekit.trust.tls import ServerTls
from edgekit.trust.transport import Transport, TransportError, TransportOptions
from tests.agent.world import free_port


@pytest.fixture
def repository(fleet, tmp_path):
    root = tmp_path / "repository"
    (root / "metadata").mkdir(parents=True)
    (root / "metadata" / "timestamp.json").write_bytes(b"{}")
    cert, key = fleet.server_pair("repository")
    crl, clients = fleet.broker_dir / "crl.pem", tmp_path / "clients.pem"
    clients.write_text((fleet.authority.folder / "devices.pem").read_text() + fleet.authority.servers_pem)
    fleet.identity.publish_revocations()
    with RepositoryServer(root, "127.0.0.1", 0, cert=cert, key=key, client_ca=clients, crl=crl) as server:
        yield server


def fetch(fleet, server, cert=None, key=None) -> bytes | str:
    """What a client gets, or how it failed."""
    transport = Transport(
        TransportOptions(
            ca_file=str(fleet.authority.folder / "ca.pem"),
            client_cert_file=str(cert) if cert else None,
            client_key_file=str(key) if key else None,
        )
    )
    try:
        with transport.get(f"{server.url}/metadata/timestamp.json") as answer:
            return b"".join(answer.chunks(max_bytes=100))
    except TransportError as error:
        return error.fault
    finally:
        transport.close()


def test_blobs_are_for_devices_and_servers_with_a_certificate_of_the_fleet(fleet, repository):
    assert fetch(fleet, repository, fleet.pair()) == b"{}"
    assert fetch(fleet, repository, *fleet.server_pair("edgekit-fleet", is_client=True)) == b"{}"
    assert fetch(fleet, repository) in {"tls", "cut"}
    assert fetch(fleet, repository, *fleet.server_pair("no-client")) in {"tls", "cut"}


def test_revoked_device_gets_no_blob_from_the_next_connection_on(fleet, repository):
    pair, other = fleet.pair("lab", "cam-7"), fleet.pair("lab", "cam-8")
    assert fetch(fleet, repository, pair) == b"{}"
    fleet.identity.revoke("lab", "cam-7", reason="stolen", actor="operator")
    assert fetch(fleet, repository, pair) in {"tls", "cut"}
    assert fetch(fleet, repository, other) == b"{}"


def test_session_of_a_device_that_was_revoked_is_not_resumed(fleet, repository):
    pair = fleet.pair()
    context = ssl.create_default_context(cafile=str(fleet.authority.folder / "ca.pem"))
    context.load_cert_chain(pair)
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context.minimum_version = context.maximum_version = version
        session = None
        for _ in range(2):
            with (
                socket.create_connection(repository.server_address[:2]) as plain,
                context.wrap_socket(plain, server_hostname="localhost", session=session) as secured,
            ):
                secured.sendall(b"GET /metadata/timestamp.json HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                while secured.recv(4096):
                    pass
                session = secured.session
                assert not secured.session_reused


def test_renewed_certificate_of_the_server_is_shown_without_a_restart(fleet, repository):
    def shown() -> bytes | None:
        context = ssl.create_default_context(cafile=str(fleet.authority.folder / "ca.pem"))
        context.load_cert_chain(fleet.pair())
        with (
            socket.create_connection(repository.server_address[:2]) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secured,
        ):
            return secured.getpeercert(binary_form=True)

    before = shown()
    fleet.server_pair("repository")
    shown()  # the handshake that finds the new files may still show the old one
    assert shown() != before


def test_file_that_is_half_written_leaves_what_was_there(fleet, repository, caplog):
    pair = fleet.pair()
    crl = fleet.broker_dir / "crl.pem"
    whole = crl.read_bytes()
    crl.write_bytes(whole[:100])
    assert fetch(fleet, repository, pair) == b"{}"
    assert "event=tls_files_unusable" in caplog.text
    crl.write_bytes(whole)
    fleet.identity.revoke("lab", "cam-7", reason="stolen", actor="operator")
    assert fetch(fleet, repository, pair) in {"tls", "cut"}


def test_devices_authority_makes_no_server_that_a_device_believes(fleet, tmp_path):
    """Whoever has devices.key: a server's certificate of it is refused, also where somebody trusts that authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    signer = serialization.load_pem_private_key((fleet.authority.folder / "devices.key").read_bytes(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(fleet.authority.devices.subject)
        .public_key(key.public_key())
        .serial_number(9)
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=True)
        .sign(signer, hashes.SHA256())
    )
    cert, key_file = tmp_path / "false.pem", tmp_path / "false.key"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "r" / "metadata").mkdir(parents=True)
    with RepositoryServer(tmp_path / "r", "127.0.0.1", 0, cert=cert, key=key_file) as server:
        for authority in ("ca.pem", "devices.pem"):
            context = ssl.create_default_context(cafile=str(fleet.authority.folder / authority))
            with (
                socket.create_connection(server.server_address[:2]) as plain,
                pytest.raises(ssl.SSLCertVerificationError),
            ):
                context.wrap_socket(plain, server_hostname="localhost")


@pytest.mark.parametrize("missing", ["cert", "key", "client_ca"])
def test_tls_that_lacks_a_part_is_refused_at_the_start(fleet, tmp_path, missing):
    cert, key = fleet.server_pair()
    files = {"cert": cert, "key": key, "client_ca": fleet.authority.folder / "devices.pem", "crl": tmp_path / "none.pem"}
    if missing == "client_ca":
        with pytest.raises(UsageError) as caught:
            ServerTls(cert=cert, key=key, crl=tmp_path / "x").context()
        assert "--client-ca" in caught.value.hint
    (tmp_path / "r" / "metadata").mkdir(parents=True)
    files[missing] = None
    with pytest.raises(UsageError) as caught:
        RepositoryServer(tmp_path / "r", "127.0.0.1", 0, **files)
    assert caught.value.code == "tls.files"
    settings = {"tls_cert": str(cert), "client_ca": "x"} if missing != "cert" else {"tls_key": str(key)}
    with pytest.raises(UsageError) as caught:
        FleetServer(FleetConfig(port=free_port(), database="sqlite://", **settings))
    assert caught.value.code == "tls.files"
