from __future__ import annotations

import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "agent"))
from world import World

from edgekit.errors import DeviceError, RepositoryError, TrustError, UsageError
from edgekit.fleet.audit import Audit, record
from edgekit.fleet.catalog import Catalog
from edgekit.fleet.jobs import Jobs, drop_leases, hold_lease, lease_owner
from edgekit.fleet.store import Store
from edgekit.schema.base import encode_json
from edgekit.schema.baseline import ReferenceProfile, StreamProfile
from edgekit.schema.digest import hex_of


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "fleet.db"))
    yield store
    store.close()


def test_lease_held_by_one_until_it_lapses(store):
    assert hold_lease(store, "job:x", owner="one", seconds=10, now_ms=1000)
    assert not hold_lease(store, "job:x", owner="two", seconds=10, now_ms=5000)
    assert hold_lease(store, "job:x", owner="one", seconds=10, now_ms=9000)
    assert not hold_lease(store, "job:x", owner="two", seconds=10, now_ms=19_000)
    assert hold_lease(store, "job:x", owner="two", seconds=10, now_ms=19_001)
    assert lease_owner(store, "job:x") == "two"
    assert not hold_lease(store, "job:x", owner="one", seconds=10, now_ms=19_002)


def test_leases_dropped_at_the_end(store):
    assert hold_lease(store, "job:x", owner="one", seconds=1000, now_ms=0)
    drop_leases(store, "one")
    assert hold_lease(store, "job:x", owner="two", seconds=10, now_ms=1)


def test_job_runs_on_one_server_of_two(store):
    done = []
    servers = [Jobs(store, owner=name) for name in ("one", "two")]
    for name, jobs in zip(("one", "two"), servers, strict=True):
        jobs.every(60, "tidy", lambda name=name: done.append(name))
        jobs.every(60, "local", lambda name=name: done.append(f"local {name}"), is_leader_only=False)
    assert servers[0].run_once("tidy")
    assert not servers[1].run_once("tidy")
    assert servers[0].run_once("local")
    assert servers[1].run_once("local")
    assert done == ["one", "local one", "local two"]
    servers[0].stop()
    assert servers[1].run_once("tidy")


def test_failing_job_is_counted_and_tried_again(store):
    turns = []

    def fail_once():
        turns.append(time.monotonic())
        if len(turns) == 1:
            raise DeviceError("device.storage", "the disk is gone.")

    jobs = Jobs(store, owner="one")
    jobs.every(0.01, "fragile", fail_once)
    jobs.start()
    deadline = time.monotonic() + 20
    while len(turns) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    jobs.stop()
    (view,) = jobs.views()
    assert (view.failures, view.last_error) == (1, "")
    assert view.runs >= 2


def test_woken_job_does_not_wait_for_its_turn(store):
    ran = threading.Event()
    jobs = Jobs(store, owner="one")
    jobs.every(3600, "rare", ran.set)
    jobs.start()
    assert ran.wait(20)
    ran.clear()
    jobs.wake("rare")
    assert ran.wait(20)
    jobs.stop()
    with pytest.raises(ValueError, match="rare"):
        jobs.every(1, "rare", ran.set)


def test_audit_entry_stands_or_falls_with_its_change(store):
    def fail_after_the_entry():
        with store.write() as connection:
            record(connection, actor="operator", action="rollout.halted", subject="rollout:1", now_ms=5)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_after_the_entry()
    assert Audit(store).page().entries == ()


def test_audit_pages_and_filters(store):
    for number in range(5):
        with store.write() as connection:
            record(
                connection,
                actor="operator" if number % 2 else "system:alerts",
                action="rollout.halted",
                subject=f"rollout:{number}" if number else "alert:1",
                reason="too slow",
                fields={"share": 0.5},
                now_ms=number,
            )
    log = Audit(store)
    first = log.page(limit=2)
    assert [entry.subject for entry in first.entries] == ["rollout:4", "rollout:3"]
    second = log.page(limit=3, before=first.next)
    assert [entry.subject for entry in second.entries] == ["rollout:2", "rollout:1", "alert:1"]
    assert second.next is None
    assert [entry.time_ms for entry in log.page(actor="operator").entries] == [3, 1]
    assert len(log.page(subject="rollout:").entries) == 4
    (entry,) = log.page(subject="rollout:2").entries
    assert (entry.reason, entry.fields) == ("too slow", {"share": 0.5})


PROFILE = ReferenceProfile(
    samples=6000,
    streams=(StreamProfile(name="x", kind="input", tensor="x", edges=(0.0, 1.0), counts=(1000, 4000, 1000)),),
)


@pytest.fixture
def repository(tmp_path):
    world = World(tmp_path)
    yield world
    world.stop()


def open_catalog(world: World, folder: Path) -> Catalog:
    return Catalog(world.url, root_file=world.root, cache_dir=folder)


def test_catalog_lists_releases_with_their_profiles(repository, tmp_path):
    repository.publish("1.0", seed=1)
    repository.publish("1.1", seed=2, baseline=encode_json(PROFILE))
    catalog = open_catalog(repository, tmp_path / "catalog")
    catalog.refresh(datetime.now(UTC))
    releases = catalog.releases(model="m")
    assert [release.info.version for release in releases] == ["1.0", "1.1"]
    assert catalog.releases(channel="nowhere") == ()
    assert catalog.profile(releases[0].manifest_digest) is None
    profile, crc = catalog.profile(releases[1].manifest_digest)
    assert profile == PROFILE
    assert crc
    digest = catalog.manifest(releases[0]).variants[0].model
    found = catalog.by_model_digest(hex_of(digest)[:12])
    assert (found.release.info.version, found.model_digest) == ("1.0", digest)
    assert catalog.by_model_digest("0" * 12) is None
    assert catalog.by_model_digest("") is None
    assert catalog.status().releases == 2


def test_catalog_stays_readable_without_its_repository(repository, tmp_path):
    repository.publish("1.1", seed=2, baseline=encode_json(PROFILE))
    catalog = open_catalog(repository, tmp_path / "catalog")
    catalog.refresh(datetime.now(UTC))
    (release,) = catalog.releases()
    catalog.profile(release.manifest_digest)
    repository.stop()
    with pytest.raises(RepositoryError):
        catalog.refresh(datetime.now(UTC))
    assert catalog.status().error
    assert catalog.releases() == (release,)
    assert catalog.profile(release.manifest_digest)[0] == PROFILE


def test_catalog_refuses_what_its_root_does_not_sign(repository, tmp_path):
    other = other_world(tmp_path / "other")
    try:
        repository.publish("1.0", seed=1)
        catalog = Catalog(repository.url, root_file=other.root, cache_dir=tmp_path / "catalog")
        with pytest.raises(TrustError):
            catalog.refresh(datetime.now(UTC))
        assert catalog.releases() == ()
    finally:
        other.stop()


def other_world(folder: Path) -> World:
    folder.mkdir()
    return World(folder)


def test_catalog_without_root_says_what_to_give(tmp_path):
    with pytest.raises(UsageError, match="no-root"):
        Catalog("http://127.0.0.1:1", root_file=tmp_path / "no-root.json", cache_dir=tmp_path / "cache")
