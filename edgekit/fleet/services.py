"""What the parts of the server know of each other: one object, filled in order by :mod:`edgekit.fleet.assembly`.

A part that is not there is None, and those that would use it do without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit.fleet.config import BrokerAddress, FleetConfig
from edgekit.fleet.jobs import Jobs
from edgekit.fleet.store import Store
from edgekit.schema.desired import DesiredState

if TYPE_CHECKING:
    from edgekit.fleet.alerting.service import Alerts
    from edgekit.fleet.catalog import Catalog
    from edgekit.fleet.desired import DesiredDesk
    from edgekit.fleet.ingest import Ingest
    from edgekit.fleet.publisher import Publisher
    from edgekit.fleet.rollout.experiments import Experiments
    from edgekit.fleet.rollout.service import RolloutService
    from edgekit.fleet.work.orders import Work

SignDesired = Callable[[DesiredState], bytes]
"""Signs with the fleet's key, which this process was given by its command line and no part of the server reads."""


@dataclass
class Services:
    """The parts of one server."""

    config: FleetConfig
    store: Store
    jobs: Jobs
    ingest: Ingest | None = None
    address: BrokerAddress | None = None
    """The broker that the ingest follows, for those who publish."""
    catalog: Catalog | None = None
    sign_desired: SignDesired | None = None
    publisher: Publisher | None = None
    desk: DesiredDesk | None = None
    """Issues desired states."""
    rollouts: RolloutService | None = None
    experiments: Experiments | None = None
    watch: Any = None
    alerts: Alerts | None = None
    identity: Any = None
    work: Work | None = None
    access: Any = None
