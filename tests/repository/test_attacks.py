"""What an attacker who holds the server or the network can do, against a real HTTP server on loopback."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from forging import forge, forge_online, role_signers
from releases import tiny_bundle, tree_digests

from edgekit.errors import DeviceError, EdgekitError, RepositoryError, TrustError
from edgekit.repository.ceremony import init_repository, refresh_repository, rotate
from edgekit.repository.publishing import add_publisher, publish
from edgekit.repository.server import RepositoryServer
from edgekit.repository.store import Store
from edgekit.schema.state import Floors
from edgekit.trust.floors import check_release, raise_release
from edgekit.trust.keys import save_public_key
from edgekit.trust.repository_client import TrustedRepository
from edgekit.trust.signer import generate_signer
from edgekit.trust.transport import TransportOptions

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
QUICK = TransportOptions(connect_timeout_s=2, read_timeout_s=0.4, headers_timeout_s=0.5, grace_s=0.3, min_bytes_per_s=2000)


class World:
    """A repository with two releases, its server, and one device."""

    def __init__(self, folder):
        self.folder = folder
        self.repo = folder / "repo"
        self.signer = generate_signer()
        init_repository(self.repo, now=NOW)
        save_public_key(self.signer.public_key, folder / "publisher.pub")
        add_publisher(self.repo, folder / "publisher.pub")
        self.root = (self.repo / "metadata" / "1.root.json").read_bytes()
        self.floors = Floors()
        self.cache = folder / "device" / "metadata"
        self.publish("1.0.0")

    def publish(self, version, **changes):
        bundle = tiny_bundle(self.folder / f"{version}.edgekit", self.signer, version=version, model=version.encode() * 99)
        return publish(self.repo, bundle, now=changes.pop("now", NOW), **changes)

    def device(self, url=None, *, now=NOW, floors=None, root=None, options=QUICK):
        return TrustedRepository(
            self.cache,
            url or self.url,
            root=self.root if root is None else root,
            floors=self.floors if floors is None else floors,
            now=now,
            options=options,
        )

    def refresh(self, url=None, **changes):
        result = self.device(url, **changes).refresh()
        self.floors = result.floors
        return result

    def refused(self, url=None, **changes) -> str:
        with pytest.raises(EdgekitError) as caught:
            self.device(url, **changes).refresh()
        return caught.value.code

    def snapshot(self, name):
        """A copy of what is served now, for the attacker."""
        copy = self.folder / name
        shutil.copytree(self.repo, copy)
        return copy


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Keys take no time, but 30 fsyncs each do: one world is made and copied."""
    folder = tmp_path_factory.mktemp("world") / "w"
    folder.mkdir()
    return World(folder)


@pytest.fixture
def world(template, tmp_path):
    shutil.copytree(template.folder, tmp_path / "w")
    world = World.__new__(World)
    world.__dict__.update(template.__dict__)
    world.folder, world.floors = tmp_path / "w", Floors()
    world.repo, world.cache = world.folder / "repo", world.folder / "device" / "metadata"
    with RepositoryServer(world.repo, "127.0.0.1", 0) as server:
        world.server, world.url = server, server.url
        yield world


def serving(folder):
    return RepositoryServer(folder, "127.0.0.1", 0)


def resign(world, change):
    """Sign changed metadata with the repository's own keys: what only a key thief can do."""
    chain = Store.open(world.repo).chain()
    change(chain)
    chain.targets.version += 1
    data = forge(world.repo, chain.targets, f"{chain.targets.version}.targets.json", role_signers(world.repo, "targets"))
    forge_online(world.repo, chain, data)


def test_refresh_lists_releases_and_fetches_manifests(world):
    world.publish("1.1.0", channel="dev")
    device = world.device()
    result = device.refresh()
    found = [(r.info.name, r.info.version, r.info.channel, r.info.counter) for r in result.releases]
    assert found == [("kws", "1.0.0", "production", 1), ("kws", "1.1.0", "dev", 2)]
    manifest = json.loads(device.fetch_manifest(result.releases[0]))
    assert manifest["version"] == "1.0.0"
    assert result.expires_at == NOW + timedelta(days=1)
    assert result.floors.time == NOW
    assert (result.floors.root, result.floors.targets) == (1, 3)


def test_second_refresh_is_small(world):
    world.refresh()
    assert world.refresh().received_bytes < 2000


def test_whole_old_repository_to_a_device_with_state(world):
    old = world.snapshot("old")
    world.publish("2.0.0")
    world.refresh()
    with serving(old) as attacker:
        assert world.refused(attacker.url) == "trust.rollback"


def test_old_repository_after_the_cache_was_wiped_is_stopped_by_the_floors(world):
    old = world.snapshot("old")
    world.publish("2.0.0")
    world.refresh()
    shutil.rmtree(world.cache)
    with serving(old) as attacker:
        assert world.refused(attacker.url) == "trust.rollback"
        assert world.device(attacker.url, floors=Floors()).refresh().releases  # TUF alone would have accepted it


def test_power_cut_that_zeroed_the_cache_then_old_repository(world):
    old = world.snapshot("old")
    world.publish("2.0.0")
    world.refresh()
    for path in world.cache.glob("*.json"):
        if not path.is_symlink():
            path.write_bytes(b"")
    with serving(old) as attacker:
        assert world.refused(attacker.url) == "trust.rollback"
    assert len(world.refresh().releases) == 2


@pytest.mark.parametrize("damage", ["zero", "garbage", "directory", "root_history", "dangling_link", "file_for_folder"])
def test_damaged_cache_is_rebuilt_from_the_bootstrap_root(world, damage):
    world.refresh()
    if damage == "root_history":
        shutil.rmtree(world.cache / "root_history")
        (world.cache / "root_history").write_text("x")
    elif damage == "dangling_link":
        (world.cache / "root.json").unlink()
        (world.cache / "root.json").symlink_to("nowhere")
    elif damage == "file_for_folder":
        shutil.rmtree(world.cache)
        world.cache.write_text("x")
    else:
        for name in ("timestamp", "snapshot", "targets"):
            path = world.cache / f"{name}.json"
            path.unlink()
            if damage == "directory":
                path.mkdir()
            else:
                path.write_bytes(b"" if damage == "zero" else b"\xff{[")
    assert len(world.refresh().releases) == 1


def test_frozen_repository_expires(world):
    world.refresh()
    assert world.refused(now=NOW + timedelta(days=1, seconds=1)) == "trust.expired"
    refresh_repository(world.repo, now=NOW + timedelta(days=2))
    assert world.refresh(now=NOW + timedelta(days=2, hours=1)).releases


def test_clock_set_back_does_not_thaw_a_frozen_repository(world):
    refresh_repository(world.repo, now=NOW + timedelta(days=30))
    later = NOW + timedelta(days=30)
    frozen = world.snapshot("frozen")
    world.refresh(now=later)
    floors = msgspec.structs.replace(world.floors, time=later + timedelta(days=3))
    with serving(frozen) as attacker:
        assert world.refused(attacker.url, floors=floors, now=datetime(1970, 1, 1, tzinfo=UTC)) == "trust.expired"
    assert world.refresh(now=datetime(1970, 1, 1, tzinfo=UTC)).floors.time == later


def test_clock_ten_years_ahead_raises_no_floor(world):
    world.refresh()
    assert world.refused(now=NOW + timedelta(days=3650)) == "trust.expired"
    assert world.floors.time == NOW
    assert world.refresh().releases


def test_mix_and_match_of_targets_and_snapshot(world):
    world.refresh()
    old = (world.repo / "metadata" / "2.targets.json").read_bytes()
    world.publish("2.0.0")
    (world.repo / "metadata" / "3.targets.json").write_bytes(old)
    assert world.refused() == "trust.digest"


def test_mix_and_match_of_snapshot_and_timestamp(world):
    world.refresh()
    old = (world.repo / "metadata" / "2.snapshot.json").read_bytes()
    world.publish("2.0.0")
    (world.repo / "metadata" / "3.snapshot.json").write_bytes(old)
    assert world.refused() == "trust.digest"


@pytest.mark.parametrize("name", ["timestamp.json", "2.snapshot.json", "2.targets.json"])
def test_flipped_byte_in_metadata(world, name):
    path = world.repo / "metadata" / name
    data = path.read_bytes()
    at = data.index(b'"version":') + 10
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert world.refused() in {"trust.signature", "trust.digest", "trust.metadata"}


@pytest.mark.parametrize("name", ["timestamp.json", "2.snapshot.json", "2.targets.json"])
def test_truncated_metadata(world, name):
    path = world.repo / "metadata" / name
    path.write_bytes(path.read_bytes()[:-20])
    assert world.refused() in {"trust.digest", "trust.metadata"}


@pytest.mark.parametrize(
    ("name", "bound"), [("timestamp.json", 16384), ("2.snapshot.json", 2_000_000), ("2.targets.json", 5_000_000)]
)
def test_endless_metadata(world, name, bound):
    path = world.repo / "metadata" / name
    with path.open("ab") as file:
        file.truncate(bound * 4)
    assert world.refused() == "trust.length"


def test_metadata_signed_by_another_key(world, tmp_path):
    other = tmp_path / "other"
    init_repository(other / "repo", now=NOW)
    with serving(other / "repo") as attacker:
        assert world.refused(attacker.url) == "trust.signature"


def test_provisioned_root_that_was_changed(world):
    changed = world.root.replace(b'"consistent_snapshot":true', b'"consistent_snapshot":false')
    assert changed != world.root
    assert world.refused(root=changed) == "trust.root"
    assert world.refused(root=b"") == "trust.root"


def new_root(world, change, *, signers=None, version=2):
    """Write the next root, signed by the repository's root key."""
    root = Store.open(world.repo).chain().root
    change(root)
    root.version = version
    forge(world.repo, root, f"{version}.root.json", role_signers(world.repo, "root") if signers is None else signers)


def test_revoked_targets_key(world):
    """The owner rotates the key; the thief, who has the old one and the server, signs a release of their own."""
    world.refresh()
    stolen = role_signers(world.repo, "targets")
    before = Store.open(world.repo).chain()
    rotate(world.repo, "targets", old="targets", new="generate", now=NOW)
    assert world.refresh().versions.root == 2
    before.targets.version = 9
    data = forge(world.repo, before.targets, "9.targets.json", stolen)
    chain = Store.open(world.repo).chain()
    chain.targets.version = 9
    forge_online(world.repo, chain, data)
    assert world.refused() == "trust.signature"
    with pytest.raises(TrustError):
        Store.open(world.repo).chain()


def test_new_root_signed_by_a_stranger(world):
    world.refresh()
    new_root(world, lambda root: None, signers=[generate_signer()])
    assert world.refused() == "trust.signature"


def test_new_root_hidden_after_it_was_seen(world):
    new_root(world, lambda root: None)
    world.refresh()
    assert world.floors.root == 2
    shutil.rmtree(world.cache)
    (world.repo / "metadata" / "2.root.json").unlink()
    assert world.refused() == "trust.rollback"


def test_fast_forward_is_undone_by_a_new_root(world):
    """A thief of the online keys signs absurdly high versions; the owner rotates both keys and begins at low ones again."""

    def ahead(chain):
        chain.timestamp.version = 1000
        chain.snapshot.version = 1000

    good = Store.open(world.repo).chain()
    resign(world, ahead)
    world.refresh()
    assert world.floors.timestamp == 1001
    for role in ("snapshot", "timestamp"):
        rotate(world.repo, role, old=role, new="generate", now=NOW)
    high = Store.open(world.repo).chain()
    good.snapshot.version, good.timestamp.version = 5, 2
    data = (world.repo / "metadata" / f"{high.targets.version}.targets.json").read_bytes()
    good.targets.version = high.targets.version
    keys = role_signers(world.repo, "snapshot-", "timestamp-")
    forge_online(world.repo, good, data, signers=keys)
    low = world.refresh().floors
    assert (low.root, low.timestamp, low.snapshot) == (3, 3, 6)


def test_one_key_under_two_keyids(world):
    def double(root):
        from securesystemslib.signer import SSlibKey

        key = root.keys[root.roles["targets"].keyids[0]]
        alias = SSlibKey("0" * 64, key.keytype, key.scheme, dict(key.keyval))
        root.add_key(alias, "targets")

    new_root(world, double)
    assert world.refused() == "trust.duplicate_key"


def test_manifest_of_the_same_length(world):
    device = world.device()
    release = device.refresh().releases[0]
    path = next((world.repo / "targets").rglob("*.manifest.json"))
    path.write_bytes(path.read_bytes().replace(b'"version": "1.0.0"', b'"version": "9.0.0"'))
    with pytest.raises(TrustError) as caught:
        device.fetch_manifest(release)
    assert caught.value.code == "trust.digest"


def test_manifest_longer_shorter_and_missing(world):
    device = world.device()
    release = device.refresh().releases[0]
    path = next((world.repo / "targets").rglob("*.manifest.json"))
    data = path.read_bytes()
    for changed, code in ((data + b" " * 100, "trust.length"), (data[:-1], "trust.digest")):
        path.write_bytes(changed)
        with pytest.raises(TrustError) as caught:
            device.fetch_manifest(release)
        assert caught.value.code == code
    path.unlink()
    with pytest.raises(RepositoryError) as missing:
        device.fetch_manifest(release)
    assert missing.value.code == "repository.not_found"


def test_release_counter_below_the_floor(world):
    old = world.refresh().releases[0]
    floors = raise_release(world.floors, world.publish("2.0.0"))
    with pytest.raises(TrustError) as caught:
        check_release(floors, old)
    assert caught.value.code == "trust.rollback"
    again = publish(world.repo, world.folder / "1.0.0.edgekit", is_again=True, now=NOW)
    check_release(floors, again)
    assert raise_release(floors, again).releases == {"kws": 3}


def test_release_that_does_not_fit_is_passed_over(world):
    def smuggle(chain):
        good = chain.targets.targets["models/kws/1.0.0/production/manifest.json"]
        for path, custom in (
            ("models/kws/9.9.9/production/manifest.json", dict(good.custom)),  # says 1.0.0
            ("models/kws/1.0.0/staging/manifest.json", dict(good.custom)),  # says production
            ("models/kws/8.0.0/manifest.json", {"name": "kws"}),
            ("models/kws/7.0.0/manifest.json", None),
            ("models/kws/other.txt", {}),
        ):
            from tuf.api.metadata import TargetFile

            fields = {} if custom is None else {"custom": custom}
            chain.targets.targets[path] = TargetFile(good.length, good.hashes, path, fields)

    resign(world, smuggle)
    assert [r.info.version for r in world.refresh().releases] == ["1.0.0"]


def test_unreachable_and_wrong_address(world):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert world.refused(f"http://127.0.0.1:{port}") == "repository.unreachable"
    assert world.refused(f"{world.url}/elsewhere") == "repository.not_found"
    assert world.refused("ftp://127.0.0.1/") == "repository.unreachable"


class Rude:
    """A server that answers every request with a given behaviour."""

    def __init__(self, behave):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._behave = behave
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._stop = threading.Event()

    def __enter__(self):
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._socket.close()

    def _run(self):
        while not self._stop.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection):
        with connection:
            try:
                connection.recv(65536)
                self._behave(connection, self._stop)
            except OSError:
                pass


def drip_body(connection, stop):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
    while not stop.wait(0.05):
        connection.sendall(b"x")


def drip_headers(connection, stop):
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while not stop.wait(0.05):
        connection.sendall(b"X-A: b\r\n")


def silence(connection, stop):
    stop.wait(5)


def endless(connection, stop):
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while not stop.is_set():
        connection.sendall(b"x" * 65536)


def gzipped(connection, stop):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc")


def garbage(connection, stop):
    connection.sendall(b"\x00\xff garbage\r\n\r\n")


def hang_up(connection, stop):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")


@pytest.mark.parametrize(
    ("behave", "codes"),
    [
        (drip_body, {"repository.slow"}),
        (drip_headers, {"repository.slow", "repository.unreachable"}),
        (silence, {"repository.slow"}),
        (endless, {"trust.length"}),
        (gzipped, {"repository.unreachable"}),
        (garbage, {"repository.unreachable"}),
        (hang_up, {"repository.unreachable"}),
    ],
)
def test_rude_server_costs_bounded_time(world, behave, codes):
    world.refresh()
    before = tree_digests(world.cache)
    with Rude(behave) as server:
        started = time.monotonic()
        assert world.refused(server.url) in codes
        assert time.monotonic() - started < 20  # bounded at all: without our limits it would last for ever
    assert tree_digests(world.cache) == before


def test_redirect_to_another_server_is_not_followed(world):
    def redirect(connection, stop):
        connection.sendall(
            f"HTTP/1.1 302 Found\r\nLocation: {world.url}/metadata/2.root.json\r\nContent-Length: 0\r\n\r\n".encode()
        )

    with Rude(redirect) as server:
        assert world.refused(server.url) == "repository.unreachable"


def test_redirect_to_what_is_no_address(world):
    def redirect(connection, stop):
        connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://[x/y\r\nContent-Length: 0\r\n\r\n")

    with Rude(redirect) as server:
        assert world.refused(server.url) == "repository.unreachable"


def test_metadata_disk_full(world, monkeypatch):
    import errno
    import os

    world.refresh()
    world.publish("2.0.0")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(DeviceError) as caught:
            world.device().refresh()
    assert caught.value.code == "device.disk_full"
    assert len(world.refresh().releases) == 2


def test_refresh_fsyncs_every_file_of_the_cache(world, monkeypatch):
    import os

    synced = set()
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(str(Path(f"/proc/self/fd/{fd}").readlink())), real(fd))[1])
    world.refresh()
    files = {str(p) for p in world.cache.rglob("*") if p.is_file() and not p.is_symlink()}
    assert files | {str(world.cache), str(world.cache / "root_history")} <= synced


REFRESH_WITHOUT_CRYPTOGRAPHY = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cryptography":
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
from datetime import datetime
from pathlib import Path
from edgekit.schema.state import Floors
from edgekit.trust.repository_client import TrustedRepository
cache, url, root, now = sys.argv[1:]
repository = TrustedRepository(Path(cache), url, root=Path(root).read_bytes(), floors=Floors(), now=datetime.fromisoformat(now))
result = repository.refresh()
print(len(repository.fetch_manifest(result.releases[0])) == result.releases[0].manifest_size_bytes)
assert not any(name.split(".")[0] == "cryptography" for name in sys.modules)
"""


def test_refresh_works_without_cryptography(world):
    root = str(world.repo / "metadata" / "1.root.json")
    command = [sys.executable, "-c", REFRESH_WITHOUT_CRYPTOGRAPHY, str(world.cache), world.url, root, NOW.isoformat()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr
