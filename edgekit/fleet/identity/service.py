"""Enrolment, renewal and revocation over the fleet's database.

Rules: a claim makes one key one certificate, however many ask at once, and asking again with the same key gives the same
certificate, since an answer may be lost on the way; what is wrong with a claim is never said; a device that is enrolled anew
loses the certificates that it had; a revoked one gets no other until somebody makes a claim for it. Each of these is audited.

    made = identity.make_claim("lab", "cam-7", labels={}, seconds=86400, actor="operator")
    issued = identity.enrol(Enrolment(claim=made.claim, request=csr))
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import Connection, Row, and_, func, or_, select, update

from edgekit.durable import write_durably
from edgekit.errors import ArtifactError, OperationError, TrustError, UsageError
from edgekit.fleet.audit import record
from edgekit.fleet.identity.authority import (
    Authority,
    Revoked,
    check_common_name,
    key_digest,
    read_certificate,
    read_request,
    to_pem,
    utc_now,
)
from edgekit.fleet.identity.mosquitto import LOCAL_RULES, make_acl
from edgekit.fleet.identity.tables import certificates, claims, identities
from edgekit.fleet.identity.views import ClaimState, ClaimView, IdentityPage, IdentityState, IdentityView
from edgekit.fleet.tables import upsert
from edgekit.schema.identity import ClaimMade, Enrolment, Issued, Renewal, renewal_bytes
from edgekit.telemetry.topics import check_name

if TYPE_CHECKING:
    from edgekit.fleet.store import Store

logger = logging.getLogger(__name__)

MIN_CLAIM_S, MAX_CLAIM_S = 60.0, 90 * 86400.0
MAX_LABELS, MAX_LABEL_LETTERS = 32, 128
MAX_CERTIFICATES_A_DAY = 12
"""A device that asks for more has lost its mind, or its key."""
DUE_SHARE = 2 / 3
_DAY_MS = 86_400_000
_ID_BYTES, _SECRET_BYTES = 8, 20
_NOBODY = hashlib.sha256(b"").digest()


def _token(count: int) -> str:
    return base64.b32encode(secrets.token_bytes(count)).decode().rstrip("=").lower()


def _ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


def _moment(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)


def refused() -> TrustError:
    """The one answer to every claim that does not hold."""
    return TrustError(
        "claim.refused",
        "the claim was refused.",
        hint='It may be mistyped, used or too old: ask for a new one ("edgekit fleet claim SITE/DEVICE").',
    )


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The fleet's members.

    Args:
        store: the database.
        authority: who signs.
        broker: told to devices that are enrolled; empty when they know it otherwise.
        repository: the same.
        broker_dir: folder in which ``crl.pem`` and ``acl`` are kept up to date for the broker; None for none.
        servers: user names of the fleet's own servers at the broker.
        now: the clock.
    """

    store: Store
    authority: Authority
    broker: str = ""
    repository: str = ""
    broker_dir: Path | None = None
    servers: tuple[str, ...] = ("edgekit-fleet",)
    now: Callable[[], datetime] = utc_now
    _published: dict[str, Any] = field(default_factory=dict)

    # --- claims

    def make_claim(self, site: str, device: str, *, labels: Mapping[str, str], seconds: float, actor: str) -> ClaimMade:
        """A claim for one device; its secret is not kept.

        Raises:
            UsageError: ``telemetry.name``, ``identity.name``, ``claim.time``, ``claim.labels``.
        """
        check_name(site, "site")
        check_name(device, "device")
        check_common_name(site, device)
        _check_labels(labels)
        if not MIN_CLAIM_S <= seconds <= MAX_CLAIM_S:
            raise UsageError("claim.time", f"a claim for {seconds:g} s: expected one minute to 90 days.")
        now = self.now()
        name, secret = _token(_ID_BYTES), _token(_SECRET_BYTES)
        expires = now + timedelta(seconds=seconds)
        values = {
            "id": name,
            "secret_hash": hashlib.sha256(secret.encode()).digest(),
            "site": site,
            "device": device,
            "labels": json.dumps(dict(labels), sort_keys=True),
            "created_ms": _ms(now),
            "created_by": actor[:200],
            "expires_ms": _ms(expires),
        }
        with self.store.write() as connection:
            connection.execute(claims.insert().values(values))
            self._audit(connection, actor, "claim.made", site, device, fields={"claim": name, "expires_ms": _ms(expires)})
        return ClaimMade(
            id=name,
            claim=f"{name}.{secret}",
            site=site,
            device=device,
            expires_at=expires,
            fingerprint=self.authority.fingerprint,
        )

    def withdraw_claim(self, name: str, *, actor: str, reason: str = "") -> bool:
        """Make a claim worthless; False when there is no open one of that id."""
        now_ms = _ms(self.now())
        with self.store.write() as connection:
            row = connection.execute(select(claims).where(claims.c.id == name)).first()
            done = connection.execute(
                update(claims)
                .where(claims.c.id == name, claims.c.used_ms == 0, claims.c.withdrawn_ms == 0)
                .values(withdrawn_ms=now_ms)
            )
            if row is None or not done.rowcount:
                return False
            self._audit(connection, actor, "claim.withdrawn", row.site, row.device, reason=reason, fields={"claim": name})
        return True

    def claims(self, *, limit: int = 500) -> tuple[ClaimView, ...]:
        """The newest claims, those that are still open first."""
        now_ms = _ms(self.now())
        row = claims.c
        is_open = and_(row.used_ms == 0, row.withdrawn_ms == 0, row.expires_ms > now_ms)
        with self.store.read() as connection:
            found = connection.execute(select(claims).order_by(is_open.desc(), row.created_ms.desc()).limit(limit)).all()
        return tuple(_claim_view(each, now_ms) for each in found)

    # --- enrolment

    def enrol(self, enrolment: Enrolment) -> Issued:
        """A device's first certificate.

        Raises:
            ArtifactError: ``identity.request``.
            TrustError: ``claim.refused``.
        """
        request = read_request(enrolment.request)
        now, key = self.now(), key_digest(request)
        with self.store.write() as connection:
            claim = self._check_claim(connection, enrolment, _ms(now))
            taken = connection.execute(
                update(claims).where(claims.c.id == claim.id, claims.c.used_ms == 0).values(used_ms=_ms(now), key_digest=key)
            )
            if not taken.rowcount:
                return self._answer_again(connection, claim, key, _ms(now))
            was_shut_out = self._is_shut_out(connection, claim.site, claim.device)
            ended = self._supersede(connection, claim.site, claim.device, _ms(now))
            issued = self._issue(connection, request, claim.site, claim.device, now, labels=claim.labels, is_new=True)
            actor = f"device:{claim.site}/{claim.device}"
            fields = {"claim": claim.id, "serial": issued[1], "superseded": ended}
            self._audit(connection, actor, "identity.enrolled", claim.site, claim.device, fields=fields)
        logger.info("event=enrolled site=%s device=%s claim=%s", claim.site, claim.device, claim.id)
        if ended or was_shut_out:
            self.publish_revocations()
        return issued[0]

    def _check_claim(self, connection: Connection, enrolment: Enrolment, now_ms: int) -> Row[Any]:
        """The claim, if its secret is right and it holds for this device; who was first is another question."""
        name, _, secret = enrolment.claim.strip().partition(".")
        row = connection.execute(select(claims).where(claims.c.id == name[:32])).first()
        kept = _NOBODY if row is None else bytes(row.secret_hash)
        is_right = hmac.compare_digest(hashlib.sha256(secret.encode()).digest(), kept)
        if row is None or not is_right or row.withdrawn_ms or row.expires_ms <= now_ms:
            raise refused()
        if (enrolment.site and enrolment.site != row.site) or (enrolment.device and enrolment.device != row.device):
            raise refused()
        return row

    def _answer_again(self, connection: Connection, claim: Row[Any], key: str, now_ms: int) -> Issued:
        """The certificate that this claim gave already, to the key that has it; nothing to any other."""
        row = connection.execute(
            select(certificates).where(
                certificates.c.key_digest == key,
                certificates.c.site == claim.site,
                certificates.c.device == claim.device,
                certificates.c.revoked_ms == 0,
                certificates.c.not_after_ms > now_ms,
            )
        ).first()
        used = connection.execute(select(claims.c.key_digest).where(claims.c.id == claim.id)).scalar() or ""
        if row is None or not hmac.compare_digest(used, key):
            raise refused()
        return self._answer(x509.load_pem_x509_certificate(row.pem.encode()), claim.site, claim.device, claim.labels)

    def _supersede(self, connection: Connection, site: str, device: str, now_ms: int) -> int:
        """End the certificates that a device had; how many."""
        row = certificates.c
        done = connection.execute(
            update(certificates)
            .where(row.site == site, row.device == device, row.revoked_ms == 0, row.not_after_ms > now_ms)
            .values(revoked_ms=now_ms)
        )
        return int(done.rowcount)

    def _is_shut_out(self, connection: Connection, site: str, device: str) -> bool:
        where = and_(identities.c.site == site, identities.c.device == device)
        return bool(connection.execute(select(identities.c.revoked_ms).where(where)).scalar())

    def _issue(
        self,
        connection: Connection,
        request: x509.CertificateSigningRequest,
        site: str,
        device: str,
        now: datetime,
        *,
        labels: str,
        is_new: bool,
    ) -> tuple[Issued, str]:
        made = self.authority.issue_device(request, site=site, device=device, now=now)
        serial = f"{made.serial_number:x}"
        dates = {
            "serial": serial,
            "issued_ms": _ms(now),
            "not_before_ms": _ms(made.not_valid_before_utc),
            "not_after_ms": _ms(made.not_valid_after_utc),
        }
        connection.execute(
            certificates.insert().values(
                serial=serial,
                site=site,
                device=device,
                key_digest=key_digest(request),
                issued_ms=_ms(now),
                not_after_ms=dates["not_after_ms"],
                pem=to_pem(made),
            )
        )
        fresh = {"enrolled_ms": _ms(now), "revoked_ms": 0, "reason": "", "labels": labels}
        statement = upsert(identities, self.store.engine.dialect.name).values(site=site, device=device, **fresh, **dates)
        change = {**dates, **(fresh if is_new else {})}
        connection.execute(statement.on_conflict_do_update(index_elements=["site", "device"], set_=change))
        return self._answer(made, site, device, labels), serial

    def _answer(self, certificate: x509.Certificate, site: str, device: str, labels: str) -> Issued:
        return Issued(
            site=site,
            device=device,
            certificate=to_pem(certificate),
            authorities=self.authority.servers_pem,
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            labels=json.loads(labels),
            broker=self.broker,
            repository=self.repository,
        )

    # --- renewal

    def renew(self, renewal: Renewal) -> Issued:
        """The next certificate of a device that has one.

        Raises:
            ArtifactError: ``identity.request``.
            TrustError: ``identity.refused``, ``identity.revoked``, ``identity.expired``.
            OperationError: ``identity.too_often``.
        """
        request, present = read_request(renewal.request), read_certificate(renewal.certificate)
        self._check_proof(renewal.signature, present, request)
        site, device = _names(present)
        now = self.now()
        grace = timedelta(days=self.authority.settings.grace_days)
        if now > present.not_valid_after_utc + grace:
            raise TrustError(
                "identity.expired",
                f"{site}/{device}: the certificate ended on {present.not_valid_after_utc:%Y-%m-%d}, too long ago to renew it.",
                hint=f'Enrol the device anew: "edgekit fleet claim {site}/{device}".',
            )
        key = key_digest(request)
        if key == key_digest(present):
            raise ArtifactError("identity.request", "the request is for the key that the device has; a new one is expected.")
        with self.store.write() as connection:
            labels = self._check_not_revoked(connection, present, site, device)
            if (again := self._find_by_key(connection, site, device, key, _ms(now))) is not None:
                return self._answer(again, site, device, labels)
            self._check_pace(connection, site, device, _ms(now))
            issued, serial = self._issue(connection, request, site, device, now, labels=labels, is_new=False)
            actor = f"device:{site}/{device}"
            self._audit(connection, actor, "identity.renewed", site, device, fields={"serial": serial})
        logger.info("event=renewed site=%s device=%s", site, device)
        return issued

    def _check_proof(self, signature: bytes, present: x509.Certificate, request: x509.CertificateSigningRequest) -> None:
        key = present.public_key()
        covered = renewal_bytes(
            present.public_bytes(serialization.Encoding.DER), request.public_bytes(serialization.Encoding.DER)
        )
        problem = TrustError("identity.refused", "the present certificate is not of this fleet, or not the sender's.")
        if not self.authority.is_ours(present) or not isinstance(key, ec.EllipticCurvePublicKey):
            raise problem
        try:
            key.verify(signature, covered, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature as error:
            raise problem from error

    def _check_not_revoked(self, connection: Connection, present: x509.Certificate, site: str, device: str) -> str:
        """The device's labels; a certificate that this database does not know is as good as its signature."""
        where = and_(identities.c.site == site, identities.c.device == device)
        known = connection.execute(select(identities).where(where)).first()
        serial = f"{present.serial_number:x}"
        row = connection.execute(select(certificates.c.revoked_ms).where(certificates.c.serial == serial)).first()
        if (known is not None and known.revoked_ms) or (row is not None and row.revoked_ms):
            raise TrustError(
                "identity.revoked",
                f"{site}/{device}: this certificate was revoked.",
                hint=f'If the device is sound, enrol it anew: "edgekit fleet claim {site}/{device}".',
            )
        return known.labels if known is not None else "{}"

    def _find_by_key(self, connection: Connection, site: str, device: str, key: str, now_ms: int) -> x509.Certificate | None:
        row = certificates.c
        found = connection.execute(
            select(row.pem).where(
                row.site == site, row.device == device, row.key_digest == key, row.revoked_ms == 0, row.not_after_ms > now_ms
            )
        ).scalar()
        return x509.load_pem_x509_certificate(found.encode()) if found else None

    def _check_pace(self, connection: Connection, site: str, device: str, now_ms: int) -> None:
        row = certificates.c
        count = connection.execute(
            select(func.count()).where(row.site == site, row.device == device, row.issued_ms > now_ms - _DAY_MS)
        ).scalar_one()
        if count >= MAX_CERTIFICATES_A_DAY:
            raise OperationError(
                "identity.too_often", f"{site}/{device}: {count} certificates within a day; the next one tomorrow."
            )

    # --- revocation

    def revoke(self, site: str, device: str, *, reason: str, actor: str) -> int:
        """Shut a device out: its certificates end, it gets no others.

        Returns:
            How many certificates were revoked that still held.

        Raises:
            UsageError: ``identity.unknown`` or ``identity.reason``.
        """
        if not reason.strip():
            raise UsageError("identity.reason", "a revocation without a reason.", hint="Say why: --reason 'stolen'.")
        now_ms = _ms(self.now())
        where = and_(identities.c.site == site, identities.c.device == device)
        with self.store.write() as connection:
            known = connection.execute(select(identities.c.revoked_ms).where(where)).first()
            if known is None:
                raise UsageError(
                    "identity.unknown", f"{site}/{device}: no such device was enrolled.", hint="See: edgekit fleet identities."
                )
            count = self._supersede(connection, site, device, now_ms)
            if not known.revoked_ms:
                connection.execute(update(identities).where(where).values(revoked_ms=now_ms, reason=reason[:2000]))
            open_claims = (claims.c.site == site, claims.c.device == device, claims.c.used_ms == 0)
            connection.execute(update(claims).where(*open_claims, claims.c.withdrawn_ms == 0).values(withdrawn_ms=now_ms))
            fields = {"certificates": count}
            self._audit(connection, actor, "identity.revoked", site, device, reason=reason, fields=fields)
        logger.warning("event=revoked site=%s device=%s certificates=%d", site, device, count)
        self.publish_revocations()
        return count

    def crl(self) -> bytes:
        """The revocation lists, PEM."""
        return self.authority.make_crl(self._revoked(), self.now())

    def _revoked(self) -> tuple[Revoked, ...]:
        """What is revoked; a certificate that has ended by itself needs no list."""
        row = certificates.c
        with self.store.read() as connection:
            found = connection.execute(
                select(row.serial, row.revoked_ms)
                .where(row.revoked_ms > 0, row.not_after_ms > _ms(self.now()) - _DAY_MS)
                .order_by(row.serial)
            ).all()
        return tuple(Revoked(serial=int(each.serial, 16), at=_moment(each.revoked_ms)) for each in found)

    def shut_out(self) -> tuple[tuple[str, str], ...]:
        """The devices that are revoked now."""
        row = identities.c
        with self.store.read() as connection:
            found = connection.execute(
                select(row.site, row.device).where(row.revoked_ms > 0).order_by(row.site, row.device)
            ).all()
        return tuple((each.site, each.device) for each in found)

    def acl(self) -> str:
        """The broker's access rules as they are now."""
        return make_acl(self.servers, self.shut_out(), more=self._own_rules())

    def publish_revocations(self) -> None:
        """Write ``crl.pem`` and ``acl`` for the broker, where it was said where, when they changed or a day is over."""
        if self.broker_dir is None:
            return
        now, state = self.now(), (self._revoked(), self.acl())
        if self._published.get("state") == state and now - self._published["at"] < timedelta(days=1):
            return
        # of two lists of one second a broker that has both would go on with the first
        now = max(now, self._published.get("at", now - timedelta(seconds=1)) + timedelta(seconds=1))
        try:
            write_durably(self.broker_dir / "crl.pem", self.authority.make_crl(state[0], now), mode=0o644)
            write_durably(self.broker_dir / "acl", state[1].encode(), mode=0o644)
        except OSError as error:  # the job comes again
            logger.error("event=revocations_not_written folder=%s error=%r", self.broker_dir, str(error))  # noqa: TRY400
            return
        self._published.update(state=state, at=now)

    def _own_rules(self) -> str:
        """What the operator adds to the access rules; it lies beside them as ``acl.local``."""
        try:
            return (self.broker_dir / LOCAL_RULES).read_text(encoding="utf-8") if self.broker_dir else ""
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            logger.error("event=own_rules_unread error=%r", str(error))  # noqa: TRY400 - those of the fleet hold without them
            return ""

    # --- what there is

    def page(self, *, state: str = "", search: str = "", after: str = "", limit: int = 100) -> IdentityPage:
        """Identities by site and device.

        Args:
            state: only ``valid``, ``due``, ``expired`` or ``revoked`` ones.
            search: part of site or device.
            after: the ``next`` of the page before.
            limit: most on a page.
        """
        now_ms = _ms(self.now())
        row = identities.c
        statement = select(identities).order_by(row.site, row.device).limit(limit + 1)
        if after:
            site, _, device = after.partition("/")
            statement = statement.where(or_(row.site > site, and_(row.site == site, row.device > device)))
        if search:
            statement = statement.where(or_(*(each.contains(search, autoescape=True) for each in (row.site, row.device))))
        due_ms = row.not_before_ms + (row.not_after_ms - row.not_before_ms) * 2 / 3 + _DAY_MS
        match state:
            case "revoked":
                statement = statement.where(row.revoked_ms > 0)
            case "expired":
                statement = statement.where(row.revoked_ms == 0, row.not_after_ms <= now_ms)
            case "due":
                statement = statement.where(row.revoked_ms == 0, row.not_after_ms > now_ms, due_ms <= now_ms)
            case "valid":
                statement = statement.where(row.revoked_ms == 0, row.not_after_ms > now_ms, due_ms > now_ms)
        with self.store.read() as connection:
            found = connection.execute(statement).all()
        views = tuple(_identity_view(each, now_ms) for each in found[:limit])
        following = f"{views[-1].site}/{views[-1].device}" if len(found) > limit else ""
        return IdentityPage(identities=views, next=following)

    def _audit(
        self,
        connection: Connection,
        actor: str,
        action: str,
        site: str,
        device: str,
        *,
        reason: str = "",
        fields: Mapping[str, str | int] | None = None,
    ) -> None:
        record(
            connection,
            actor=actor,
            action=action,
            subject=f"device:{site}/{device}",
            reason=reason,
            fields=dict(fields or {}),
            now_ms=_ms(self.now()),
        )


def _check_labels(labels: Mapping[str, str]) -> None:
    if len(labels) > MAX_LABELS or any(
        not name or len(name) > MAX_LABEL_LETTERS or len(value) > MAX_LABEL_LETTERS for name, value in labels.items()
    ):
        raise UsageError(
            "claim.labels", f"labels: expected at most {MAX_LABELS}, names and values of up to {MAX_LABEL_LETTERS}."
        )


def _names(certificate: x509.Certificate) -> tuple[str, str]:
    """Site and device of one of our certificates."""
    found = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    site, _, device = str(found[0].value).partition("/") if found else ("", "", "")
    return check_name(site, "site"), check_name(device, "device")


def _identity_view(row: Row[Any], now_ms: int) -> IdentityView:
    due_ms = row.not_before_ms + (row.not_after_ms - row.not_before_ms) * DUE_SHARE + _DAY_MS
    state: IdentityState = "valid"
    if row.revoked_ms:
        state = "revoked"
    elif row.not_after_ms <= now_ms:
        state = "expired"
    elif due_ms <= now_ms:
        state = "due"
    return IdentityView(
        site=row.site,
        device=row.device,
        state=state,
        serial=row.serial,
        not_before_ms=row.not_before_ms,
        not_after_ms=row.not_after_ms,
        issued_ms=row.issued_ms,
        enrolled_ms=row.enrolled_ms,
        revoked_ms=row.revoked_ms,
        reason=row.reason,
        labels=json.loads(row.labels),
    )


def _claim_view(row: Row[Any], now_ms: int) -> ClaimView:
    state: ClaimState = (
        "used" if row.used_ms else "withdrawn" if row.withdrawn_ms else "expired" if row.expires_ms <= now_ms else "open"
    )
    return ClaimView(
        id=row.id,
        site=row.site,
        device=row.device,
        created_ms=row.created_ms,
        created_by=row.created_by,
        expires_ms=row.expires_ms,
        state=state,
        used_ms=row.used_ms,
        labels=json.loads(row.labels),
    )
