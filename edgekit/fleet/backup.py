"""A copy of the fleet's database while the server goes on, and back into an empty one.

SQLite is copied by its own backup, page by page and consistent; PostgreSQL by ``pg_dump`` and ``pg_restore``, which must be
of the server's version or newer. A copy is complete or not there at all.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

from sqlalchemy import inspect
from sqlalchemy.engine import URL, make_url

from edgekit.durable import sync_folder
from edgekit.errors import EnvironmentFault, UsageError
from edgekit.fleet.database import database_url, make_engine, shown_url

PAGES_A_STEP = 2048
_HINT = "Give another file, or a new database."


def back_up(database: str, target: Path) -> int:
    """Copy a database into a new file, readable by its owner alone; its size in bytes.

    Raises:
        UsageError: ``backup.exists``, ``fleet.database``.
        EnvironmentFault: ``backup.failed``, ``backup.no_tool``.
    """
    if target.exists():
        raise UsageError("backup.exists", f"{target}: it exists already.", hint=_HINT)
    url = make_url(database_url(database))
    partial = target.with_name(f".new-{target.name}")
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600))
    try:
        if url.get_backend_name() == "sqlite":
            _copy_sqlite(_existing(url), partial)
        else:
            _run("pg_dump", "--format=custom", f"--file={partial}", url=url)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(target)
        sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)
    return target.stat().st_size


def restore(source: Path, database: str) -> None:
    """Put a backup into a database that is empty or not there.

    Raises:
        UsageError: ``backup.missing``, ``backup.not_empty``.
        EnvironmentFault: ``backup.damaged``, ``backup.failed``, ``backup.no_tool``.
    """
    if not source.is_file():
        raise UsageError("backup.missing", f"{source}: no such file.")
    url = make_url(database_url(database))
    if url.get_backend_name() == "sqlite":
        _restore_sqlite(source, Path(url.database or ""))
        return
    engine = make_engine(database)
    try:
        with engine.connect() as connection:
            names = inspect(connection).get_table_names()
    finally:
        engine.dispose()
    if names:
        text = f"{shown_url(database)}: it has {len(names)} tables already."
        raise UsageError("backup.not_empty", text, hint="Restore into a new database.")
    _run("pg_restore", "--no-owner", "--exit-on-error", "--single-transaction", str(source), url=url, names_database=True)


def _existing(url: URL) -> Path:
    path = Path(url.database or "")
    if not path.is_file():
        raise UsageError("fleet.database", f"{path}: no such file.", hint="Give the --db of edgekit fleet serve.")
    return path


def _copy_sqlite(source: Path, target: Path) -> None:
    try:
        with closing(sqlite3.connect(source)) as reader, closing(sqlite3.connect(target)) as writer:
            reader.backup(writer, pages=PAGES_A_STEP, sleep=0.01)
            writer.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.Error as error:
        raise EnvironmentFault("backup.failed", f"{source}: cannot be copied: {error}.") from error


def _restore_sqlite(source: Path, target: Path) -> None:
    if target.exists():
        raise UsageError("backup.not_empty", f"{target}: it exists already.", hint="Restore into a new file.")
    try:
        with closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as reader:
            found = reader.execute("PRAGMA integrity_check").fetchone()[0]
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        raise EnvironmentFault("backup.damaged", f"{source}: the backup is damaged: {found}.", hint="Take an older one.")
    partial = target.with_name(f".new-{target.name}")
    partial.unlink(missing_ok=True)
    try:
        _copy_sqlite(source, partial)
        partial.chmod(0o600)
        partial.rename(target)
        sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def _run(tool: str, *arguments: str, url: URL, names_database: bool = False) -> None:
    """A tool of PostgreSQL; the password goes by the environment, not by the command line."""
    if shutil.which(tool) is None:
        raise EnvironmentFault("backup.no_tool", f"{tool} is not installed.", hint="Install PostgreSQL's client programs.")
    address = url.set(drivername="postgresql", password=None).render_as_string(hide_password=False)
    environment = os.environ | ({"PGPASSWORD": str(url.password)} if url.password else {})
    where = [f"--dbname={address}"]
    done = subprocess.run(  # noqa: S603 - the program's own name and arguments
        [tool, *where, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[0]
        what = "backup.damaged" if names_database and "input file" in done.stderr else "backup.failed"
        raise EnvironmentFault(what, f"{tool}: {said}.")
