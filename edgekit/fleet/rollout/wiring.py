"""Rollouts as a part of the server: the service over its parts, and the job that takes its turns."""

from __future__ import annotations

import time

from edgekit.errors import EdgekitError
from edgekit.fleet.desired import DesiredDesk
from edgekit.fleet.publisher import Publisher
from edgekit.fleet.rollout.experiments import Experiments
from edgekit.fleet.rollout.gates import Profiles
from edgekit.fleet.rollout.service import RolloutService
from edgekit.fleet.services import Services
from edgekit.schema.baseline import ReferenceProfile

TURN_SECONDS = 2.0
EXPERIMENT_SECONDS = 60.0


def open_rollouts(services: Services) -> RolloutService:
    """The service; its job is registered and runs when the server does."""
    desk = DesiredDesk(services.store, sign=services.sign_desired, publisher=None)
    service = RolloutService(services.store, desk, catalog=services.catalog, profiles=_profiles(services))

    def turn() -> None:
        desk.publisher = services.publisher
        service.turn(time.time_ns() // 1_000_000)

    services.jobs.every(TURN_SECONDS, "rollouts", turn)
    services.desk = desk
    experiments = services.experiments = Experiments(services.store, desk)
    services.jobs.every(EXPERIMENT_SECONDS, "experiments", lambda: experiments.turn(time.time_ns() // 1_000_000))
    return service


def open_publisher(services: Services) -> Publisher:
    """The connection by which devices are told; where the broker forgets what it retained, everything is sent again."""
    assert services.address is not None

    def connected() -> None:
        if services.desk is not None and services.ingest is not None:
            services.desk.forget_published()
            services.jobs.wake("rollouts")

    return Publisher(services.address, client_id=f"{services.config.client_id}-publisher", on_connected=connected)


def _profiles(services: Services) -> Profiles:
    def find(crc: int) -> ReferenceProfile | None:
        catalog = services.catalog
        if catalog is None:
            return None
        for release in catalog.releases():
            try:
                found = catalog.profile(release.manifest_digest)
            except EdgekitError:
                continue
            if found is not None and found[1] == crc:
                return found[0]
        return None

    cache: dict[int, ReferenceProfile | None] = {}

    def cached(crc: int) -> ReferenceProfile | None:
        if cache.get(crc) is None:
            cache[crc] = find(crc)
        return cache[crc]

    return cached
