"""The database below the store: SQLite in a file or PostgreSQL by URL, opened so that both keep the same promises.

A transaction that was committed survives a power cut: SQLite runs with a write-ahead log that is synced at every commit
(``synchronous=FULL``), PostgreSQL as it comes. A writer of SQLite takes the write lock when it begins, so that two processes
on one file wait for each other instead of failing half-way.

>>> database_url("fleet.db"), database_url("postgresql://me@db/fleet")
('sqlite:///fleet.db', 'postgresql+psycopg://me@db/fleet')
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.pool import StaticPool

from edgekit.errors import EnvironmentFault, UsageError

POOL_CONNECTIONS = 10
POOL_OVERFLOW = 40
BUSY_MS = 10_000
SQLITE_SYNCHRONOUS = "FULL"
_WRITES = "edgekit_writes"
_DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg", "sqlite": "sqlite"}
_SUPPORTED = ("sqlite", "postgresql")


def database_url(text: str) -> str:
    """A SQLAlchemy URL: as given, with the driver that is installed here, or SQLite in a file."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return f"sqlite:///{Path(text)}"
    return f"{_DRIVERS.get(scheme, scheme)}://{rest}"


def is_memory(url: str) -> bool:
    """Whether a URL is SQLite's database that lives in this process only."""
    return url in {"sqlite://", "sqlite:///:memory:"}


def shown_url(text: str) -> str:
    """A database's address for people and logs, without its password."""
    try:
        return make_url(text).render_as_string(hide_password=True) if "://" in text else text
    except ArgumentError:
        return text.rpartition("@")[2]


def make_engine(text: str) -> Engine:
    """An engine for a URL or a path.

    Raises:
        UsageError: ``config.database`` for an address that is none, or another kind of database.
        EnvironmentFault: ``store.no_driver`` when its driver is not installed.
    """
    url = database_url(text)
    hint = "Give a path to an SQLite file, or postgresql://user@host/database."
    try:
        kind = make_url(url).get_backend_name()
        if kind not in _SUPPORTED:
            raise UsageError("config.database", f"database {shown_url(text)!r}: {kind} is not supported.", hint=hint)
        engine = _make_sqlite(url) if kind == "sqlite" else _make_postgres(url)
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise UsageError("config.database", f"database {shown_url(text)!r}: not an address.", hint=hint) from error
    except ImportError as error:
        message = f"database {shown_url(text)!r}: its driver is not installed."
        raise EnvironmentFault("store.no_driver", message, hint="pip install 'edgekit[fleet]'") from error
    return engine


def _make_postgres(url: str) -> Engine:
    return create_engine(url, pool_pre_ping=True, pool_size=POOL_CONNECTIONS, max_overflow=POOL_OVERFLOW)


def _make_sqlite(url: str) -> Engine:
    if is_memory(url):
        engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    else:
        engine = create_engine(url, pool_size=POOL_CONNECTIONS, max_overflow=POOL_OVERFLOW)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself: _begin does
        cursor = connection.cursor()
        pragmas = (f"busy_timeout={BUSY_MS}", "journal_mode=WAL", f"synchronous={SQLITE_SYNCHRONOUS}", "foreign_keys=ON")
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        is_writer = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")

    return engine


def writing(engine: Engine) -> Engine:
    """The same engine for transactions that write."""
    return engine.execution_options(**{_WRITES: True})
