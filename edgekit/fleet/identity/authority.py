"""The fleet's certificate authorities: one for its servers, one for its devices, as files in one folder.

    FOLDER/
      authority.json      name, lifetimes
      ca.pem  ca.key      by which devices and operators know the fleet's servers; ca.key can be kept off line
      ca.crl.pem          its revocations
      devices.pem .key    by which the servers know devices; the fleet server signs certificates of devices with it
      issued/             certificates of servers, with their keys

The two are roots of their own and do not vouch for each other: whoever takes over the fleet server, and with it
``devices.key``, can make devices, but no server that a device would believe. The devices' authority is marked for clients
only, and may not vouch for any host name or address.

    authority = Authority.open(Path("ca"))
    certificate = authority.issue_device(read_request(pem), site="lab", device="cam-7", now=datetime.now(UTC))
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgekit.durable import create_durably, make_folder, write_durably
from edgekit.errors import ArtifactError, TrustError, UsageError
from edgekit.schema.base import Record, decode_json, encode_json
from edgekit.schema.identity import MAX_COMMON_NAME, common_name

CA_FILE, CA_KEY, CA_CRL = "ca.pem", "ca.key", "ca.crl.pem"
DEVICES_FILE, DEVICES_KEY = "devices.pem", "devices.key"
SETTINGS_FILE, ISSUED_DIR = "authority.json", "issued"
AUTHORITY_DAYS = 20 * 365
CRL_DAYS = 365
"""A list that is over lets nobody in any more: it is made anew every day, and a server that stands still gets a year."""
SKEW = timedelta(minutes=5)
"""Certificates begin to hold a little before they are made: clocks differ."""
MAX_LIFETIME_DAYS = 825
_SERVER_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?\Z")
_HOST = re.compile(r"(?:\*\.)?[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*\Z")
_SIGNING = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)
_HANDSHAKE = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
_NO_HOSTS = x509.NameConstraints(
    permitted_subtrees=None,
    excluded_subtrees=[
        x509.DNSName(""),
        x509.IPAddress(ipaddress.ip_network("0.0.0.0/0")),
        x509.IPAddress(ipaddress.ip_network("::/0")),
    ],
)


class AuthoritySettings(Record, frozen=True, kw_only=True):
    """``authority.json``."""

    name: str
    certificate_days: float = 30.0
    """How long a device's certificate holds; it renews it at two thirds of that."""
    grace_days: float = 60.0
    """For so long after its end a certificate may still be renewed: a device that slept is no stranger."""
    domains: tuple[str, ...] = ()
    servers: tuple[str, ...] = ("edgekit-fleet",)
    """Common names of the servers' certificates that may say and hear everything at the broker."""


class AuthorityFile(Record, frozen=True, kw_only=True):
    """One certificate of the folder, as ``edgekit fleet ca status`` shows it."""

    file: str
    subject: str
    not_after: datetime
    fingerprint: str
    has_key: bool
    purpose: str = ""


@dataclass(frozen=True, kw_only=True)
class Revoked:
    """One line of a revocation list."""

    serial: int
    at: datetime


@dataclass(frozen=True, kw_only=True)
class RevocationList:
    """What a revocation list says."""

    issued: datetime
    serials: frozenset[int]


def read_crls(text: str) -> tuple[RevocationList, ...]:
    """The lists of a file, in order.

    Raises:
        ValueError: one of them is malformed.
    """
    ends = text.split("-----END X509 CRL-----")[:-1]
    lists = [x509.load_pem_x509_crl(f"{part}-----END X509 CRL-----\n".encode()) for part in ends]
    return tuple(
        RevocationList(issued=each.last_update_utc, serials=frozenset(line.serial_number for line in each)) for each in lists
    )


def fingerprint(certificate: x509.Certificate) -> str:
    """``sha256:`` and the digest of a certificate."""
    return f"sha256:{certificate.fingerprint(hashes.SHA256()).hex()}"


def read_request(text: str) -> x509.CertificateSigningRequest:
    """A device's request: P-256, and signed with its own key.

    Raises:
        ArtifactError: ``identity.request``.
    """
    try:
        request = x509.load_pem_x509_csr(text.encode())
        key, is_signed = request.public_key(), request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ArtifactError("identity.request", "the request is no PKCS#10 in PEM.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ArtifactError("identity.request", "the request's key is of another kind; expected P-256.")
    if not is_signed:
        raise ArtifactError("identity.request", "the request is not signed with its own key.")
    return request


def key_digest(holder: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """SHA-256 of the public key, hexadecimal."""
    info = holder.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(info)
    return digest.finalize().hex()


def to_pem(certificate: x509.Certificate) -> str:
    """PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, is_server: bool, is_client: bool) -> x509.ExtendedKeyUsage:
    usages = []
    if is_server:
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
    if is_client:
        usages.append(ExtendedKeyUsageOID.CLIENT_AUTH)
    return x509.ExtendedKeyUsage(usages)


def _make_root(
    organization: str, what: str, usage: x509.ExtendedKeyUsage, constraints: x509.NameConstraints | None, now: datetime
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{organization} {what}"[:MAX_COMMON_NAME]),
        ]
    )
    builder = _builder(name, name, key.public_key(), begin=now - SKEW, end=now + timedelta(days=AUTHORITY_DAYS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_SIGNING, critical=True).add_extension(usage, critical=False)
    if constraints is not None:
        builder = builder.add_extension(constraints, critical=True)
    return builder.sign(key, hashes.SHA256()), key


def _domain_constraints(domains: Sequence[str]) -> x509.NameConstraints | None:
    """The servers' authority may vouch for these domains and networks, and for loopback, alone."""
    if not domains:
        return None
    names: list[x509.GeneralName] = []
    networks: list[x509.GeneralName] = [
        x509.IPAddress(ipaddress.ip_network("127.0.0.0/8")),
        x509.IPAddress(ipaddress.ip_network("::1/128")),
    ]
    for domain in (*domains, "localhost"):
        try:
            networks.append(x509.IPAddress(ipaddress.ip_network(domain)))
        except ValueError:
            if not _HOST.match(domain):
                raise UsageError(
                    "identity.domain", f"{domain!r}: neither a domain nor a network.", hint="Give example.com or 10.1.0.0/16."
                ) from None
            names.append(x509.DNSName(domain))
    return x509.NameConstraints(permitted_subtrees=[*names, *networks], excluded_subtrees=None)


def init_authority(
    folder: Path,
    *,
    name: str,
    now: datetime,
    certificate_days: float = 30.0,
    grace_days: float = 60.0,
    domains: Sequence[str] = (),
    servers: Sequence[str] = (),
) -> Authority:
    """Make both authorities, in a folder that has none.

    Raises:
        UsageError: ``identity.exists``, ``identity.name``, ``identity.lifetime`` or ``identity.domain``.
    """
    if not name or len(name) > 40 or not name.isprintable():
        raise UsageError("identity.name", f"{name!r}: expected 1 to 40 letters as the fleet's name.")
    if not 0 < certificate_days <= MAX_LIFETIME_DAYS or not 0 <= grace_days <= MAX_LIFETIME_DAYS:
        raise UsageError(
            "identity.lifetime",
            f"certificates for {certificate_days:g} days, renewed up to {grace_days:g} days late: not possible.",
            hint=f"Give more than 0 and at most {MAX_LIFETIME_DAYS} days.",
        )
    for server in servers:
        _check_server_name(server)
    root, root_key = _make_root(name, "servers", _usage(is_server=True, is_client=True), _domain_constraints(domains), now)
    devices, devices_key = _make_root(name, "devices", _usage(is_server=False, is_client=True), _NO_HOSTS, now)
    settings = AuthoritySettings(name=name, certificate_days=certificate_days, grace_days=grace_days, domains=tuple(domains))
    if servers:
        settings = msgspec.structs.replace(settings, servers=tuple(servers))
    make_folder(folder, mode=0o700)
    files = (
        (CA_KEY, _key_bytes(root_key), 0o600),
        (DEVICES_KEY, _key_bytes(devices_key), 0o600),
        (CA_FILE, to_pem(root).encode(), 0o644),
        (DEVICES_FILE, to_pem(devices).encode(), 0o644),
        (CA_CRL, _make_crl(root, root_key, (), now, days=AUTHORITY_DAYS), 0o644),
        (SETTINGS_FILE, encode_json(settings), 0o644),
    )
    for file, content, mode in files:
        try:
            create_durably(folder / file, content, mode=mode)
        except FileExistsError:
            raise UsageError(
                "identity.exists",
                f"{folder / file}: there is an authority already, which is not replaced.",
                hint="Give another folder; every device would have to be enrolled again.",
            ) from None
    return Authority.open(folder)


def _make_crl(
    issuer: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    revoked: Iterable[Revoked],
    now: datetime,
    *,
    days: int = CRL_DAYS,
) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(now - SKEW)
        .next_update(min(now + timedelta(days=days), issuer.not_valid_after_utc))
        .add_extension(x509.CRLNumber(int(now.timestamp() * 1000)), critical=False)
        .add_extension(_authority_id(issuer), critical=False)
    )
    for each in revoked:
        line = x509.RevokedCertificateBuilder().serial_number(each.serial).revocation_date(each.at).build()
        builder = builder.add_revoked_certificate(line)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _authority_id(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    found = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(found)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            "identity.no_authority",
            f"{path}: {error.strerror}.",
            hint='Make an authority: "edgekit fleet ca init DIR", and give its folder.',
        ) from error


def _load_key(path: Path, certificate: x509.Certificate) -> ec.EllipticCurvePrivateKey:
    data = _read(path)
    if path.stat().st_mode & 0o077:
        raise UsageError(
            "identity.key_mode", f"{path}: others can read this key; expected mode 0600.", hint=f"chmod 600 {path}"
        )
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ArtifactError("identity.key", f"{path}: no private key in PEM without a password.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ArtifactError("identity.key", f"{path}: not the key of the certificate beside it.")
    return key


@dataclass(frozen=True, kw_only=True)
class Authority:
    """The authorities of a folder; ``ca.pem`` may hold several certificates while one takes over from another."""

    folder: Path
    settings: AuthoritySettings
    servers: tuple[x509.Certificate, ...]
    devices: x509.Certificate

    @classmethod
    def open(cls, folder: Path) -> Authority:
        """Read the folder; keys are read when they are used.

        Raises:
            UsageError: ``identity.no_authority``.
            ArtifactError: ``identity.certificate`` or ``record.malformed``.
        """
        settings = decode_json(_read(folder / SETTINGS_FILE), AuthoritySettings, name=str(folder / SETTINGS_FILE))
        try:
            servers = x509.load_pem_x509_certificates(_read(folder / CA_FILE))
            devices = x509.load_pem_x509_certificate(_read(folder / DEVICES_FILE))
        except ValueError as error:
            raise ArtifactError("identity.certificate", f"{folder}: a certificate cannot be read: {error}.") from error
        return cls(folder=folder, settings=settings, servers=tuple(servers), devices=devices)

    @property
    def servers_pem(self) -> str:
        """By which devices know the fleet's servers."""
        return "".join(map(to_pem, self.servers))

    @property
    def fingerprint(self) -> str:
        """Of the servers' authority: what a device is told when it is enrolled."""
        return fingerprint(self.servers[0])

    def check_key(self) -> None:
        """Whether certificates of devices can be signed here.

        Raises:
            UsageError: ``identity.no_authority`` or ``identity.key_mode``.
            ArtifactError: ``identity.key``.
        """
        _load_key(self.folder / DEVICES_KEY, self.devices)

    def issue_device(
        self, request: x509.CertificateSigningRequest, *, site: str, device: str, now: datetime
    ) -> x509.Certificate:
        """A device's certificate; what the request says of its name does not count.

        Raises:
            UsageError: ``identity.name`` when site and device are too long together.
        """
        check_common_name(site, device)
        key = request.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, self.settings.name),
                x509.NameAttribute(NameOID.COMMON_NAME, common_name(site, device)),
            ]
        )
        end = min(now + timedelta(days=self.settings.certificate_days), self.devices.not_valid_after_utc)
        builder = _builder(subject, self.devices.subject, key, begin=now - SKEW, end=end)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_HANDSHAKE, critical=True)
        builder = builder.add_extension(_usage(is_server=False, is_client=True), critical=False)
        builder = builder.add_extension(_authority_id(self.devices), critical=False)
        return builder.sign(_load_key(self.folder / DEVICES_KEY, self.devices), hashes.SHA256())

    def is_ours(self, certificate: x509.Certificate) -> bool:
        """Whether the devices' authority made this certificate; its dates are not looked at."""
        try:
            certificate.verify_directly_issued_by(self.devices)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def make_crl(self, revoked: Iterable[Revoked], now: datetime) -> bytes:
        """The revocation lists of both authorities, PEM: a listener that looks at one wants one of each."""
        key = _load_key(self.folder / DEVICES_KEY, self.devices)
        return _make_crl(self.devices, key, revoked, now) + _read(self.folder / CA_CRL)

    def issue_server(
        self, name: str, *, hosts: Sequence[str], is_client: bool, days: float, now: datetime, out: Path | None = None
    ) -> tuple[Path, Path]:
        """A certificate for a server of the fleet, with a new key; where they lie.

        Args:
            name: its common name, by which a broker knows it as a client.
            hosts: names and addresses under which it serves; none for a client.
            is_client: whether it logs in to the broker or the repository.
            days: how long it holds.
            now: the time.
            out: folder; ``issued`` by default.

        Raises:
            UsageError: ``identity.name``, ``identity.host``, ``identity.purpose``, ``identity.lifetime`` or
                ``identity.no_authority``.
        """
        _check_server_name(name)
        if not hosts and not is_client:
            raise UsageError(
                "identity.purpose", f"{name}: for what?", hint="Give the --host under which it serves, or --client, or both."
            )
        if not 0 < days <= MAX_LIFETIME_DAYS:
            raise UsageError("identity.lifetime", f"--days {days:g}: expected more than 0, at most {MAX_LIFETIME_DAYS}.")
        issuer = self.servers[0]
        signer = _load_key(self.folder / CA_KEY, issuer)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        end = min(now + timedelta(days=days), issuer.not_valid_after_utc)
        builder = _builder(subject, issuer.subject, key.public_key(), begin=now - SKEW, end=end)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_HANDSHAKE, critical=True)
        builder = builder.add_extension(_usage(is_server=bool(hosts), is_client=is_client), critical=False)
        builder = builder.add_extension(_authority_id(issuer), critical=False)
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        folder = out or self.folder / ISSUED_DIR
        pem, key_file = folder / f"{name}.pem", folder / f"{name}.key"
        # the key first: a certificate that is not there yet is asked for again, one without its key is of no use
        write_durably(key_file, _key_bytes(key), mode=0o600)
        write_durably(pem, to_pem(builder.sign(signer, hashes.SHA256())).encode(), mode=0o644)
        return pem, key_file

    def files(self) -> tuple[AuthorityFile, ...]:
        """The certificates of the folder, with their ends."""
        found = [(self.folder / CA_FILE, each, "servers") for each in self.servers]
        found.append((self.folder / DEVICES_FILE, self.devices, "devices"))
        for path in sorted((self.folder / ISSUED_DIR).glob("*.pem")):
            try:
                found.append((path, x509.load_pem_x509_certificate(path.read_bytes()), ""))
            except (OSError, ValueError):
                continue
        return tuple(
            AuthorityFile(
                file=str(path),
                subject=certificate.subject.rfc4514_string(),
                not_after=certificate.not_valid_after_utc,
                fingerprint=fingerprint(certificate),
                has_key=path.with_suffix(".key").is_file(),
                purpose=purpose,
            )
            for path, certificate, purpose in found
        )


def _check_server_name(name: str) -> None:
    if not _SERVER_NAME.match(name):
        raise UsageError("identity.name", f"{name!r}: expected 1 to 63 of a-z, 0-9, '.', '_' and '-' as a server's name.")


def check_common_name(site: str, device: str) -> str:
    """The common name of a device, if a certificate can carry it.

    Raises:
        UsageError: ``identity.name``.
    """
    name = common_name(site, device)
    if len(name) > MAX_COMMON_NAME:
        raise UsageError(
            "identity.name",
            f"{name}: {len(name)} letters; a certificate's common name has at most {MAX_COMMON_NAME}.",
            hint="Give the site or the device a shorter name.",
        )
    return name


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST.match(host):
            raise UsageError("identity.host", f"{host!r}: neither a host name nor an address.") from None
        return x509.DNSName(host)


def read_certificate(text: str) -> x509.Certificate:
    """A certificate in PEM.

    Raises:
        TrustError: ``identity.refused``.
    """
    try:
        return x509.load_pem_x509_certificate(text.encode())
    except ValueError as error:
        raise TrustError("identity.refused", "the present certificate cannot be read.") from error


def utc_now() -> datetime:
    """Now, whole seconds as certificates count them."""
    return datetime.now(UTC).replace(microsecond=0)
