"""Power cuts while a repository is made, published to, refreshed and rotated: devices follow it, and so does its owner."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from edgekit.agent.stick import StickSource
from edgekit.errors import EdgekitError
from edgekit.repository import audit
from edgekit.repository.ceremony import delegate, refresh_repository, repository_status, rotate, undelegate
from edgekit.repository.changes import Workbench
from edgekit.repository.listing import releases_of
from edgekit.repository.prune import Policy, prune
from edgekit.repository.publishing import add_publisher, check_repository, publish, recall
from edgekit.repository.signatures import envelope_file
from edgekit.repository.stick import make_stick
from edgekit.repository.store import Store
from edgekit.schema.base import decode_json
from edgekit.schema.manifest import Manifest
from edgekit.trust.dsse import decode_envelope
from edgekit.trust.keys import load_public_keys
from edgekit.trust.signer import load_signer
from tests.crash.crashy_disk import Explorer, Names, Recorder, survivors
from tests.crash.office import Office, scratch_folder

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)


def check_books(work: Path) -> None:
    """Every line of the audit log that signed metadata knows of is there, and who signed what was published."""
    chain = Store.open(work / "repo").chain()
    for release in releases_of(chain):
        decode_envelope(envelope_file(work / "repo", release.manifest_digest).read_bytes())
    audit.check_anchor(audit.read_log(work / "repo"), chain.snapshot.unrecognized_fields.get(audit.SNAPSHOT_FIELD))


@pytest.fixture(scope="module")
def office():
    folder = scratch_folder()
    made = Office(folder, NOW)
    yield made
    made.close()
    shutil.rmtree(folder)


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
        check_books(work)

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
        check_books(work)

    return Explorer("trust publisher", recorder.trace, check, folder)


def checker(office, after):
    """For what changes a repository that devices follow: old or new, complete, never back, and it goes on."""

    def check(work, seen):
        assert check_repository(work / "repo") == ()
        check_books(work)
        fresh, follower = office.look(work), office.look(work, seen)
        assert fresh.releases in (seen.releases, after)
        assert follower.releases == fresh.releases
        office.publish(work, "3.0")
        assert office.look(work, seen).releases == fresh.releases | {"3.0"}
        assert office.look(work, follower).releases == fresh.releases | {"3.0"}
        assert check_repository(work / "repo") == ()
        check_books(work)

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


def explore_version_seen(office, published, folder):
    """A device that was faster than the power cut: what it saw is not what the disk has, and yet it goes on with the next."""
    work = Path(shutil.copytree(published[0], folder / "work"))
    looked = []

    def look(event):
        if isinstance(event, Names) and any(name == "timestamp.json" for _, name in event.changes) and not looked:
            looked.append(office.look(work, published[1]))
            recorder.promise(looked[0])

    recorder = Recorder(work, promised=published[1], on_event=look)
    with recorder:
        office.publish(work, "2.0")

    def check(work, seen):
        office.publish(work, "3.0")
        assert "3.0" in office.look(work, seen).releases

    return Explorer("version seen", recorder.trace, check, folder)


def explore_rotation(role):
    """A new root and what its keys sign become visible one after the other: between, the next refresh cures."""

    def explore(office, published, folder):
        work = Path(shutil.copytree(published[0], folder / "work"))
        with Recorder(work, promised=(False, published[1])) as recorder:
            rotate(work / "repo", role, old=role, new="generate", now=LATER)
            recorder.promise((True, office.look(work, published[1])))

        def check(work, promised):
            is_done, seen = promised
            if is_done:
                assert office.look(work, seen).releases == {"1.0"}
                status = repository_status(work / "repo", now=LATER)
                assert (status.roles[0].version, status.waiting) == (2, ())
            refresh_repository(work / "repo", now=LATER)
            check_books(work)
            assert office.look(work, seen).releases == office.look(work).releases == {"1.0"}
            office.publish(work, "2.0")
            assert office.look(work, seen).releases == office.look(work).releases == {"1.0", "2.0"}
            assert check_repository(work / "repo") == ()

        return Explorer(f"rotate {role}", recorder.trace, check, folder)

    explore.__name__ = f"explore_rotate_{role}"
    return explore


explore_rotate_root = explore_rotation("root")
explore_rotate_targets = explore_rotation("targets")
explore_rotate_snapshot = explore_rotation("snapshot")
explore_rotate_timestamp = explore_rotation("timestamp")


def explore_undelegate(office, published, folder):
    """A delegation ends while a change of that role still waits for a signature."""
    work = Path(shutil.copytree(published[0], folder / "work"))
    repo = work / "repo"
    delegate(repo, "family", models=["kws"], new_keys=["generate"], now=NOW)
    key = work / "safe" / "keys" / "family-1.pem"
    key.rename(folder / key.name)
    office.publish(work, "2.0")  # waits for the key
    seen = office.look(work, published[1])
    with Recorder(work, promised=(False, seen)) as recorder:
        undelegate(repo, "family", now=LATER)
        recorder.promise((True, office.look(work, seen)))

    def check(work, promised):
        is_done, seen = promised
        if is_done:
            assert repository_status(work / "repo", now=LATER).waiting == ()
        refresh_repository(work / "repo", now=LATER)
        check_books(work)
        assert office.look(work, seen).releases == {"1.0"}
        office.publish(work, "3.0")
        assert office.look(work, seen).releases >= {"1.0"}

    return Explorer("undelegate", recorder.trace, check, folder)


def explore_recall(office, published, folder):
    """The deny-list a device sees is the old one or the new one, and its file is there."""
    work = Path(shutil.copytree(published[0], folder / "work"))
    digest = next(iter(releases_of(Store.open(work / "repo").chain()))).manifest_digest
    with Recorder(work, promised=(False, published[1])) as recorder:
        recall(work / "repo", digest, deadline=LATER, reason="wrong labels", now=LATER)
        recorder.promise((True, office.look(work, published[1])))

    def check(work, promised):
        is_done, seen = promised
        assert check_repository(work / "repo") == ()
        check_books(work)
        recalled = [each.digest for each in repository_status(work / "repo", now=LATER).recalls]
        assert recalled in ([digest], [] if not is_done else [digest])
        assert office.look(work, seen).releases == {"1.0"}
        recall(work / "repo", digest, deadline=LATER, reason="wrong labels", now=LATER)
        assert [each.digest for each in repository_status(work / "repo", now=LATER).recalls] == [digest]
        assert office.look(work, seen).releases == {"1.0"}

    return Explorer("recall", recorder.trace, check, folder)


def explore_prune(office, published, folder):
    """Files too many, never one too few."""
    work = Path(shutil.copytree(published[0], folder / "work"))
    for version in ("2.0", "3.0"):  # the newest stays, and the one that a rollback would take
        office.publish(work, version)
    seen = office.look(work, published[1])
    policy = Policy(keep=1, keep_days=0)
    much_later = LATER + timedelta(minutes=5)
    with Recorder(work, promised=(False, seen)) as recorder:
        report = prune(work / "repo", policy, now=much_later)
        assert [each.info.version for each in report.removed] == ["1.0"]
        recorder.promise((True, office.look(work, seen)))

    def check(work, promised):
        is_done, seen = promised
        assert check_repository(work / "repo") == ()
        check_books(work)
        fresh = office.look(work, seen)
        assert fresh.releases == {"2.0", "3.0"} if is_done else fresh.releases in ({"1.0", "2.0", "3.0"}, {"2.0", "3.0"})
        prune(work / "repo", policy, now=much_later)
        assert check_repository(work / "repo") == ()
        assert office.look(work, fresh).releases == office.look(work).releases == {"2.0", "3.0"}

    return Explorer("prune", recorder.trace, check, folder)


def explore_stick(office, published, folder):
    """A stick that was pulled out is refused or good; made again, it is good."""
    work = Path(shutil.copytree(published[0], folder / "work"))
    repository = published[0] / "repo"
    root = (repository / "metadata" / "1.root.json").read_bytes()
    (work / "usb").mkdir()
    with Recorder(work, promised=False) as recorder:
        make_stick(repository, work / "usb" / "edgekit", names=("kws@1.0",))
        recorder.promise(True)

    def look(stick, parts):
        source = StickSource(stick, root=root, floors=published[1].floors, model="kws")
        release = max(source.refresh().releases, key=lambda each: each.info.counter)
        manifest = decode_json(source.fetch_manifest(release), Manifest)
        parts.mkdir(exist_ok=True)
        return [source.fetch_blob(ref, parts) for ref in manifest.blobs if ref.role in {"model", "golden"}]

    def check(work, is_done):
        stick = work / "usb" / "edgekit"
        try:
            look(stick, work / "parts")
        except EdgekitError:
            assert not is_done, "a stick that was called ready is not"
        make_stick(repository, stick, names=("kws@1.0",))
        assert len(look(stick, work / "parts")) == 2

    return Explorer("stick", recorder.trace, check, folder)


SCENARIOS = [
    explore_trust,
    explore_stick,
    explore_recall,
    explore_prune,
    explore_refresh,
    explore_publish,
    explore_publish_without_a_log,
    explore_version_seen,
    explore_undelegate,
    explore_rotate_root,
    explore_rotate_targets,
    explore_rotate_snapshot,
    explore_rotate_timestamp,
    explore_init,
]
"""The cheapest first: an fsync that one of them needs is not tried with the next."""
REDUNDANT = {
    # the private key has the public half, too
    "folder: sync_folder < write_durably < repository/ceremony.py:_role_keys",
    "folder: sync_folder < write_durably < repository/ceremony.py:_generate",
    # the reserved timestamp is written into the same folder before anything becomes visible
    "folder: sync_folder < write_durably < repository/store.py:save_config",
    # the name of the new audit log is made durable in the same folder before anything becomes visible
    "folder: sync_folder < make_folder < repository/ceremony.py:init_repository make_folder(path)",
}


@pytest.fixture(scope="module")
def explorers(office, published):
    made = {}

    def explorer(explore):
        if explore not in made:
            (folder := office.folder / explore.__name__).mkdir()
            made[explore] = explore(office, published, folder)
        return made[explore]

    return explorer


@pytest.mark.fault("F3")
@pytest.mark.parametrize("explore", SCENARIOS, ids=lambda explore: explore.__name__.removeprefix("explore_"))
def test_repository_after_a_power_cut_at_any_moment(explorers, explore):
    found = list(explorers(explore).violations())
    assert not found, "\n".join(map(str, found[:10]))


@pytest.mark.fault("F3")
def test_fsync_of_the_repository_forgotten(explorers):
    """Each one is needed: without it some power cut does harm."""
    left = survivors([explorers(explore) for explore in SCENARIOS], redundant=REDUNDANT)
    assert not left, "\n".join(map(str, left.values()))
