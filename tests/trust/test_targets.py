"""Arbitrary targets of a small TUF repository, over a real server on loopback that may cut, drip or lie."""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from edgekit.errors import EdgekitError
from edgekit.schema.state import Floors
from edgekit.trust import download
from edgekit.trust.signer import generate_signer
from edgekit.trust.targets import fetch_targets, refresh_top_roles
from edgekit.trust.transport import Transport, TransportOptions

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
LATER = datetime(2027, 11, 20, tzinfo=UTC)
QUICK = TransportOptions(connect_timeout_s=2, read_timeout_s=0.5, headers_timeout_s=1, grace_s=0.3, min_bytes_per_s=2000)
DATA = random.Random(5).randbytes(200_000)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        site, path = self.server.site, unquote(self.path.removeprefix("/"))
        content = site.served.get(path)
        if content is None:
            self.send_error(404)
            return
        text = self.headers.get("Range")
        first = int(text.removeprefix("bytes=").rstrip("-")) if text else 0
        body = content[first:]
        self.send_response(206 if text else 200)
        self.send_header("Content-Length", str(len(body)))
        if text:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if path.startswith("targets/"):
            site.asked.append((path, first))
            body = body[: site.cut_after]
            site.sent += len(body)
            for byte in body if site.is_dripping else b"":
                self.wfile.write(bytes([byte]))
                threading.Event().wait(0.03)
        if not (site.is_dripping and path.startswith("targets/")):
            self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass


class Site:
    """A TUF repository in memory, its server, and one client."""

    def __init__(self, folder):
        self.folder, self.served, self.floors = folder, {}, Floors()
        self.asked, self.sent, self.cut_after, self.is_dripping = [], 0, None, False
        self.signers = {role: [generate_signer()] for role in ("root", "timestamp", "snapshot", "targets")}
        self.root = Root(expires=LATER, consistent_snapshot=True)
        self.targets, self.snapshot, self.timestamp = Targets(expires=LATER), Snapshot(expires=LATER), Timestamp(expires=LATER)
        self.delegated = {}
        for role, signers in self.signers.items():
            self.root.add_key(signers[0].tuf_signer().public_key, role)
        self.provisioned = self.sign(self.root, "root")
        self.served["metadata/1.root.json"] = self.provisioned
        self.publish()

    def sign(self, signed, role):
        metadata = Metadata(signed)
        for signer in self.signers[role]:
            metadata.sign(signer.tuf_signer(), append=True)
        return metadata.to_bytes()

    def publish(self):
        for name, role in {**self.delegated, "targets": self.targets}.items():
            self.served[f"metadata/{role.version}.{name}.json"] = self.sign(role, name)
            self.snapshot.meta[f"{name}.json"] = MetaFile(role.version)
        self.served[f"metadata/{self.snapshot.version}.snapshot.json"] = self.sign(self.snapshot, "snapshot")
        self.timestamp.snapshot_meta = MetaFile(self.snapshot.version)
        self.served["metadata/timestamp.json"] = self.sign(self.timestamp, "timestamp")

    def raise_versions(self, by=1):
        for role in (self.targets, self.snapshot, self.timestamp):
            role.version += by
        self.publish()

    def delegate(self, name, paths, *, parent=None, is_terminating=False, threshold=1):
        """A role with one new key."""
        self.signers.setdefault(name, [])
        signer = generate_signer()
        key = signer.tuf_signer().public_key
        self.signers[name].append(signer)
        above = self.delegated[parent] if parent else self.targets
        above.delegations = above.delegations or Delegations(keys={}, roles={})
        above.delegations.roles[name] = DelegatedRole(name, [key.keyid], threshold, is_terminating, paths)
        above.delegations.keys[key.keyid] = key
        return self.delegated.setdefault(name, Targets(expires=LATER))

    def add(self, path, content=DATA, *, role=None, hashes=("sha256",)):
        target = TargetFile.from_data(path, content, list(hashes))
        (role or self.targets).targets[path] = target
        folder, slash, name = path.rpartition("/")
        for digest in target.hashes.values():
            self.served[f"targets/{folder}{slash}{digest}.{name}"] = content
        self.publish()
        return target

    def change(self, path, content):
        """Other bytes where a target's are."""
        for name in [name for name in self.served if name.startswith("targets/") and name.endswith(path)]:
            self.served[name] = content

    def refresh(self, transport=None):
        updater, self.floors = refresh_top_roles(
            self.folder / "cache",
            f"{self.url}/metadata/",
            root=self.provisioned,
            floors=self.floors,
            now=NOW,
            transport=transport or Transport(QUICK),
        )
        return updater

    def fetch(self, *paths):
        with contextlib.closing(Transport(QUICK)) as transport:
            updater = self.refresh(transport)
            where = self.folder / "out"
            url = f"{self.url}/targets/"
            return fetch_targets(updater, paths, targets_url=url, out=where, transport=transport, retry_s=0.01)

    def refused(self, *paths):
        with pytest.raises(EdgekitError) as caught:
            self.fetch(*paths)
        return caught.value.code

    @property
    def left(self):
        """Files below the folder that targets are put into."""
        out = self.folder / "out"
        return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


@pytest.fixture
def site(tmp_path):
    found = Site(tmp_path)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.site = found
        found.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield found
        server.shutdown()


def test_target_that_is_here_is_not_fetched_again(site):
    site.add("a/b.bin")
    (path,) = site.fetch("a/b.bin")
    assert path.read_bytes() == DATA
    site.fetch("a/b.bin")
    assert len(site.asked) == 1
    path.write_bytes(DATA[:-1] + b"x")
    assert site.fetch("a/b.bin")[0].read_bytes() == DATA
    assert sorted(p.name for p in (site.folder / "out").iterdir()) == ["a%2Fb.bin"]


def test_repository_without_consistent_snapshots(site):
    site.root.consistent_snapshot = False
    site.provisioned = site.served["metadata/1.root.json"] = site.sign(site.root, "root")
    site.add("a/b.bin")
    site.served |= {
        "targets/a/b.bin": DATA,
        "metadata/targets.json": site.served["metadata/1.targets.json"],
        "metadata/snapshot.json": site.served["metadata/1.snapshot.json"],
    }
    assert site.fetch("a/b.bin")[0].read_bytes() == DATA
    assert site.asked == [("targets/a/b.bin", 0)]


def test_delegations_are_followed_and_bounded(site):
    site.delegate("team", ["team/*"])
    inner = site.delegate("inner", ["team/*"], parent="team")
    site.add("team/x", b"inner", role=inner)
    site.add("other/x", b"beyond what is delegated", role=inner)
    assert site.fetch("team/x")[0].read_bytes() == b"inner"
    assert site.refused("other/x") == "repository.no_target"
    assert site.refused("team/y") == "repository.no_target"


def test_terminating_role_ends_the_search(site):
    site.delegate("first", ["*"], is_terminating=True)
    second = site.delegate("second", ["*"])
    site.add("x", role=second)
    assert site.refused("x") == "repository.no_target"


@pytest.mark.fault("F8")
def test_role_is_verified_by_each_delegator(site):
    """What is valid by one parent's word is not by another's: python-tuf before 7.0.1 took it."""
    site.delegate("a", ["a/*"])
    site.delegate("b", ["b/*"])
    shared = site.delegate("shared", ["a/*"], parent="a")
    site.delegate("shared", ["b/*"], parent="b")
    site.signers["shared"].pop()  # b's key has not signed
    site.add("a/x", b"trusted", role=shared)
    site.add("b/x", b"not trusted", role=shared)
    assert site.refused("a/x", "b/x") == "trust.signature"
    assert site.left == ["a%2Fx"]


@pytest.mark.fault("F8")
def test_key_that_is_listed_twice_does_not_count_twice(site):
    role = site.delegate("team", ["team/*"], threshold=2)
    (keyid,) = site.targets.delegations.roles["team"].keyids
    key = site.targets.delegations.keys[keyid]
    site.targets.delegations.keys["again"] = type(key)("again", key.keytype, key.scheme, key.keyval)
    site.targets.delegations.roles["team"].keyids.append("again")
    site.add("team/x", role=role)
    metadata = Metadata.from_bytes(site.served["metadata/1.team.json"])
    signature = metadata.signatures[keyid]
    metadata.signatures["again"] = type(signature)("again", signature.signature)
    site.served["metadata/1.team.json"] = metadata.to_bytes()
    assert site.refused("team/x") == "trust.duplicate_key"
    assert site.left == []


@pytest.mark.parametrize("hashes", [["sha256"], ["sha512"], ["sha512", "sha256"]])
def test_hash_algorithms(site, hashes):
    site.add("x", hashes=hashes)
    assert site.fetch("x")[0].read_bytes() == DATA


@pytest.mark.parametrize("hashes", [{"sha384": "0" * 96}, {"sha256": "../../x"}, {"sha256": "0" * 63}, {"none": "0" * 64}])
def test_digest_that_cannot_be_checked(site, hashes):
    site.add("x").hashes = hashes
    site.publish()
    assert site.refused("x") == "trust.digest"
    assert site.asked == []


@pytest.mark.parametrize("further", [{"sha512": "0" * 128}, {"unknown": "0" * 64}])
def test_every_digest_must_fit(site, further):
    site.add("x").hashes |= further
    site.publish()
    assert site.refused("x") == "trust.digest"
    assert site.left == []


@pytest.mark.fault("F8")
@pytest.mark.parametrize(
    ("content", "code"), [(DATA[:-1] + b"x", "trust.digest"), (DATA + b"x", "trust.length"), (DATA * 9, "trust.length")]
)
def test_other_bytes_on_the_server(site, content, code):
    site.add("x")
    site.change("x", content)
    assert site.refused("x") == code
    assert site.left == []


def test_server_that_lost_a_target(site):
    site.add("x")
    site.served = {name: content for name, content in site.served.items() if not name.startswith("targets/")}
    assert site.refused("x") == "repository.not_found"


def test_link_cut_again_and_again_transfers_each_byte_once(site):
    site.add("x")
    site.cut_after = 70_000
    assert site.fetch("x")[0].read_bytes() == DATA
    assert site.sent == len(DATA)
    assert [first for _, first in site.asked] == [0, 70_000, 140_000]


def test_interrupted_target_is_gone_on_with_later(site):
    target = site.add("x", hashes=["sha512"])
    site.cut_after = 0
    parts = site.folder / "out" / ".parts"
    parts.mkdir(parents=True)
    (parts / f"{target.hashes['sha512']}.part").write_bytes(DATA[:150_000])
    assert site.refused("x") == "repository.unreachable"
    assert site.left == [f".parts/{target.hashes['sha512']}.part"]
    site.cut_after = None
    assert site.fetch("x")[0].read_bytes() == DATA
    assert site.sent == 50_000
    assert site.left == ["x"]


@pytest.mark.fault("F7")
def test_slow_retrieval_ends(site):
    site.add("x", DATA[:300])
    site.is_dripping = True
    assert site.refused("x") == "repository.slow"


def test_target_larger_than_the_disk_is_not_asked_for(site, monkeypatch):
    site.add("x")
    monkeypatch.setattr(download, "free_bytes", lambda folder: 1000)
    assert site.refused("x") == "device.disk_full"
    assert site.asked == []


@pytest.mark.parametrize("path", ["a b", "100%25", "what?x=1", "x#y", "ü/ö", "../../etc/x", "/x", "a+b"])
def test_unusual_paths_stay_in_their_folder(site, path):
    site.add(path, b"content")
    (found,) = site.fetch(path)
    assert found.read_bytes() == b"content"
    assert found.parent == site.folder / "out"
    assert len(site.left) == 1


@pytest.mark.parametrize("path", ["..", ".parts", "x" * 300])
def test_path_that_is_no_file_name(site, path):
    site.add(path)
    assert site.refused(path) == "device.storage"


@pytest.mark.fault("F8")
def test_rolled_back_repository_and_lost_cache(site):
    old = dict(site.served)
    site.raise_versions()
    site.refresh()
    site.served = old
    shutil.rmtree(site.folder / "cache")
    assert site.refused("x") == "trust.rollback"


@pytest.mark.fault("F28")
def test_new_root_recovers_from_versions_that_were_signed_too_high(site):
    site.raise_versions(by=1000)
    site.refresh()
    site.root.version = 2
    for role in ("timestamp", "snapshot"):
        site.root.revoke_key(site.signers[role][0].keyid, role)
        site.signers[role] = [generate_signer()]
        site.root.add_key(site.signers[role][0].tuf_signer().public_key, role)
    site.served["metadata/2.root.json"] = site.sign(site.root, "root")
    site.raise_versions(by=-999)
    site.refresh()
    assert (site.floors.root, site.floors.timestamp, site.floors.targets) == (2, 2, 2)
