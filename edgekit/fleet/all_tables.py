"""Every module that defines tables, imported once, so that ``metadata`` knows them all."""

from __future__ import annotations

from edgekit.fleet import audit, jobs
from edgekit.fleet.access import tables as access_tables
from edgekit.fleet.alerting import tables as alerting_tables
from edgekit.fleet.identity import tables as identity_tables
from edgekit.fleet.rollout import tables as rollout_tables
from edgekit.fleet.tables import metadata
from edgekit.fleet.watch import tables as watch_tables
from edgekit.fleet.work import tables as work_tables

TABLE_MODULES = (work_tables, alerting_tables, audit, rollout_tables, jobs, identity_tables, access_tables, watch_tables)

__all__ = ["TABLE_MODULES", "metadata"]
