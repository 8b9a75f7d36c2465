"""``python -m edgekit.fleet.migrations freeze``: write the newest revision's module again from today's tables.

Only as long as that revision has not been released: afterwards a change of the tables is a new revision, whose number goes into
``upgrading.HEAD``. ``python -m edgekit.fleet.migrations check`` says whether the revisions make today's tables.
"""

from __future__ import annotations

import sys
from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata, produce_migrations, render_python_code
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData, create_engine

from edgekit.fleet.all_tables import metadata
from edgekit.fleet.migrations.upgrading import HEAD, alembic_config, known_revisions

_FOLDER = Path(__file__).resolve().parent / "versions"
_MODULE = '''"""{title}"""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

from edgekit.fleet.migrations.backfill import fill_boots, fill_devices

revision = "{revision}"
down_revision = "{before}"


def upgrade() -> None:
    """Written by ``python -m edgekit.fleet.migrations freeze``."""
    {body}
    fill_devices(op.get_bind())
    fill_boots(op.get_bind(), time.time_ns() // 1_000_000)
'''


def differences(connection: Connection, target: MetaData) -> list[object]:
    """What a database has otherwise than today's tables; empty when nothing."""
    return list(compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), target))


def _freeze() -> None:
    before = [number for number in known_revisions() if number < HEAD][-1]
    path = next(iter(_FOLDER.glob(f"r{HEAD}_*.py")), _FOLDER / f"r{HEAD}_fleet.py")
    path.unlink(missing_ok=True)
    with create_engine("sqlite://").begin() as connection:
        command.upgrade(alembic_config(connection, metadata), before)
        operations = produce_migrations(MigrationContext.configure(connection), metadata).upgrade_ops
    code = "" if operations is None else render_python_code(operations)
    lines = [line.strip() for line in code.splitlines() if line.strip() and not line.strip().startswith("#")]
    body = "\n    ".join(lines) or "pass"
    title = "Groups, rollouts, identity, watching, alerts and access; devices' facts as columns."
    path.write_text(_MODULE.format(title=title, revision=HEAD, before=before, body=body))
    sys.stdout.write(f"{path}\n")


def _check() -> int:
    with create_engine("sqlite://").begin() as connection:
        command.upgrade(alembic_config(connection, metadata), HEAD)
        found = differences(connection, metadata)
    for item in found:
        sys.stdout.write(f"{item}\n")
    return 1 if found else 0


def main(arguments: list[str]) -> int:
    """Run one of the two verbs."""
    match arguments:
        case ["freeze"]:
            _freeze()
            return 0
        case ["check"]:
            return _check()
        case _:
            sys.stderr.write(f"{__doc__}\n")
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
