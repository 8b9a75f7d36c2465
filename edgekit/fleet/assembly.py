"""Puts the parts of the server together, in the order in which they need each other.

Each part offers ``make_router(services)`` and, where it works by itself, ``start(services)``, which registers jobs only.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path

from fastapi import APIRouter

from edgekit.errors import RepositoryError
from edgekit.fleet import probes, prometheus
from edgekit.fleet.access import api as access_api
from edgekit.fleet.access.service import Access
from edgekit.fleet.alerting import api as alerting_api
from edgekit.fleet.alerting.wiring import open_alerts
from edgekit.fleet.catalog import Catalog
from edgekit.fleet.config import FleetConfig
from edgekit.fleet.identity import api as identity_api
from edgekit.fleet.identity.opening import open_identity
from edgekit.fleet.jobs import Jobs
from edgekit.fleet.retention import PERIOD_SECONDS, Keeper
from edgekit.fleet.rollout import api as rollout_api
from edgekit.fleet.rollout.wiring import open_publisher, open_rollouts
from edgekit.fleet.services import Services, SignDesired
from edgekit.fleet.store import Store
from edgekit.fleet.watch import api as watch_api
from edgekit.fleet.watch.service import open_watch
from edgekit.fleet.work import api as work_api
from edgekit.fleet.work.orders import Work
from edgekit.loopback import is_loopback
from edgekit.trust.transport import TransportOptions

logger = logging.getLogger(__name__)

CATALOG_SECONDS = 60.0


def data_dir(config: FleetConfig) -> Path:
    """Where the server keeps what is no row of the database."""
    if config.data_dir:
        return Path(config.data_dir)
    return Path("edgekit-fleet.data") if "://" in config.database else Path(config.database).with_suffix(".data")


def _open_catalog(config: FleetConfig) -> Catalog | None:
    if not config.repository:
        return None
    options = TransportOptions(
        ca_file=config.ca_file or None, client_cert_file=config.cert_file or None, client_key_file=config.key_file or None
    )
    folder = data_dir(config) / "catalog"
    return Catalog(config.repository, root_file=Path(config.repository_root), cache_dir=folder, options=options)


def assemble(config: FleetConfig, store: Store, *, sign_desired: SignDesired | None = None) -> Services:
    """Make every part over a store; nothing runs yet.

    Raises:
        UsageError: a part's configuration is wrong.
    """
    services = Services(config=config, store=store, jobs=Jobs(store, owner=config.client_id), sign_desired=sign_desired)
    services.catalog = _open_catalog(config)
    if services.catalog is not None:
        services.jobs.every(CATALOG_SECONDS, "catalog", lambda: _refresh(services), is_leader_only=False)
    services.identity = open_identity(config, store, services.jobs)
    services.rollouts = open_rollouts(services)
    keeper = Keeper(store)
    services.jobs.every(PERIOD_SECONDS, "retention", lambda: _keep(keeper))
    services.watch = open_watch(services)
    services.work = Work(store)
    services.alerts = open_alerts(services)
    services.access = Access(store, token=config.token, oidc=config.oidc, may_be_open=is_loopback(config.host))
    return services


def _keep(keeper: Keeper) -> None:
    keeper.run()


def _refresh(services: Services) -> None:
    assert services.catalog is not None
    try:
        services.catalog.refresh(datetime.now(UTC))
    except RepositoryError as error:
        logger.warning("event=repository_unreachable error=%r", error.message)


def make_routers(services: Services) -> list[APIRouter]:
    """The API of every part."""
    routers: list[APIRouter] = []
    assert services is not None
    routers += [probes.make_router(services), identity_api.make_router(services)]
    routers.append(rollout_api.make_router(services))
    routers.append(watch_api.make_router(services))
    routers.append(work_api.make_router(services))
    routers += [alerting_api.make_router(services), prometheus.make_router(services)]
    routers.append(access_api.make_router(services))
    return routers


def start(services: Services) -> None:
    """Begin what runs in the background."""
    if services.address is not None and services.sign_desired is not None:
        services.publisher = open_publisher(services)
        services.publisher.start()
    services.jobs.start()


def stop(services: Services) -> None:
    """End it, in the opposite order."""
    services.jobs.stop()
    if services.publisher is not None:
        services.publisher.stop()
