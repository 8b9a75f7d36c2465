"""The inputs that devices' owners agreed to give, with the labels that came for them: what a model is recalibrated with.

A page ends after ``MAX_PAGE_BYTES``, so that large inputs are many small answers. A label counts once: the one that came last.

>>> from edgekit.fleet.store import Store
>>> Samples(Store("sqlite://")).page(model="kws").samples
()
"""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import BigInteger, ScalarSelect, cast, func, or_, select, tuple_

from edgekit.fleet import audit, tables
from edgekit.fleet.store import Store
from edgekit.fleet.watch.tables import watch_profiles
from edgekit.schema.message import SampleTensor
from edgekit.schema.work import FieldSample, SampleCount, SamplePage

MAX_PAGE = 500
MAX_PAGE_BYTES = 8 << 20
_CURSOR = 3


def _newest_label() -> ScalarSelect[str]:
    """The label of a sample's prediction; of several the last that came."""
    row, sample = tables.labels.c, tables.samples.c
    return (
        select(row.label)
        .where(row.device_id == sample.device_id, row.prediction_id == sample.prediction_id, row.prediction_id != "")
        .order_by(row.time_ms.desc(), row.seq.desc())
        .limit(1)
        .correlate(tables.samples)
        .scalar_subquery()
    )


class Samples:
    """The stored samples."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def counts(self) -> tuple[SampleCount, ...]:
        """What there is, by model file: no content."""
        row = tables.samples.c
        each = select(row.model_digest, row.time_ms, _newest_label().label("label")).subquery().c
        statement = select(
            each.model_digest, func.count(), func.count(each.label), func.min(each.time_ms), func.max(each.time_ms)
        )
        with self._store.read() as connection:
            found = connection.execute(statement.group_by(each.model_digest).order_by(each.model_digest)).all()
            names: dict[str, str] = {}
            for table in (tables.device_models, watch_profiles):
                known = select(table.c.model_digest, func.max(table.c.model)).group_by(table.c.model_digest)
                names |= {item[0]: item[1] for item in connection.execute(known)}
        return tuple(
            SampleCount(
                model=names.get(digest, ""), model_digest=digest, samples=count, labelled=labelled, first_ms=first, last_ms=last
            )
            for digest, count, labelled, first, last in found
        )

    def note_export(self, *, model: str, model_digest: str, actor: str, now_ms: int) -> None:
        """Write down that somebody begins to take samples."""
        what = model or model_digest or "every model"
        with self._store.write() as connection:
            audit.record(
                connection, actor=actor, action="samples.exported", subject=f"model:{what}", now_ms=now_ms,
                fields={"model_digest": model_digest},
            )  # fmt: skip

    def page(
        self, *, model: str = "", model_digest: str = "", since_ms: int = 0, after: str = "", limit: int = 100
    ) -> SamplePage:
        """Samples, page by page.

        Args:
            model: of this model, with any of its files that devices serve or the watch knows.
            model_digest: only of this file (first 12 hex digits).
            since_ms: only from then on.
            after: the ``next`` of the page before.
            limit: most on a page.
        """
        row, device = tables.samples.c, tables.devices.c
        key = tuple_(row.device_id, row.boot, row.seq)
        statement = (
            select(tables.samples, device.site, device.device, _newest_label().label("label"))
            .join(tables.devices, device.id == row.device_id)
            .where(row.time_ms >= since_ms)
            .order_by(row.device_id, row.boot, row.seq)
            .limit(min(limit, MAX_PAGE) + 1)
        )
        if model_digest:
            statement = statement.where(row.model_digest == model_digest)
        if model:
            serves, known = tables.device_models.c, watch_profiles.c
            statement = statement.where(
                or_(
                    row.model_digest.in_(select(serves.model_digest).where(serves.model == model)),
                    row.model_digest.in_(select(known.model_digest).where(known.model == model)),
                )
            )
        numbers = tuple(int(part) for part in after.split("-") if part.isdigit())
        if len(numbers) == _CURSOR:
            statement = statement.where(key > tuple_(*(cast(number, BigInteger) for number in numbers)))
        page: list[Any] = []
        is_more, size = False, 0
        with self._store.read() as connection:
            for item in connection.execute(statement):
                if len(page) == min(limit, MAX_PAGE) or (page and size + len(item.tensors) > MAX_PAGE_BYTES):
                    is_more = True
                    break
                page.append(item)
                size += len(item.tensors)
        last = page[-1] if is_more else None
        return SamplePage(
            samples=tuple(_sample(item) for item in page),
            next=f"{last.device_id}-{last.boot}-{last.seq}" if last is not None else "",
        )


def _sample(item: Any) -> FieldSample:
    return FieldSample(
        site=item.site,
        device=item.device,
        time_ms=item.time_ms,
        model_digest=item.model_digest,
        prediction_id=item.prediction_id,
        predicted=item.predicted,
        confidence=item.confidence,
        label=item.label or "",
        redacted=tuple(part for part in item.redacted.split(",") if part),
        tensors=msgspec.msgpack.decode(item.tensors, type=tuple[SampleTensor, ...]),
    )
