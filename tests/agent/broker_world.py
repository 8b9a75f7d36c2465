"""A real Mosquitto with mutual TLS, certificates made on the spot, and the line between a device and it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edgekit.telemetry.codec import decode
from tests.agent.world import free_port, wait_for

MOSQUITTO = shutil.which("mosquitto") or ("/usr/sbin/mosquitto" if Path("/usr/sbin/mosquitto").exists() else None)
needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed (scripts/system-parts)")
ACL = """pattern write ek/1/lab/%u/#
pattern read ek/1/lab/%u/des
pattern read ek/1/lab/%u/cmd

user server
topic readwrite ek/1/#
"""


class Authority:
    """A small certificate authority; names become ``NAME.pem`` and ``NAME.key``."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.ca_file = folder / f"{name}.pem"
        usage = x509.KeyUsage(*[flag in {5, 6} for flag in range(9)])
        builder = self._builder(self.subject, self.key.public_key()).add_extension(x509.BasicConstraints(True, 0), True)
        certificate = builder.add_extension(usage, True).sign(self.key, hashes.SHA256())
        self.ca_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject, public_key):
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=1))
        )

    def issue(self, name: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
        certificate = self._builder(subject, key.public_key()).add_extension(names, False).sign(self.key, hashes.SHA256())
        paths = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return paths


class Mosquitto:
    """The broker as a process. Devices log in with certificates; their name is their user name and their client id."""

    def __init__(self, folder: Path, authority: Authority, *lines: str, acl: str = ACL) -> None:
        self.port, self.authority = free_port(), authority
        cert, key = authority.issue("broker")
        acl_file = folder / "acl"
        acl_file.write_text(acl)
        acl_file.chmod(0o700)
        self.config = folder / "mosquitto.conf"
        settings = [
            "user root",
            "persistence false",
            "log_dest none",
            *lines,
            f"listener {self.port} 127.0.0.1",
            f"cafile {authority.ca_file}",
            f"certfile {cert}",
            f"keyfile {key}",
            "require_certificate true",
            "use_identity_as_username true",
            "use_username_as_clientid true",
            "allow_anonymous false",
            f"acl_file {acl_file}",
        ]
        self.config.write_text("\n".join(settings) + "\n")
        self.process: subprocess.Popen | None = None

    def start(self) -> Mosquitto:
        assert MOSQUITTO is not None
        self.process = subprocess.Popen(
            [MOSQUITTO, "-c", str(self.config)], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        wait_for(self._is_up, what="the broker", seconds=10)
        return self

    def _is_up(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def client(
        self, name: str, *, client_id: str = "", will: tuple[str, bytes] | None = None, clean: bool = True
    ) -> paho.Client:
        """Somebody with a certificate of that name; connected."""
        cert, key = self.authority.issue(name)
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=client_id or name, protocol=paho.MQTTv5)
        context = ssl.create_default_context(cafile=str(self.authority.ca_file))
        context.load_cert_chain(cert, key)
        client.tls_set_context(context)
        if will is not None:
            client.will_set(*will, qos=1, retain=True)
        client.connect("127.0.0.1", self.port, clean_start=clean)
        client.loop_start()
        wait_for(client.is_connected, what=f"{name} is connected")
        return client


class Server:
    """The fleet's side of the broker: keeps every message."""

    def __init__(self, broker: Mosquitto) -> None:
        self.messages: list[tuple[str, bytes, bool]] = []
        self.client = broker.client("server")
        subscribed = threading.Event()
        self.client.on_subscribe = lambda *_: subscribed.set()
        self.client.on_message = lambda _c, _d, m: self.messages.append((m.topic, bytes(m.payload), bool(m.retain)))
        self.client.subscribe("ek/1/#", qos=1)
        assert subscribed.wait(5)

    def of(self, kind) -> list:
        uplink = [payload for topic, payload, _ in list(self.messages) if not topic.endswith(("/cmd", "/des"))]
        return [message for payload in uplink if isinstance(message := decode(payload), kind)]

    def stop(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class Line:
    """A TCP line that can go deaf in one direction, or be cut; TLS passes through it untouched."""

    def __init__(self, behind: int) -> None:
        self.behind, self.port = behind, free_port()
        self.is_deaf = False
        self.sockets: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                outer, _address = self.listener.accept()
                inner = socket.create_connection(("127.0.0.1", self.behind))
            except OSError:
                return
            self.sockets += [outer, inner]
            threading.Thread(target=self._pump, args=(outer, inner, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(inner, outer, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_downlink: bool) -> None:
        try:
            while data := source.recv(65536):
                if not (is_downlink and self.is_deaf):
                    sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def cut(self) -> None:
        """Both ends lose the connection, without a word."""
        for end in self.sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.sockets.clear()

    def close(self) -> None:
        self.listener.close()
        self.cut()
        time.sleep(0.05)
