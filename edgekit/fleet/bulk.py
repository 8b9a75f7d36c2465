"""Many rows into a table at once, in the quickest way that each database has.

A row whose key is there already is passed over, so that the same batch may be written twice. SQLite takes prepared statements;
PostgreSQL takes COPY, and an insert that looks at conflicts only when there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, Connection, Float, Integer, LargeBinary, Table
from sqlalchemy.exc import DBAPIError, IntegrityError

Row = tuple[Any, ...]
_COPY_TYPES = ((Boolean, "bool"), (BigInteger, "int8"), (Integer, "int4"), (Float, "float8"), (LargeBinary, "bytea"))


def columns_of(table: Table) -> tuple[str, ...]:
    """The columns in the order in which rows have them: all but a key that the database counts by itself."""
    return tuple(column.name for column in table.columns if column.name != "id")


def insert_rows(connection: Connection, table: Table, rows: Sequence[Row]) -> None:
    """Insert rows inside the caller's transaction; those whose key is there already are left as they are.

    Args:
        connection: to SQLite or PostgreSQL.
        table: where to.
        rows: values in the order of ``columns_of(table)``.
    """
    if not rows:
        return
    if connection.dialect.name != "postgresql":
        connection.exec_driver_sql(_insert_statement(table, "?"), list(rows))
        return
    try:
        with connection.begin_nested():
            _copy(connection, table, rows)
    except IntegrityError:
        connection.exec_driver_sql(_insert_statement(table, "%s"), list(rows))


def _insert_statement(table: Table, mark: str) -> str:
    names = columns_of(table)
    marks = ", ".join([mark] * len(names))
    return f"INSERT INTO {table.name} ({_quoted(names)}) VALUES ({marks}) ON CONFLICT DO NOTHING"  # noqa: S608 - our own names


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _copy_type(column: Column[Any]) -> str:
    kind = column.type
    for of, name in _COPY_TYPES:
        if isinstance(kind, of):
            return name
    return "varchar"


def _copy(connection: Connection, table: Table, rows: Sequence[Row]) -> None:
    """COPY in its binary form.

    Raises:
        IntegrityError: a key is there already.
        DBAPIError: another of its subclasses, for what else the database says.
    """
    import psycopg  # noqa: PLC0415 - only where PostgreSQL is used

    names = columns_of(table)
    statement = f"COPY {table.name} ({_quoted(names)}) FROM STDIN (FORMAT BINARY)"
    raw: Any = connection.connection.driver_connection
    try:
        with raw.cursor() as cursor, cursor.copy(statement) as copy:
            copy.set_types([_copy_type(table.columns[name]) for name in names])
            for row in rows:
                copy.write_row(row)
    except psycopg.Error as error:
        raise DBAPIError.instance(statement, None, error, psycopg.Error, dialect=connection.dialect) from error
