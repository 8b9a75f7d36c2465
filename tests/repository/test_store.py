from __future__ import annotations

import fcntl
import json
import shutil
import stat
from datetime import UTC, datetime, timedelta

import pytest
from forging import forge
from releases import tiny_bundle, tree_digests

from edgekit.errors import RepositoryError, TrustError, UsageError
from edgekit.repository.ceremony import init_repository, refresh_repository, repository_status
from edgekit.repository.publishing import add_publisher, check_repository, publish, rollback
from edgekit.repository.server import RepositoryServer
from edgekit.repository.store import Expiry, Store
from edgekit.schema.state import Floors
from edgekit.trust.keys import save_public_key
from edgekit.trust.repository_client import TrustedRepository
from edgekit.trust.signer import generate_signer, save_signer

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    signer = generate_signer()
    save_public_key(signer.public_key, folder / "publisher.pub")
    init_repository(folder / "repo", now=NOW)
    add_publisher(folder / "repo", folder / "publisher.pub")
    return folder, signer


@pytest.fixture
def place(template, tmp_path):
    shutil.copytree(template[0], tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture
def repo(place):
    return place / "repo"


@pytest.fixture
def signer(template):
    return template[1]


def bundle(place, signer, version="1.0.0", **changes):
    return tiny_bundle(place / f"{version}.edgekit", signer, version=version, **changes)


def releases_seen(repo, cache, *, now=NOW):
    """What a fresh device sees over HTTP, with every manifest and blob fetched."""
    from edgekit.bundle.reader import parse_manifest
    from edgekit.trust.download import download_blob

    with RepositoryServer(repo, "127.0.0.1", 0) as server:
        root = (repo / "metadata" / "1.root.json").read_bytes()
        device = TrustedRepository(cache, server.url, root=root, floors=Floors(), now=now)
        releases = device.refresh().releases
        for release in releases:
            for ref in parse_manifest(device.fetch_manifest(release)).blobs:
                download_blob(server.url, ref, cache.parent / "blobs")
    return {release.info.version: release.info.counter for release in releases}


def test_init_makes_separate_private_keys(repo):
    keys = repo.parent / "keys"
    names = [
        "root.json",
        *(f"{role}.{kind}" for role in ("root", "snapshot", "targets", "timestamp") for kind in ("pem", "pub")),
    ]
    assert sorted(p.name for p in keys.iterdir()) == names
    assert {stat.S_IMODE(p.stat().st_mode) for p in keys.glob("*.pem")} == {0o600}
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    status = repository_status(repo, now=NOW)
    assert len({keyid for role in status.roles for keyid in role.keyids}) == 4
    days = {role.role: (role.expires_at - NOW).days for role in status.roles}
    assert days == {"root": 365, "targets": 90, "snapshot": 7, "timestamp": 1}
    assert {role.threshold for role in status.roles} == {1}


def test_init_twice_and_keys_where_they_would_be_served(repo, tmp_path):
    with pytest.raises(UsageError) as caught:
        init_repository(repo)
    assert caught.value.code == "repository.exists"
    with pytest.raises(UsageError) as caught:
        init_repository(tmp_path / "r", keys_dir=tmp_path / "r" / "metadata" / "keys")
    assert caught.value.code == "repository.keys_inside"
    assert not (tmp_path / "r" / "metadata").exists()


def test_publish_and_see_it_on_a_device(place, repo, signer, tmp_path):
    release = publish(repo, bundle(place, signer), notes="first", now=NOW)
    assert (release.info.counter, release.info.channel, release.info.notes) == (1, "production", "first")
    assert release.info.runtimes == ("onnxruntime",)
    assert release.info.installed_bytes == sum(p.stat().st_size for p in (repo / "blobs" / "sha256").iterdir())
    assert publish(repo, bundle(place, signer, "1.1.0"), channel="dev", now=NOW).info.counter == 2
    assert publish(repo, bundle(place, signer, "0.1.0", name="other"), now=NOW).info.counter == 1
    assert releases_seen(repo, tmp_path / "cache") == {"1.0.0": 1, "1.1.0": 2, "0.1.0": 1}
    assert check_repository(repo) == ()


def test_release_says_that_clients_are_ready_for_another_contract(place, repo, signer, tmp_path):
    publish(repo, bundle(place, signer), now=NOW)
    changed = publish(repo, bundle(place, signer, "2.0.0"), allows_contract_change=True, now=NOW)
    back = rollback(repo, "kws", now=NOW)
    first, newer = (changed.info.allows_contract_change, back.info.allows_contract_change)
    assert (first, newer) == (True, True), "the way back crosses the same change"
    assert not publish(repo, bundle(place, signer, "3.0.0"), now=NOW).info.allows_contract_change


def test_publish_the_same_again(place, repo, signer):
    path = bundle(place, signer)
    first = publish(repo, path, now=NOW)
    before = tree_digests(repo)
    assert publish(repo, path, now=NOW) == first
    assert tree_digests(repo) == before
    publish(repo, bundle(place, signer, "2.0.0"), now=NOW)
    again = publish(repo, path, is_again=True, now=NOW)
    assert again.info.counter == 3
    assert again.manifest_digest == first.manifest_digest
    assert [r.info.version for r in repository_status(repo).releases] == ["2.0.0", "1.0.0"]


def test_publish_another_content_under_the_same_version(place, repo, signer):
    publish(repo, bundle(place, signer), now=NOW)
    for is_again in (False, True):
        with pytest.raises(RepositoryError) as caught:
            publish(repo, bundle(place, signer, model=b"other"), is_again=is_again, now=NOW)
        assert caught.value.code == "repository.version_exists"


def test_one_version_on_two_channels(place, repo, signer):
    path = bundle(place, signer)
    publish(repo, path, channel="dev", now=NOW)
    publish(repo, path, now=NOW)
    found = [(r.info.channel, r.info.counter) for r in repository_status(repo).releases]
    assert found == [("dev", 1), ("production", 2)]
    assert publish(repo, path, channel="dev", now=NOW).info.counter == 1


def test_publish_by_a_publisher_that_is_not_trusted(place, repo):
    stranger = generate_signer()
    before = tree_digests(repo)
    with pytest.raises(TrustError) as caught:
        publish(repo, bundle(place, stranger), now=NOW)
    assert caught.value.code == "bundle.untrusted_key"
    assert tree_digests(repo) == before
    assert publish(repo, bundle(place, stranger), keys=[stranger.public_key], now=NOW).info.counter == 1


def test_publish_where_nobody_is_trusted(tmp_path, signer):
    init_repository(tmp_path / "r", now=NOW)
    with pytest.raises(UsageError) as caught:
        publish(tmp_path / "r", bundle(tmp_path, signer))
    assert caught.value.code == "repository.no_publisher"


def test_publish_tampered_bundle(place, repo, signer):
    path = bundle(place, signer)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"weights", b"WEIGHTS", 1))
    with pytest.raises(TrustError):
        publish(repo, path, now=NOW)


@pytest.mark.parametrize("channel", ["", "Prod", "a/b", "-x", "x" * 40, "a\n"])
def test_publish_to_a_name_that_is_no_channel(place, repo, signer, channel):
    with pytest.raises(UsageError) as caught:
        publish(repo, bundle(place, signer), channel=channel)
    assert caught.value.code == "repository.channel"


def test_publish_while_another_writes(place, repo, signer):
    with (repo / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RepositoryError) as caught:
            publish(repo, bundle(place, signer), now=NOW)
    assert caught.value.code == "repository.locked"
    assert publish(repo, bundle(place, signer), now=NOW).info.counter == 1


def test_no_repository_here(tmp_path):
    with pytest.raises(RepositoryError) as caught:
        repository_status(tmp_path)
    assert caught.value.code == "repository.not_found"


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_publish_with_a_key_open_foreign_or_missing(place, repo, signer, role, tmp_path):
    key = place / "keys" / f"{role}.pem"
    before = tree_digests(repo / "metadata")
    key.chmod(0o644)
    with pytest.raises(UsageError) as caught:
        publish(repo, bundle(place, signer), now=NOW)
    assert caught.value.code == "key.mode"
    kept = key.rename(tmp_path / "kept.pem")
    save_signer(generate_signer(), key)
    with pytest.raises(TrustError) as foreign:
        publish(repo, bundle(place, signer), now=NOW)
    assert foreign.value.code == "repository.foreign_key"
    key.unlink()
    if role == "targets":
        publish(repo, bundle(place, signer), now=NOW)
    else:
        with pytest.raises(UsageError) as caught:
            publish(repo, bundle(place, signer), now=NOW)
        assert caught.value.code == "repository.no_key"
    assert tree_digests(repo / "metadata") == before
    kept.chmod(0o600)
    kept.rename(key)
    refresh_repository(repo, now=NOW)
    assert releases_seen(repo, tmp_path / "cache") == {"1.0.0": 1}
    assert repository_status(repo, now=NOW).waiting == ()


def test_publishing_needs_no_root_key(place, repo, signer, tmp_path):
    (place / "keys" / "root.pem").unlink()
    publish(repo, bundle(place, signer), now=NOW)
    assert releases_seen(repo, tmp_path / "cache") == {"1.0.0": 1}


def test_nothing_is_signed_on_top_of_exchanged_metadata(place, repo, signer, tmp_path):
    """An intruder on the web server, without the keys, changes the list of releases and waits for the next publish."""
    publish(repo, bundle(place, signer), now=NOW)
    path = repo / "metadata" / "2.targets.json"
    record = json.loads(path.read_bytes())
    record["signed"]["targets"]["models/kws/1.0.0/production/manifest.json"]["hashes"]["sha256"] = "0" * 64
    path.write_text(json.dumps(record))
    before = tree_digests(repo / "metadata")
    for action in (lambda: publish(repo, bundle(place, signer, "2.0.0"), now=NOW), lambda: refresh_repository(repo, now=NOW)):
        with pytest.raises(TrustError) as caught:
            action()
        assert caught.value.code == "repository.foreign_metadata"
    assert tree_digests(repo / "metadata") == before


def test_nothing_is_signed_on_top_of_an_exchanged_root(place, repo, signer):
    """The intruder brings a root of their own that trusts their keys beside ours, and signs everything with theirs."""
    publish(repo, bundle(place, signer), now=NOW)
    stranger = generate_signer()
    chain = Store.open(repo).chain()
    chain.root.version = 2
    for role in ("root", "targets", "snapshot", "timestamp"):
        chain.root.add_key(stranger.tuf_signer().public_key, role)
    forge(repo, chain.root, "2.root.json", [stranger])
    chain.targets.targets["models/kws/1.0.0/production/manifest.json"].hashes["sha256"] = "0" * 64
    forge(repo, chain.targets, "2.targets.json", [stranger])
    forge(repo, chain.snapshot, "2.snapshot.json", [stranger])
    forge(repo, chain.timestamp, "timestamp.json", [stranger])
    before = tree_digests(repo / "metadata")
    for action in (
        lambda: publish(repo, bundle(place, signer, "2.0.0"), now=NOW),
        lambda: refresh_repository(repo, now=NOW),
        lambda: repository_status(repo, now=NOW),
    ):
        with pytest.raises(TrustError) as caught:
            action()
        assert caught.value.code == "repository.foreign_metadata"
    assert tree_digests(repo / "metadata") == before


def test_publishing_needs_our_copy_of_the_root(place, repo, signer):
    (place / "keys" / "root.json").unlink()
    with pytest.raises(UsageError) as caught:
        publish(repo, bundle(place, signer), now=NOW)
    assert caught.value.code == "repository.no_anchor"
    assert repository_status(repo, now=NOW).releases == ()


def test_refresh_extends_the_expiry(place, repo, signer, tmp_path):
    publish(repo, bundle(place, signer), now=NOW)
    later = NOW + timedelta(days=20)
    assert {r.role for r in repository_status(repo, now=later).roles if r.is_expired} == {"snapshot", "timestamp"}
    status = refresh_repository(repo, now=later)
    expires = {role.role: role.expires_at for role in status.roles}
    assert expires["timestamp"] == later + timedelta(days=1)
    assert expires["snapshot"] == later + timedelta(days=7)
    assert expires["targets"] == NOW + timedelta(days=90)
    assert releases_seen(repo, tmp_path / "cache", now=later) == {"1.0.0": 1}
    status = refresh_repository(repo, is_targets_too=True, now=later)
    assert {role.role: role.expires_at for role in status.roles}["targets"] == later + timedelta(days=90)


def test_custom_expiry_is_kept(tmp_path):
    init_repository(tmp_path / "r", expiry=Expiry(timestamp=0.5), now=NOW)
    status = refresh_repository(tmp_path / "r", now=NOW)
    assert {r.role: r.expires_at for r in status.roles}["timestamp"] == NOW + timedelta(hours=12)


def test_check_finds_missing_and_damaged_files_and_publish_repairs(place, repo, signer):
    path = bundle(place, signer)
    publish(repo, path, now=NOW)
    blobs = sorted((repo / "blobs" / "sha256").iterdir())
    blobs[0].unlink()
    blobs[1].write_bytes(b"x" * blobs[1].stat().st_size)
    faults = check_repository(repo)
    assert len(faults) == 2
    publish(repo, path, is_again=True, now=NOW)
    assert check_repository(repo) == ()


def test_two_publishers_with_one_name(repo, place):
    keys = [generate_signer().public_key for _ in range(2)]
    for number, key in enumerate(keys):
        save_public_key(key, place / f"{number}" / "publisher.pub")
        add_publisher(repo, place / f"{number}" / "publisher.pub")
        add_publisher(repo, place / f"{number}" / "publisher.pub")
    assert {key.keyid for key in keys} <= set(repository_status(repo).publishers)
    assert len(repository_status(repo).publishers) == 3


def test_version_number_is_never_used_twice(place, repo, signer):
    """A file that a crash left is not replaced: somebody may have fetched it."""
    publish(repo, bundle(place, signer), now=NOW)
    (repo / "metadata" / "7.targets.json").write_text("left over")
    publish(repo, bundle(place, signer, "2.0.0"), now=NOW)
    assert (repo / "metadata" / "7.targets.json").read_text() == "left over"
    assert {r.role: r.version for r in repository_status(repo).roles}["targets"] == 8
