"""The tables of the releases before alembic."""

from __future__ import annotations

from alembic import op

from edgekit.fleet.migrations import release_2

revision = "0002"
down_revision = None


def upgrade() -> None:
    """Make them, in a database that has none."""
    release_2.metadata.create_all(op.get_bind())
