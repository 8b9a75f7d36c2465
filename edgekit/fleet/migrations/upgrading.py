"""Opens a fleet database at today's schema: made whole when it is empty, upgraded in one transaction when it is older.

A database that a newer edgekit made is refused, and nothing in it is touched. Several servers that start at once upgrade it
once: SQLite's writer holds the file, PostgreSQL an advisory lock. alembic is imported only when there is something to
upgrade.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Column, Connection, MetaData, String, Table, column, inspect, select, table, text

from edgekit.errors import EnvironmentFault
from edgekit.fleet import tables
from edgekit.fleet.tables import upsert
from edgekit.schema.base import Record

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0003"
"""The revision of today's tables."""
ADOPTED = "0002"
"""The revision that releases before alembic correspond to; their number is in the table ``meta``."""
ADOPTED_VERSION = 2
VERSION_TABLE = "alembic_version"
_LOCK = 4_203_960_001
_FOLDER = Path(__file__).resolve().parent
_versions = table(VERSION_TABLE, column("version_num", String))


class SchemaStatus(Record, frozen=True, kw_only=True):
    """Which schema a database has: its revision, empty for an empty database, and the newest that this edgekit knows."""

    revision: str
    newest: str
    pending: tuple[str, ...] = ()
    """Revisions to go, oldest first."""


def alembic_config(connection: Connection, metadata: MetaData) -> Config:
    """Alembic's configuration without any file."""
    from alembic.config import Config  # noqa: PLC0415 - 60 ms that an up-to-date database does not need

    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    config.attributes["metadata"] = metadata
    return config


def revision_of(connection: Connection) -> str:
    """The database's revision: empty when it has no tables, ``0002`` or less for those before alembic."""
    found = inspect(connection)
    if found.has_table(VERSION_TABLE):
        return connection.execute(select(_versions.c.version_num)).scalar() or ""
    if not found.has_table("meta") or not found.has_table("devices"):
        return ""
    version = connection.execute(select(tables.meta.c.value).where(tables.meta.c.key == "schema_version")).scalar()
    return f"{int(version):04d}" if version and version.isdecimal() else ADOPTED


def known_revisions() -> tuple[str, ...]:
    """Every revision of this edgekit, oldest first."""
    return tuple(sorted(path.name[1:5] for path in (_FOLDER / "versions").glob("r[0-9][0-9][0-9][0-9]_*.py")))


def read_status(connection: Connection) -> SchemaStatus:
    """Where a database stands."""
    revision = revision_of(connection)
    pending = tuple(number for number in known_revisions() if number > revision) if revision else ()
    return SchemaStatus(revision=revision, newest=HEAD, pending=pending)


def prepare(connection: Connection, metadata: MetaData, shown: str) -> None:
    """Bring a database to today's schema inside the caller's transaction.

    Args:
        connection: in a transaction that writes.
        metadata: every table of today.
        shown: the database's address, for the error.

    Raises:
        EnvironmentFault: ``store.newer``.
    """
    if revision_of(connection) == HEAD:
        _check_meta(connection, shown)
        return
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    revision = revision_of(connection)
    if not revision:
        metadata.create_all(connection)
        _stamp(connection, HEAD)
    elif revision > HEAD:
        raise _newer(shown, revision)
    elif revision < HEAD:
        _upgrade(connection, metadata, revision)
    _write_meta(connection)


def _upgrade(connection: Connection, metadata: MetaData, revision: str) -> None:
    from alembic import command  # noqa: PLC0415 - see alembic_config

    from edgekit.fleet.migrations import release_2  # noqa: PLC0415

    if revision <= ADOPTED:
        release_2.complete(connection)
        _stamp(connection, ADOPTED)
    command.upgrade(alembic_config(connection, metadata), HEAD)


def _stamp(connection: Connection, revision: str) -> None:
    """Write the revision down as alembic does."""
    made = Table(VERSION_TABLE, MetaData(), Column("version_num", String(32), primary_key=True))
    made.create(connection, checkfirst=True)
    connection.execute(made.delete())
    connection.execute(made.insert().values(version_num=revision))


def _write_meta(connection: Connection) -> None:
    """The number that releases before alembic look at, so that they refuse what they do not know."""
    statement = upsert(tables.meta, connection.dialect.name).values(key="schema_version", value=str(int(HEAD)))
    connection.execute(statement.on_conflict_do_update(index_elements=["key"], set_={"value": str(int(HEAD))}))
    # writers lock this row: it has to be there before the first of them
    first = upsert(tables.meta, connection.dialect.name).values(key=tables.ROLLED_UNTIL, value="0")
    connection.execute(first.on_conflict_do_nothing())


def _check_meta(connection: Connection, shown: str) -> None:
    found = connection.execute(select(tables.meta.c.value).where(tables.meta.c.key == "schema_version")).scalar()
    if found is not None and found.isdecimal() and int(found) > int(HEAD):
        raise _newer(shown, f"{int(found):04d}")


def _newer(shown: str, revision: str) -> EnvironmentFault:
    message = f"{shown}: its schema is revision {revision}, this edgekit knows up to {HEAD}."
    return EnvironmentFault("store.newer", message, hint="Update edgekit, or use another database.")
