"""Claims, identities and certificates. Of a claim's secret only the hash is kept; of a device's key only the certificate."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, LargeBinary, String, Table, Text

from edgekit.fleet.tables import metadata

claims = Table(
    "claims",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("secret_hash", LargeBinary, nullable=False),
    Column("site", String(64), nullable=False),
    Column("device", String(64), nullable=False),
    Column("labels", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("created_by", String(200), nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Column("used_ms", BigInteger, nullable=False, default=0),
    Column("key_digest", String(64), nullable=False, default=""),
    Column("withdrawn_ms", BigInteger, nullable=False, default=0),
)
Index("claims_by_device", claims.c.site, claims.c.device)

identities = Table(
    "identities",
    metadata,
    Column("site", String(64), primary_key=True),
    Column("device", String(64), primary_key=True),
    Column("enrolled_ms", BigInteger, nullable=False),
    Column("revoked_ms", BigInteger, nullable=False, default=0),
    Column("reason", String(2000), nullable=False, default=""),
    Column("serial", String(40), nullable=False),
    Column("not_before_ms", BigInteger, nullable=False),
    Column("not_after_ms", BigInteger, nullable=False),
    Column("issued_ms", BigInteger, nullable=False),
    Column("labels", Text, nullable=False),
)

certificates = Table(
    "certificates",
    metadata,
    Column("serial", String(40), primary_key=True),
    Column("site", String(64), nullable=False),
    Column("device", String(64), nullable=False),
    Column("key_digest", String(64), nullable=False),
    Column("issued_ms", BigInteger, nullable=False),
    Column("not_after_ms", BigInteger, nullable=False),
    Column("revoked_ms", BigInteger, nullable=False, default=0),
    Column("pem", Text, nullable=False),
)
Index("certificates_by_device", certificates.c.site, certificates.c.device)
Index("certificates_by_revocation", certificates.c.revoked_ms)
