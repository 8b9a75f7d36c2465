"""Work in the background: each job in a thread of its own, at its own period, and only on one server of a group.

A job that fails is logged, counted and tried again at its next turn; it never ends the server. With several servers on one
database a job runs where its lease is: a row that its holder renews while it lives and that another takes over when it lapses.
What a job does must be safe to do twice, since a holder that was held up for longer than its lease does not know it yet.

>>> from edgekit.fleet.store import Store
>>> jobs = Jobs(Store("sqlite://"), owner="fleet-1")
>>> jobs.every(60.0, "tidy", lambda: None)
>>> jobs.run_once("tidy")
True
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sqlalchemy import BigInteger, Column, String, Table, select, update
from sqlalchemy.exc import SQLAlchemyError

from edgekit.errors import EdgekitError
from edgekit.fleet.tables import metadata, upsert
from edgekit.schema.base import Record

if TYPE_CHECKING:
    from edgekit.fleet.store import Store

logger = logging.getLogger(__name__)

MIN_LEASE_S = 15.0
STOP_SECONDS = 10.0
REST = 4.0
"""A job rests for so many times as long as its last run took, so that none takes more than a fifth of a processor."""

leases = Table(
    "leases",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("until_ms", BigInteger, nullable=False),
)


class JobView(Record, frozen=True, kw_only=True):
    """How a job is doing on this server."""

    name: str
    period_s: float
    runs: int
    failures: int
    last_error: str = ""
    last_run_ms: int = 0
    last_seconds: float = 0.0
    is_leader: bool = False


@dataclass
class _Job:
    name: str
    period_s: float
    function: Callable[[], None]
    is_leader_only: bool
    runs: int = 0
    failures: int = 0
    last_error: str = ""
    last_run_ms: int = 0
    last_seconds: float = 0.0
    is_leader: bool = False
    wake: threading.Event = field(default_factory=threading.Event)
    busy: threading.Lock = field(default_factory=threading.Lock)

    def view(self) -> JobView:
        return JobView(
            name=self.name,
            period_s=self.period_s,
            runs=self.runs,
            failures=self.failures,
            last_error=self.last_error,
            last_run_ms=self.last_run_ms,
            last_seconds=self.last_seconds,
            is_leader=self.is_leader,
        )


def hold_lease(store: Store, name: str, *, owner: str, seconds: float, now_ms: int) -> bool:
    """Take or renew a lease; False while another holds it."""
    until_ms = now_ms + round(seconds * 1000)
    with store.write() as connection:
        connection.execute(
            upsert(leases, store.engine.dialect.name)
            .values(name=name, owner=owner, until_ms=until_ms)
            .on_conflict_do_nothing(index_elements=["name"])
        )
        taken = connection.execute(
            update(leases)
            .where(leases.c.name == name, (leases.c.owner == owner) | (leases.c.until_ms < now_ms))
            .values(owner=owner, until_ms=until_ms)
        )
        return bool(taken.rowcount)


def drop_leases(store: Store, owner: str) -> None:
    """Let others go on at once: what a server does when it stops."""
    with store.write() as connection:
        connection.execute(leases.delete().where(leases.c.owner == owner))


def lease_owner(store: Store, name: str) -> str:
    """Who holds a lease, or held it last; empty when nobody ever did."""
    with store.read() as connection:
        return connection.execute(select(leases.c.owner).where(leases.c.name == name)).scalar() or ""


class Jobs:
    """The jobs of one server.

    Args:
        store: where the leases are.
        owner: this server's name, unique among those that share the database.
        now_ms: the clock.
    """

    def __init__(self, store: Store, *, owner: str, now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        self._store, self._owner, self._now_ms = store, owner, now_ms
        self._jobs: dict[str, _Job] = {}
        self._threads: list[threading.Thread] = []
        self._is_stopping = threading.Event()
        self._is_started = False

    def every(self, seconds: float, name: str, function: Callable[[], None], *, is_leader_only: bool = True) -> None:
        """Run a function again and again, ``seconds`` from the end of one run to the begin of the next.

        Raises:
            ValueError: when the name is taken, which is a mistake in the program.
        """
        if name in self._jobs:
            raise ValueError(f"job {name!r} exists already")
        self._jobs[name] = _Job(name=name, period_s=seconds, function=function, is_leader_only=is_leader_only)
        if self._is_started:
            self._begin(self._jobs[name])

    def start(self) -> None:
        """Begin all jobs; those that are added later begin at once."""
        self._is_started = True
        for job in self._jobs.values():
            self._begin(job)

    def _begin(self, job: _Job) -> None:
        thread = threading.Thread(target=self._loop, args=(job,), name=f"job-{job.name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def wake(self, name: str) -> None:
        """Let a job run now rather than at its next turn."""
        if name in self._jobs:
            self._jobs[name].wake.set()

    def stop(self) -> None:
        """End the threads, each after the run that it is in, and drop the leases."""
        self._is_stopping.set()
        for job in self._jobs.values():
            job.wake.set()
        deadline = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        try:
            drop_leases(self._store, self._owner)
        except (EdgekitError, SQLAlchemyError) as error:
            logger.warning("event=leases_kept error=%r", str(error))

    def views(self) -> tuple[JobView, ...]:
        """How the jobs are doing."""
        return tuple(job.view() for job in self._jobs.values())

    def _loop(self, job: _Job) -> None:
        while not self._is_stopping.is_set():
            self._turn(job)
            job.wake.wait(max(job.period_s, REST * job.last_seconds))
            job.wake.clear()

    def run_once(self, name: str) -> bool:
        """Run a job now, in the caller's thread.

        Returns:
            Whether it ran: False while another server holds its lease, or when it failed.
        """
        return self._turn(self._jobs[name])

    def _turn(self, job: _Job) -> bool:
        with job.busy:
            started = time.monotonic()
            try:
                job.is_leader = not job.is_leader_only or self._hold(job)
                if not job.is_leader:
                    return False
                job.last_run_ms = self._now_ms()
                job.function()
            except Exception as error:
                job.failures += 1
                job.last_error = f"{type(error).__name__}: {error}"[:500]
                if isinstance(error, EdgekitError):
                    logger.error("event=job_failed job=%s code=%s error=%r", job.name, error.code, error.message)  # noqa: TRY400
                else:
                    logger.exception("event=job_failed job=%s", job.name)
                return False
            else:
                job.runs += 1
                job.last_error = ""
                return True
            finally:
                job.last_seconds = time.monotonic() - started

    def _hold(self, job: _Job) -> bool:
        seconds = max(MIN_LEASE_S, 3 * job.period_s, 3 * (REST + 1) * job.last_seconds)
        return hold_lease(self._store, f"job:{job.name}", owner=self._owner, seconds=seconds, now_ms=self._now_ms())
