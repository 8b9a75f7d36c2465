"""How a device gets its certificate, and the next one: requests to the fleet server, over TLS.

Whom to believe at the first contact: ``fingerprint`` of the fleet's authority, which travels with the claim; the authority's
file; or, with neither, the authorities of the system. With a fingerprint the authority itself is fetched first, over a
connection that proves nothing, and believed only when its digest is the one; the claim travels after that.

    enrol("https://fleet:8421", claim="ID.SECRET", fingerprint="sha256:…", files=IdentityFiles.of(state_dir))
"""

from __future__ import annotations

import hmac
import http.client
import json
import ssl
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import msgspec

from edgekit.agent.certificates import CERTIFICATE, REQUEST, CertificateFacts, make_request, read_certificates
from edgekit.agent.identity import NEXT_KEY, IdentityFiles, check_issued
from edgekit.errors import ArtifactError, EdgekitError, EnvironmentFault, RepositoryError, TrustError, UsageError
from edgekit.loopback import is_loopback
from edgekit.schema.base import decode_json
from edgekit.schema.identity import DeviceIdentity, Enrolment, Issued, Renewal, common_name, renewal_bytes
from edgekit.trust import der

SECONDS = 20.0
MAX_ANSWER_BYTES = 256 << 10
_API = "/api/v1"


@dataclass(frozen=True, kw_only=True)
class FleetServer:
    """The server to ask. ``authorities`` is PEM; None stands for those of the system."""

    url: str
    authorities: str | None = None

    def ask(self, path: str, record: Enrolment | Renewal) -> Issued:
        """Post a request; the certificate.

        Raises:
            EnvironmentFault: ``fleet.unreachable``.
            TrustError: ``fleet.tls``, or what the server refused.
            RepositoryError: ``fleet.answer`` for what is no answer of a fleet server.
        """
        status, body = self._request("POST", f"{_API}{path}", msgspec.json.encode(record))
        if status != http.client.OK:
            raise _refusal(self.url, status, body)
        try:
            return decode_json(body, Issued, name=self.url)
        except ArtifactError as error:
            raise _no_answer(self.url, status) from error

    def fetch_authorities(self) -> str:
        """The fleet's authorities as the server tells them."""
        status, body = self._request("GET", f"{_API}/ca", None)
        if status != http.client.OK:
            raise _no_answer(self.url, status)
        return body.decode("ascii", errors="replace")

    def _request(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        parts = check_url(self.url)
        context = self._context() if parts.scheme == "https" else None
        assert parts.hostname
        connection = (
            http.client.HTTPSConnection(parts.hostname, parts.port or 443, timeout=SECONDS, context=context)
            if context
            else http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=SECONDS)
        )
        headers = {"Content-Type": "application/json", "User-Agent": "edgekit"}
        try:
            connection.request(method, parts.path.rstrip("/") + path, body, headers if body else {})
            answer = connection.getresponse()
            return answer.status, answer.read(MAX_ANSWER_BYTES)
        except ssl.SSLCertVerificationError as error:
            raise TrustError(
                "fleet.tls",
                f"{self.url}: its certificate was refused: {error.verify_message}.",
                hint="Compare --ca-fingerprint or --ca with the fleet's authority, the address with the certificate's names, "
                "and this device's clock with the time.",
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise EnvironmentFault(
                "fleet.unreachable",
                f"{self.url}: the fleet server does not answer: {error}.",
                hint="Check address and network.",
            ) from error
        finally:
            connection.close()

    def _context(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(cadata=self.authorities)
        except (ssl.SSLError, ValueError) as error:
            raise UsageError("fleet.tls", f"the authorities for {self.url} cannot be used: {error}.") from error


@dataclass(frozen=True, kw_only=True)
class _Unverified(FleetServer):
    """Only to fetch what is checked by its digest."""

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context


def check_url(url: str) -> SplitResult:
    """The parts of a fleet server's address.

    Raises:
        UsageError: ``fleet.url`` or ``config.insecure``.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise UsageError("fleet.url", f"{url}: {error}.", hint="Give https://host:port.") from error
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise UsageError("fleet.url", f"{url}: not an http(s) address.", hint="Give https://host:port.")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise UsageError(
            "config.insecure",
            f"{url}: without TLS a claim can be read on the way, and the answer forged.",
            hint="Give https://.",
        )
    return parts


def _no_answer(url: str, status: int) -> RepositoryError:
    hint = "Is this the fleet server's address? It enrols devices when it was started with --authority."
    return RepositoryError("fleet.answer", f"{url}: answers {status}, not as a fleet server does.", hint=hint)


def _refusal(url: str, status: int, body: bytes) -> EdgekitError:
    """What the server said, as the error that it is."""
    try:
        said = json.loads(body)
        code, words = str(said["code"]), str(said["detail"])
    except (ValueError, KeyError, TypeError):
        return _no_answer(url, status)
    if status == http.client.TOO_MANY_REQUESTS:
        return EnvironmentFault(code, f"{url}: {words}")
    return TrustError(code, f"{url}: {words}") if status == http.client.FORBIDDEN else RepositoryError(code, f"{url}: {words}")


def find_server(url: str, *, fingerprint: str = "", authorities: str = "") -> FleetServer:
    """The server, and how it is known.

    Args:
        url: its address.
        fingerprint: ``sha256:`` and the digest of the fleet's authority.
        authorities: PEM, instead of it.

    Raises:
        UsageError: ``fleet.url``, ``config.insecure`` or ``fleet.fingerprint``.
        TrustError: ``fleet.fingerprint`` when the server's authority is another one.
        EnvironmentFault: ``fleet.unreachable``.
    """
    check_url(url)
    if not fingerprint:
        return FleetServer(url=url, authorities=authorities or None)
    kind, _, digest = fingerprint.strip().lower().partition(":")
    if kind != "sha256" or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise UsageError(
            "fleet.fingerprint",
            f"--ca-fingerprint {fingerprint}: expected sha256: and 64 hexadecimal digits.",
            hint='"edgekit fleet claim" prints it.',
        )
    fetched = _Unverified(url=url).fetch_authorities()
    for found in read_certificates(fetched):
        if hmac.compare_digest(found.fingerprint, f"sha256:{digest}"):
            return FleetServer(url=url, authorities=der.to_pem(found.raw, CERTIFICATE))
    raise TrustError(
        "fleet.fingerprint",
        f"{url}: its authority is not the one of the fingerprint; somebody may be in between.",
        hint='Compare the fingerprint with what "edgekit fleet ca status" shows.',
    )


def enrol(
    server: FleetServer, *, claim: str, files: IdentityFiles, site: str = "", device: str = ""
) -> tuple[DeviceIdentity, CertificateFacts]:
    """Get the first certificate; what was there is replaced when the new one is complete.

    Args:
        server: whom to ask.
        claim: ``ID.SECRET``.
        files: where it is kept.
        site: as this device was told otherwise; empty when only the claim says it.
        device: the same.

    Raises:
        TrustError: ``claim.refused``, ``fleet.tls``, ``identity.mismatch``.
        EnvironmentFault, RepositoryError, ArtifactError: as :meth:`FleetServer.ask`.
        OSError: the disk refuses.
    """
    key = files.next_key()
    request = make_request(key, common_name(site, device) if site and device else "")
    issued = server.ask("/enroll", Enrolment(claim=claim, request=request, site=site, device=device))
    if (site and issued.site != site) or (device and issued.device != device):
        raise TrustError("identity.mismatch", f"the certificate is for {issued.site}/{issued.device}, not for this device.")
    check_issued(key, issued)
    about = DeviceIdentity(
        site=issued.site,
        device=issued.device,
        fleet=server.url,
        labels=issued.labels,
        broker=issued.broker,
        repository=issued.repository,
        has_public_server=server.authorities is None,
    )
    return about, files.take(key, issued, about)


def renew(files: IdentityFiles, about: DeviceIdentity) -> CertificateFacts:
    """Get the next certificate, with a new key, on the word of the present one.

    Raises:
        TrustError: ``identity.revoked``, ``identity.expired``, ``identity.refused``, ``fleet.tls``, ``identity.mismatch``.
        EnvironmentFault, RepositoryError, ArtifactError: as :meth:`FleetServer.ask`.
        OSError: the disk refuses; the present pair goes on.
    """
    present, key = files.certificate(), files.key()
    following = files.next_key()
    if following == key:  # a power cut between the last two steps of the renewal before
        (files.folder / NEXT_KEY).unlink(missing_ok=True)
        following = files.next_key()
    request = make_request(following, present.common_name)
    (request_der,) = der.from_pem(request, REQUEST)
    authorities = None if about.has_public_server else files.authorities.read_text()
    issued = FleetServer(url=about.fleet, authorities=authorities).ask(
        "/renew",
        Renewal(
            certificate=der.to_pem(present.raw, CERTIFICATE),
            request=request,
            signature=key.sign(renewal_bytes(present.raw, request_der)),
        ),
    )
    if (issued.site, issued.device) != (about.site, about.device):
        raise TrustError("identity.mismatch", f"the certificate is for {issued.site}/{issued.device}, not for this device.")
    return files.take(following, issued, about)
