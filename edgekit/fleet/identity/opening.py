"""Opens the identity service as a server's configuration says, with its job: revocations for the broker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.fleet.config import FleetConfig
from edgekit.fleet.identity.authority import Authority
from edgekit.fleet.identity.service import Identity

if TYPE_CHECKING:
    from edgekit.fleet.jobs import Jobs
    from edgekit.fleet.store import Store

REFRESH_SECONDS = 30.0
"""Another server may have revoked; a file is only written when something changed, and once a day."""


def open_identity(config: FleetConfig, store: Store, jobs: Jobs) -> Identity | None:
    """The service, or None for a server without an authority.

    Raises:
        UsageError: ``identity.no_authority`` or ``identity.key_mode``.
        ArtifactError: a file of the authority is damaged.
    """
    if not config.authority:
        return None
    authority = Authority.open(Path(config.authority))
    authority.check_key()
    identity = Identity(
        store=store,
        authority=authority,
        broker=config.device_broker,
        repository=config.device_repository,
        broker_dir=Path(config.broker_dir) if config.broker_dir else None,
        servers=authority.settings.servers,
    )
    if identity.broker_dir is not None:
        # every server writes what its own broker reads
        jobs.every(REFRESH_SECONDS, "revocations", identity.publish_revocations, is_leader_only=False)
    return identity
