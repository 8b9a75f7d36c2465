"""What each device shall run, signed and retained at the broker.

The row is written before the message is sent, and the message is sent again until the broker has confirmed it: a server that is
killed in between goes on where it was. ``seq`` only grows, also over a restored backup, since it is never less than the time.

>>> desk = DesiredDesk(store, sign=sign_desired, publisher=publisher)                             # doctest: +SKIP
>>> desk.want({7: Wish(model="kws", release=DesiredModel(counter=3, manifest=digest))}, now_ms=now)  # doctest: +SKIP
>>> desk.publish_pending()                                                                        # doctest: +SKIP
1
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import Connection, select, update

from edgekit.errors import EdgekitError, UsageError
from edgekit.fleet import tables
from edgekit.fleet.publisher import Publisher
from edgekit.fleet.rollout.tables import desired
from edgekit.fleet.services import SignDesired
from edgekit.fleet.store import Store
from edgekit.fleet.tables import upsert
from edgekit.schema.desired import DesiredModel, DesiredState, UpdatePolicy
from edgekit.telemetry.topics import topic

logger = logging.getLogger(__name__)

LIFE = timedelta(days=30)
RENEW_BEFORE = timedelta(days=10)
BATCH = 500
CONFIRM_SECONDS = 20.0
NO_POLICY = UpdatePolicy()


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What one device shall run of one model; None says nothing of it any more: the device keeps what it has."""

    model: str
    release: DesiredModel | None
    policy: UpdatePolicy = NO_POLICY


class DesiredDesk:
    """Issues desired states. Without ``sign`` it knows what was issued, and issues nothing."""

    def __init__(self, store: Store, *, sign: SignDesired | None, publisher: Publisher | None) -> None:
        self._store, self._sign, self.publisher = store, sign, publisher

    @property
    def can_sign(self) -> bool:
        """Whether this server has a key to sign with."""
        return self._sign is not None

    def models_of(self, connection: Connection, device_ids: Sequence[int]) -> dict[int, dict[str, DesiredModel]]:
        """What was desired of each device last."""
        row = desired.c
        found: dict[int, dict[str, DesiredModel]] = {}
        for part in _parts(device_ids):
            for number, models in connection.execute(select(row.device_id, row.models).where(row.device_id.in_(part))):
                found[number] = _decode_models(models)
        return found

    def want(self, connection: Connection, wishes: Mapping[int, Wish], *, now_ms: int) -> None:
        """Sign and store new desired states, in the caller's transaction; :meth:`publish_pending` sends them.

        What is desired of a device's other models stays as it is.

        Raises:
            UsageError: ``desired.unsigned`` when this server has no key.
        """
        if self._sign is None:
            raise UsageError(
                "desired.unsigned",
                "this fleet server has no key to sign with: it cannot tell devices what to run.",
                hint="Start it with --fleet-key KEY; devices trust its .pub as fleet_keys.",
            )
        for part in _parts(list(wishes)):
            self._want_part(connection, {number: wishes[number] for number in part}, now_ms)

    def _want_part(self, connection: Connection, wishes: Mapping[int, Wish], now_ms: int) -> None:
        names = _names(connection, wishes)
        row = desired.c
        before = {
            item.device_id: (item.seq, _decode_models(item.models))
            for item in connection.execute(select(row.device_id, row.seq, row.models).where(row.device_id.in_(wishes)))
        }
        rows = []
        for number, wish in wishes.items():
            seq, models = before.get(number, (0, {}))
            if wish.release is None:
                models.pop(wish.model, None)
            else:
                models[wish.model] = wish.release
            rows.append(self._row(number, names[number][1], max(seq + 1, now_ms), models, wish.policy, now_ms))
        self._put(connection, rows)

    def _row(  # noqa: PLR0917 - a row's columns
        self, number: int, device: str, seq: int, models: dict[str, DesiredModel], policy: UpdatePolicy, now_ms: int
    ) -> dict[str, Any]:
        assert self._sign is not None
        issued = datetime.fromtimestamp(now_ms / 1000, UTC)
        state = DesiredState(device=device, seq=seq, issued_at=issued, expires_at=issued + LIFE, models=models, policy=policy)
        return {
            "device_id": number,
            "seq": seq,
            "models": msgspec.msgpack.encode(models),
            "policy": msgspec.msgpack.encode(policy),
            "expires_ms": round((issued + LIFE).timestamp() * 1000),
            "envelope": self._sign(state),
            "published_seq": 0,
        }

    def _put(self, connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
        if not rows:
            return
        statement = upsert(desired, self._store.engine.dialect.name)
        changed = {name: statement.excluded[name] for name in rows[0] if name != "device_id"}
        connection.execute(statement.on_conflict_do_update(index_elements=["device_id"], set_=changed), list(rows))

    def renew(self, now_ms: int) -> int:
        """Sign again what is going to expire; how many were."""
        if self._sign is None:
            return 0
        limit = now_ms + round(RENEW_BEFORE.total_seconds() * 1000)
        row = desired.c
        with self._store.write() as connection:
            due = connection.execute(select(desired).where(row.expires_ms < limit).limit(BATCH)).all()
            names = _names(connection, [item.device_id for item in due])
            rows = [
                self._row(
                    item.device_id,
                    names[item.device_id][1],
                    max(item.seq + 1, now_ms),
                    _decode_models(item.models),
                    msgspec.msgpack.decode(item.policy, type=UpdatePolicy),
                    now_ms,
                )
                for item in due
            ]
            self._put(connection, rows)
        return len(rows)

    def publish_pending(self) -> int:
        """Send what the broker has not confirmed yet; how many it confirmed now."""
        if self.publisher is None or not self.publisher.is_connected:
            return 0
        confirmed = 0
        while True:
            found = self._pending()
            sent = [(number, seq, self._send(site, device, data)) for number, seq, site, device, data in found]
            done = [(number, seq) for number, seq, future in sent if _is_confirmed(future)]
            self._note_published(done)
            confirmed += len(done)
            if len(found) < BATCH or len(done) < len(found):
                return confirmed

    def _pending(self) -> list[tuple[int, int, str, str, bytes]]:
        row, device = desired.c, tables.devices.c
        statement = (
            select(row.device_id, row.seq, device.site, device.device, row.envelope)
            .join(tables.devices, device.id == row.device_id)
            .where(row.published_seq < row.seq)
            .order_by(row.seq)
            .limit(BATCH)
        )
        with self._store.read() as connection:
            return [tuple(item) for item in connection.execute(statement)]

    def _send(self, site: str, device: str, envelope: bytes) -> Future[None]:
        assert self.publisher is not None
        return self.publisher.publish(topic(site, device, "des"), envelope, is_retained=True)

    def _note_published(self, done: Iterable[tuple[int, int]]) -> None:
        with self._store.write() as connection:
            for number, seq in done:
                here = (desired.c.device_id == number, desired.c.seq == seq)
                connection.execute(update(desired).where(*here).values(published_seq=seq))

    def forget_published(self) -> None:
        """Send everything again: the broker may have lost what it retained."""
        with self._store.write() as connection:
            connection.execute(update(desired).values(published_seq=0))


def _is_confirmed(future: Future[None]) -> bool:
    try:
        future.result(CONFIRM_SECONDS)
    except (EdgekitError, TimeoutError) as error:
        logger.warning("event=desired_not_published error=%r", str(error))
        return False
    return True


def _names(connection: Connection, device_ids: Iterable[int]) -> dict[int, tuple[str, str]]:
    row = tables.devices.c
    found = connection.execute(select(row.id, row.site, row.device).where(row.id.in_(list(device_ids))))
    return {number: (site, device) for number, site, device in found}


def _decode_models(data: bytes) -> dict[str, DesiredModel]:
    return msgspec.msgpack.decode(data, type=dict[str, DesiredModel])


def _parts(numbers: Sequence[int]) -> Iterable[list[int]]:
    return (list(numbers[at : at + BATCH]) for at in range(0, len(numbers), BATCH))
