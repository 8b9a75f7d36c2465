"""From the fleet's rows to intervals: which devices belong to which slice, and what they sent.

A slice is named by what the device is now (its site, architecture, labels, groups) and by the release whose windows they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, select

from edgekit.errors import ArtifactError
from edgekit.fleet import tables
from edgekit.fleet.selector import Selector
from edgekit.monitor.intervals import ALL, DeviceWindow, Folder, Interval
from edgekit.monitor.replay import RecordedWindow
from edgekit.schema.base import Record
from edgekit.schema.baseline import ReferenceProfile
from edgekit.telemetry.histogram import LatencyHistogram

CHUNK_ROWS = 5000
LABEL = "label."
MAX_VALUE = 80
_sketches: msgspec.msgpack.Decoder[tuple[bytes, ...]] = msgspec.msgpack.Decoder(tuple[bytes, ...])
_verdicts: msgspec.msgpack.Decoder[dict[str, int]] = msgspec.msgpack.Decoder(dict[str, int])


class Folded(Record, frozen=True, kw_only=True):
    """An interval with the latencies of its slices, which only the fleet can add up."""

    interval: Interval
    latency: dict[str, bytes]


class DeviceFacts:
    """Of which slices each device is, by its number; read once a run."""

    def __init__(self, connection: Connection, keys: Sequence[str]) -> None:
        self._keys = tuple(keys)
        row = tables.devices.c
        self._devices = {item.id: item for item in connection.execute(select(row.id, row.site, row.device, row.arch)).all()}
        self._labels: dict[int, dict[str, str]] = {}
        if any(key.startswith(LABEL) for key in keys):
            label = tables.device_labels.c
            wanted = [key.removeprefix(LABEL) for key in keys if key.startswith(LABEL)]
            for number, key, value in connection.execute(
                select(label.device_id, label.key, label.value).where(label.key.in_(wanted))
            ):
                self._labels.setdefault(number, {})[key] = value
        self._groups = _read_groups(connection) if "group" in keys else {}

    def name(self, number: int) -> str:
        """``site/device``."""
        found = self._devices.get(number)
        return f"{found.site}/{found.device}" if found else f"?/{number}"

    def slices(self, number: int, version: str) -> tuple[str, ...]:
        """Of one device with windows of one release."""
        device = self._devices.get(number)
        if device is None:
            return ()
        found: list[str] = []
        for key in self._keys:
            match key:
                case "site":
                    found.append(_named("site", device.site))
                case "arch":
                    found.append(_named("arch", device.arch))
                case "release":
                    found.append(_named("release", version))
                case "group":
                    found += [_named("group", name) for name, members in self._groups.items() if number in members]
                case _ if key.startswith(LABEL):
                    value = self._labels.get(number, {}).get(key.removeprefix(LABEL), "")
                    found.append(_named(key, value))
        if "release" in self._keys and "arch" in self._keys and device.arch and version:  # what versions are compared by
            found.append(f"release={version[:MAX_VALUE]},arch={device.arch[:MAX_VALUE]}")
        return tuple(name for name in found if name)


def _named(key: str, value: str) -> str:
    return f"{key}={value[:MAX_VALUE]}" if value else ""


def _read_groups(connection: Connection) -> dict[str, set[int]]:
    row = tables.groups.c
    found = connection.execute(select(row.name, row.selector)).all()
    dynamic = {item.name: item.selector for item in found if item.selector}
    members = {}
    for item in found:
        clause = Selector.parse(f"group={item.name}").clause(dynamic)
        members[item.name] = set(connection.execute(select(tables.devices.c.id).where(clause)).scalars())
    return members


def model_names(connection: Connection, digests: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Model and version of some digests, by what devices reported."""
    found: dict[str, tuple[str, str]] = {}
    for table in (tables.devices, tables.device_models):
        row = table.c
        statement = select(row.model_digest, row.model, row.version).where(row.model_digest.in_(list(digests)), row.model != "")
        for digest, model, version in connection.execute(statement.distinct().order_by(row.version)):
            found[digest] = (model, version)
    return found


def profiles_in(connection: Connection, digests: Sequence[str], start_ms: int, end_ms: int) -> tuple[int, ...]:
    """The profiles that some models' windows of a time were counted with."""
    row = tables.model_windows.c
    statement = select(row.profile).where(row.model_digest.in_(list(digests)), row.start_ms >= start_ms, row.start_ms < end_ms)
    return tuple(sorted(connection.execute(statement.distinct()).scalars()))


def fold(
    connection: Connection,
    profile: ReferenceProfile,
    *,
    crc: int,
    versions: Mapping[str, str],
    facts: DeviceFacts,
    start_ms: int,
    end_ms: int,
) -> Folded | None:
    """What all devices sent of one model, counted with one profile, in one interval; None for nothing.

    Args:
        connection: to read by.
        profile: by which the windows were counted.
        crc: the profile's number in telemetry.
        versions: of the model's digests.
        facts: of the devices.
        start_ms: of the interval.
        end_ms: first moment after it.
    """
    row = tables.model_windows.c
    statement = select(tables.model_windows).where(
        row.model_digest.in_(list(versions)), row.profile == crc, row.start_ms >= start_ms, row.start_ms < end_ms
    )
    ordered = statement.order_by(row.device_id, row.boot, row.seq, row.model_digest)
    folder, members = Folder(profile, start_ms=start_ms), _Members(facts, versions)
    count = 0
    result = connection.execution_options(yield_per=CHUNK_ROWS).execute(ordered)
    for chunk in result.partitions():
        folder.add([members.read(item) for item in chunk])
        count += len(chunk)
    if not count:
        return None
    return Folded(interval=folder.finish(members.slices), latency=members.latencies())


def read_windows(
    connection: Connection, versions: Mapping[str, str], facts: DeviceFacts, *, since_ms: int, until_ms: int
) -> Iterator[RecordedWindow]:
    """Windows as devices sent them, oldest first.

    Args:
        connection: to read by.
        versions: of the model's digests.
        facts: of the devices.
        since_ms: from here.
        until_ms: first moment after.
    """
    row = tables.model_windows.c
    statement = select(tables.model_windows).where(
        row.model_digest.in_(list(versions)), row.start_ms >= since_ms, row.start_ms < until_ms
    )
    members = _Members(facts, versions)
    ordered = statement.order_by(row.start_ms, row.device_id, row.boot, row.seq)
    for item in connection.execution_options(yield_per=CHUNK_ROWS).execute(ordered):
        window = members.read(item)
        yield RecordedWindow(start_ms=item.start_ms, profile=item.profile, window=window, slices=members.slices[window.device])


class _Members:
    """Reads rows, and remembers whose they are."""

    def __init__(self, facts: DeviceFacts, versions: Mapping[str, str]) -> None:
        self._facts, self._versions = facts, versions
        self.slices: dict[str, tuple[str, ...]] = {}
        self._latency: dict[str, LatencyHistogram] = {}

    def read(self, item: Any) -> DeviceWindow:
        """One row. A device that changed its release within the interval counts as one for each."""
        name = f"{self._facts.name(item.device_id)}@{item.model_digest}"
        if name not in self.slices:
            version = self._versions.get(item.model_digest, "") or item.model_digest
            self.slices[name] = self._facts.slices(item.device_id, version)
        if item.latency:
            self._add_latency(name, item.latency)
        return DeviceWindow(
            device=name,
            requests=item.requests,
            errors=item.errors,
            rejected=item.rejected,
            samples=item.samples,
            sketched=item.sketched,
            labelled=item.labelled,
            right=min(item.right, item.labelled),
            duration_ms=item.duration_ms,
            sketches=_decode_sketches(item.sketches),
            verdicts=_verdicts.decode(item.verdicts) if item.verdicts else {},
        )

    def _add_latency(self, name: str, data: bytes) -> None:
        try:
            found = LatencyHistogram.decode(data)
        except ArtifactError:
            return
        self._latency.setdefault(name, LatencyHistogram()).merge(found)

    def latencies(self) -> dict[str, bytes]:
        """The latencies of each slice."""
        by_slice: dict[str, LatencyHistogram] = {}
        for device, bins in self._latency.items():
            for name in (ALL, *self.slices[device]):
                by_slice.setdefault(name, LatencyHistogram()).merge(bins)
        return {name: bins.encode() for name, bins in by_slice.items()}


def _decode_sketches(data: bytes | None) -> tuple[bytes, ...]:
    if not data:
        return ()
    try:
        return _sketches.decode(data)
    except msgspec.DecodeError:
        return ()
