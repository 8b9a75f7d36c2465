from __future__ import annotations

import http.client
import os
import random
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import EnvironmentFault, RepositoryError, UsageError
from edgekit.repository.server import RepositoryServer, parse_range

DATA = random.Random(1).randbytes(5000)
HEX = "ab" * 32
BLOB = f"/blobs/sha256/{HEX}"
MANIFEST = f"/targets/models/kws/1.0.0+b/{HEX}.manifest.json"


@pytest.fixture
def folder(tmp_path):
    repo = tmp_path / "repo"
    files = {
        "metadata/timestamp.json": b"{}",
        "metadata/1.root.json": b"{}",
        "metadata/.new-abc": b"temporary",
        BLOB[1:]: DATA,
        MANIFEST[1:]: b"{}",
        "repository.json": b"secret",
        "publishers/a.pub": b"x",
        "keys/root.pem": b"PRIVATE",
        "metadata/keys.pem": b"PRIVATE",
    }
    for name, data in files.items():
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_bytes(data)
    return repo


@pytest.fixture
def server(folder):
    with RepositoryServer(folder, "127.0.0.1", 0) as server:
        yield server


def ask(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


@pytest.mark.parametrize("path", ["/metadata/timestamp.json", "/metadata/1.root.json", MANIFEST, BLOB])
def test_public_files(server, folder, path):
    answer, body = ask(server, path)
    assert answer.status == 200
    assert body == (folder / path[1:]).read_bytes()
    assert answer.headers["Accept-Ranges"] == "bytes"
    immutable = path != "/metadata/timestamp.json"
    assert answer.headers["Cache-Control"] == ("public, max-age=31536000, immutable" if immutable else "no-cache")
    head, nothing = ask(server, path, "HEAD")
    assert (head.status, nothing, head.headers["Content-Length"]) == (200, b"", str(len(body)))
    assert head.headers["ETag"] == answer.headers["ETag"]


@pytest.mark.parametrize(
    "path",
    [
        "/", "/keys/root.pem", "/metadata/../keys/root.pem", "/metadata/%2e%2e/keys/root.pem", "/metadata/..%2fkeys%2froot.pem",
        "//etc/passwd", "/metadata", "/metadata/", "/metadata/.new-abc", "/metadata/keys.pem", "/repository.json",
        "/publishers/a.pub", "/blobs/sha256/", "/blobs/sha256/" + "AB" * 32, BLOB + "/", BLOB + "%00",
        "/metadata/timestamp.json%0a", "/metadata\\timestamp.json", "/" + "a" * 5000,
        f"/targets/models/../../{HEX}.manifest.json", f"/targets/models/kws/../{HEX}.manifest.json",
    ],
)  # fmt: skip
def test_nothing_else_is_served(server, path):
    answer, body = ask(server, path)
    assert (answer.status, body) == (404, b"")
    assert answer.headers["Cache-Control"] == "no-store"


def test_missing_next_root_is_not_found(server):
    assert ask(server, "/metadata/2.root.json")[0].status == 404


def test_symbolic_links_folders_and_pipes_are_not_followed(server, folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (folder / "metadata" / "2.root.json").symlink_to(secret)
    (folder / "metadata" / "3.root.json").mkdir()
    os.mkfifo(folder / "metadata" / "4.root.json")
    real = folder / "targets"
    real.rename(tmp_path / "elsewhere")
    real.symlink_to(tmp_path / "elsewhere")
    for path in ("/metadata/2.root.json", "/metadata/3.root.json", "/metadata/4.root.json", MANIFEST):
        assert ask(server, path)[0].status == 404


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 50))
def test_range_arithmetic(first, last, size):
    text = f"bytes={first}-{last}"
    if last < first:
        assert parse_range(text, size) is None
    elif first >= size:
        with pytest.raises(ValueError, match="outside"):
            parse_range(text, size)
    else:
        assert parse_range(text, size) == (first, min(last, size - 1))
    if first < size:
        assert parse_range(f"bytes={first}-", size) == (first, size - 1)


@pytest.mark.parametrize(
    ("text", "status", "part", "range_"),
    [
        ("bytes=0-0", 206, DATA[:1], "bytes 0-0/5000"),
        ("bytes=100-", 206, DATA[100:], "bytes 100-4999/5000"),
        ("bytes=-10", 206, DATA[-10:], "bytes 4990-4999/5000"),
        ("bytes=-9999", 206, DATA, "bytes 0-4999/5000"),
        ("bytes=4999-9999999", 206, DATA[-1:], "bytes 4999-4999/5000"),
        ("bytes=5000-", 416, b"", "bytes */5000"),
        ("bytes=-0", 416, b"", "bytes */5000"),
        ("bytes=9-3", 200, DATA, None),
        ("bytes=0-1,3-4", 200, DATA, None),
        ("bytes=-", 200, DATA, None),
        ("items=0-1", 200, DATA, None),
        ("nonsense", 200, DATA, None),
    ],
)
def test_range_requests(server, text, status, part, range_):
    answer, body = ask(server, BLOB, Range=text)
    assert (answer.status, body, answer.headers.get("Content-Range")) == (status, part, range_)


def test_conditional_requests(server):
    tag = f'"{HEX}"'
    assert ask(server, BLOB)[0].headers["ETag"] == tag
    answer, body = ask(server, BLOB, If_None_Match=tag)
    assert (answer.status, body) == (304, b"")
    assert ask(server, BLOB, Range="bytes=0-9", If_Range=tag)[0].status == 206
    assert ask(server, BLOB, Range="bytes=0-9", If_Range='"other"')[0].status == 200


def test_etag_of_the_timestamp_follows_its_content(server, folder):
    first = ask(server, "/metadata/timestamp.json")[0].headers["ETag"]
    (folder / "metadata" / "timestamp.json").write_bytes(b"{ }")
    assert ask(server, "/metadata/timestamp.json")[0].headers["ETag"] != first


def test_other_methods_and_bodies(server):
    for method in ("POST", "PUT", "DELETE"):
        assert ask(server, BLOB, method)[0].status == 501
    with socket.create_connection(server.server_address) as raw:
        raw.sendall(b"GET /metadata/1.root.json HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n")
        raw.sendall(b"GET /metadata/timestamp.json HTTP/1.1\r\n\r\n")
        raw.settimeout(5)
        received = b""
        while chunk := raw.recv(65536):
            received += chunk
    assert received.count(b"HTTP/1.1 200") == 1


def test_port_in_use_names_the_port(server, folder):
    port = server.server_address[1]
    with pytest.raises(EnvironmentFault) as caught:
        RepositoryServer(folder, "127.0.0.1", port)
    assert caught.value.code == "port.in_use"
    assert str(port) in caught.value.message


def test_address_that_is_not_ours_and_folder_without_repository(folder, tmp_path):
    with pytest.raises(EnvironmentFault) as caught:
        RepositoryServer(folder, "203.0.113.1", 0)
    assert caught.value.code == "address.unknown"
    with pytest.raises(RepositoryError):
        RepositoryServer(tmp_path, "127.0.0.1", 0)


def certificate(folder: Path) -> tuple[Path, Path]:
    import datetime as dt
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "edgekit test")])
    now = dt.datetime.now(dt.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(pem)
    return folder / "cert.pem", folder / "key.pem"


def test_tls_and_a_client_that_does_not_trust_it(folder, tmp_path):
    from edgekit.trust.transport import Transport, TransportError, TransportOptions

    cert, key = certificate(tmp_path)
    with RepositoryServer(folder, "127.0.0.1", 0, cert=cert, key=key) as server:
        assert server.url.startswith("https://")
        with Transport(TransportOptions(ca_file=str(cert))).get(server.url + BLOB) as answer:
            assert b"".join(answer.chunks(max_bytes=5000)) == DATA
        with pytest.raises(TransportError) as caught:
            Transport().get(server.url + BLOB)
        assert caught.value.fault == "tls"
        context = ssl.create_default_context(cafile=cert)
        assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    with pytest.raises(UsageError):
        RepositoryServer(folder, "127.0.0.1", 0, cert=cert)
    with pytest.raises(UsageError):
        RepositoryServer(folder, "127.0.0.1", 0, cert=key, key=cert)


def test_serves_over_ipv6(folder):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        with pytest.raises(EnvironmentFault):
            RepositoryServer(folder, "::1", 0)
        return
    with RepositoryServer(folder, "::1", 0) as server:
        assert server.url.startswith("http://[::1]:")


def test_server_program_ends_quietly_on_sigterm(folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "edgekit", "repo", "serve", str(folder), "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    line = process.stderr.readline()
    assert "serving at http://127.0.0.1:" in line
    process.terminate()
    assert process.wait(10) == 0
    assert "Traceback" not in process.stderr.read()
