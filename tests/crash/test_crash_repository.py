"""Power cuts while a repository is made, published to, refreshed and rotated: devices follow it, and so does its owner."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from edgekit.repository import audit
from edgekit.repository.ceremony import init_repository, refresh_repository, rotate
from edgekit.repository.changes import Workbench
from edgekit.repository.publishing import add_publisher, check_repository, publish
from edgekit.repository.server import RepositoryServer
from edgekit.repository.store import Store
from edgekit.schema.state import Floors
from edgekit.trust.keys import load_public_keys, save_public_key
from edgekit.trust.repository_client import TrustedRepository
from edgekit.trust.signer import generate_signer, load_signer
from tests.crash.crashy_disk import Explorer, Names, Recorder, survivors
from tests.releases import tiny_bundle

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)


@dataclass(frozen=True)
class Seen:
    """What a device knows that looked: floors, its cache of metadata, and the releases."""

    floors: Floors
    cache: Path
    releases: frozenset[str]


class Office:
    """A repository ``work/repo`` with ``work/keys``, a server for any copy of it, and bundles to publish."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.work.mkdir()
        self.signer = generate_signer()
        self.publisher = folder / "publisher.pub"
        save_public_key(self.signer.public_key, self.publisher)
        self.bundles = {
            version: tiny_bundle(
                folder / f"{version}.edgekit", self.signer, version=version, model=f"model {version}".encode() * 9
            )
            for version in ("1.0", "2.0", "3.0")
        }
        self._numbers = itertools.count()
        (folder / "empty" / "metadata").mkdir(parents=True)
        self.server = RepositoryServer(folder / "empty", "127.0.0.1", 0)
        self.server.RequestHandlerClass = type("Prompt", (self.server.RequestHandlerClass,), {"disable_nagle_algorithm": True})
        self.server.__enter__()

    def init(self, work: Path) -> None:
        (work / "safe").mkdir(exist_ok=True)
        init_repository(work / "repo", keys_dir=work / "safe" / "keys", now=NOW)

    def publish(self, work: Path, version: str, *, now: datetime = LATER) -> None:
        publish(work / "repo", self.bundles[version], keys=[self.signer.public_key], now=now)

    def look(self, work: Path, before: Seen | None = None) -> Seen:
        """A device asks for the releases and fetches their manifests; ``before`` is what it knew."""
        self.server.root = work / "repo"
        cache = self.folder / f"cache-{next(self._numbers)}"
        if before is not None:
            shutil.copytree(before.cache, cache, symlinks=True)
        root = (work / "repo" / "metadata" / "1.root.json").read_bytes()
        floors = before.floors if before else Floors()
        device = TrustedRepository(cache, self.server.url, root=root, floors=floors, now=LATER)
        result = device.refresh()
        for release in result.releases:
            device.fetch_manifest(release)
        return Seen(result.floors, cache, frozenset(release.info.version for release in result.releases))

    def copy(self, work: Path, name: str) -> Path:
        return Path(shutil.copytree(work, self.folder / name))


def check_log(work: Path) -> None:
    """Every line of the audit log is there that signed metadata knows of."""
    chain = Store.open(work / "repo").chain()
    audit.check_anchor(audit.read_log(work / "repo"), chain.snapshot.unrecognized_fields.get(audit.SNAPSHOT_FIELD))


@pytest.fixture(scope="module")
def office(tmp_path_factory):
    made = Office(tmp_path_factory.mktemp("office"))
    yield made
    made.server.__exit__()


@pytest.fixture(scope="module")
def published(office):
    """A repository with one release, as it lies on the disk, and what a device saw of it."""
    work = office.folder / "published"
    work.mkdir()
    office.init(work)
    office.publish(work, "1.0", now=NOW)
    return work, office.look(work)


def explore_init(office, _published, folder):
    """Until init returned it may be called again; then there is a repository."""
    work = folder / "work"
    (work / "safe").mkdir(parents=True)
    with Recorder(work, promised=False) as recorder:
        office.init(work)
        recorder.promise(True)

    def check(work, is_done):
        for path in (work / "safe" / "keys").glob("*.pem"):
            load_signer(path)
        if is_done:
            assert office.look(work).releases == frozenset()
        if not (work / "repo" / "repository.json").exists():
            assert not is_done, "the repository is gone"
            office.init(work)
        assert (work / "safe" / "keys" / "root.json").read_bytes() == (work / "repo" / "metadata" / "1.root.json").read_bytes()
        office.publish(work, "1.0")
        assert office.look(work).releases == {"1.0"}
        assert check_repository(work / "repo") == ()
        check_log(work)

    return Explorer("init", recorder.trace, check, folder)


def explore_trust(office, published, folder):
    """A publisher who was trusted is trusted; one that is not yet keeps nobody from being trusted."""
    work = Path(shutil.copytree(published[0], folder / "work"))
    with Recorder(work, promised=False) as recorder:
        add_publisher(work / "repo", office.publisher)
        recorder.promise(True)

    def check(work, is_done):
        keys = load_public_keys(work / "repo" / "publishers")
        assert keys in ((), (office.signer.public_key,))
        assert keys or not is_done, "the publisher is forgotten"
        add_publisher(work / "repo", office.publisher)
        publish(work / "repo", office.bundles["2.0"], now=LATER)
        assert office.look(work, published[1]).releases == {"1.0", "2.0"}
        check_log(work)

    return Explorer("trust publisher", recorder.trace, check, folder)


def checker(office, after):
    """For what changes a repository that devices follow: old or new, complete, never back, and it goes on."""

    def check(work, seen):
        assert check_repository(work / "repo") == ()
        check_log(work)
        fresh, follower = office.look(work), office.look(work, seen)
        assert fresh.releases in (seen.releases, after)
        assert follower.releases == fresh.releases
        office.publish(work, "3.0")
        assert office.look(work, seen).releases == fresh.releases | {"3.0"}
        assert office.look(work, follower).releases == fresh.releases | {"3.0"}
        assert check_repository(work / "repo") == ()
        check_log(work)

    return check


def explore_publish(office, published, folder):
    work = Path(shutil.copytree(published[0], folder / "work"))
    with Recorder(work, promised=published[1]) as recorder:
        office.publish(work, "2.0")
        recorder.promise(office.look(work, published[1]))
    return Explorer("publish", recorder.trace, checker(office, {"1.0", "2.0"}), folder)


def explore_publish_without_a_log(office, published, folder):
    """A repository that was made before there was an audit log."""
    work = Path(shutil.copytree(published[0], folder / "work"))
    store = Store.open(work / "repo")
    with store.locked():
        bench = Workbench.open(store, now=NOW)
        bench.chain.snapshot.unrecognized_fields.clear()
        bench.settle(is_refresh=True)
    (work / "repo" / audit.AUDIT_FILE).unlink()
    seen = office.look(work, published[1])
    with Recorder(work, promised=seen) as recorder:
        office.publish(work, "2.0")
        recorder.promise(office.look(work, seen))
    return Explorer("publish without a log", recorder.trace, checker(office, {"1.0", "2.0"}), folder)


def explore_refresh(office, published, folder):
    work = Path(shutil.copytree(published[0], folder / "work"))
    with Recorder(work, promised=published[1]) as recorder:
        refresh_repository(work / "repo", is_targets_too=True, now=LATER)
        recorder.promise(office.look(work, published[1]))
    return Explorer("refresh", recorder.trace, checker(office, {"1.0"}), folder)


def explore_rotate(office, published, folder):
    """A new root and what its keys sign become visible one after the other: between, the next refresh cures."""
    work = Path(shutil.copytree(published[0], folder / "work"))
    with Recorder(work, promised=(False, published[1])) as recorder:
        rotate(work / "repo", "timestamp", old="timestamp", new="generate", now=LATER)
        recorder.promise((True, office.look(work, published[1])))

    def check(work, promised):
        is_done, seen = promised
        if is_done:
            assert office.look(work, seen).releases == {"1.0"}
            assert Store.open(work / "repo").chain().root.version == 2
        refresh_repository(work / "repo", now=LATER)
        assert office.look(work, seen).releases == office.look(work).releases == {"1.0"}
        assert check_repository(work / "repo") == ()
        check_log(work)

    return Explorer("rotate", recorder.trace, check, folder)


SCENARIOS = [explore_init, explore_trust, explore_publish, explore_refresh, explore_rotate]


@pytest.fixture(scope="module")
def explorers(office, published, tmp_path_factory):
    made = {}

    def explorer(explore):
        if explore not in made:
            made[explore] = explore(office, published, tmp_path_factory.mktemp(explore.__name__))
        return made[explore]

    return explorer


@pytest.mark.parametrize("explore", SCENARIOS, ids=lambda explore: explore.__name__.removeprefix("explore_"))
def test_repository_after_a_power_cut_at_any_moment(explorers, explore):
    explorer = explorers(explore)
    found = list(explorer.violations())
    print(f"{explorer.name}: {explorer.state_count} states")
    assert not found, "\n".join(map(str, found[:10]))


def test_fsync_of_the_repository_forgotten(explorers):
    """Each one is needed: without it some power cut does harm."""
    left = survivors([explorers(explore) for explore in SCENARIOS])
    assert not left, "\n".join(map(str, left.values()))
