"""What alembic runs: on the connection that :mod:`edgekit.fleet.migrations.upgrading` gives it, in that one's transaction."""

from __future__ import annotations

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=context.config.attributes["metadata"],
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
