"""The command line that the TUF conformance suite drives, against a repository of ours: it must work where the suite is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from releases import tiny_bundle

from edgekit.repository.ceremony import init_repository, refresh_repository
from edgekit.repository.publishing import publish
from edgekit.repository.server import RepositoryServer
from edgekit.trust.signer import generate_signer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "conformance_client.py"


class World:
    def __init__(self, folder):
        self.folder, self.repo, self.metadata = folder, folder / "repo", folder / "metadata"
        self.metadata.mkdir()
        now = datetime.now(UTC)
        init_repository(self.repo, now=now)
        signer = generate_signer()
        bundle = tiny_bundle(folder / "kws.edgekit", signer)
        publish(self.repo, bundle, channel="dev", keys=[signer.public_key], now=now)
        (manifest,) = (self.repo / "targets").rglob("*.manifest.json")
        self.manifest = manifest
        self.target = f"{manifest.parent.relative_to(self.repo / 'targets')}/manifest.json"

    def run(self, *arguments):
        command = [sys.executable, str(SCRIPT), "--metadata-dir", str(self.metadata), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def init(self):
        assert self.run("init", str(self.repo / "metadata" / "1.root.json")).returncode == 0

    def refresh(self):
        return self.run("--metadata-url", f"{self.url}/metadata/", "refresh")

    def download(self, *names):
        where = ["--target-dir", str(self.folder / "in"), "--target-base-url", f"{self.url}/targets/"]
        wanted = [word for name in names for word in ("--target-name", name)]
        return self.run("--metadata-url", f"{self.url}/metadata/", *wanted, *where, "download")

    def downloaded(self):
        return [path.read_bytes() for path in (self.folder / "in").rglob("*") if path.is_file()]


@pytest.fixture
def world(tmp_path):
    found = World(tmp_path)
    with RepositoryServer(found.repo, "127.0.0.1", 0) as server:
        found.url = server.url
        yield found


def test_init_refresh_and_download(world):
    world.init()
    assert [path.name for path in world.metadata.glob("*.json")] == ["root.json"]
    assert world.refresh().returncode == 0
    assert {"root.json", "timestamp.json", "snapshot.json", "targets.json"} <= {p.name for p in world.metadata.iterdir()}
    assert world.download(world.target).returncode == 0
    assert world.downloaded() == [world.manifest.read_bytes()]


def test_changed_target_is_refused_and_ends_the_download(world):
    world.init()
    content = world.manifest.read_bytes()
    world.manifest.write_bytes(content[:-2] + b" \n")
    done = world.download(world.target, "unknown")
    assert done.returncode == 1
    assert done.stderr.startswith("trust.digest: ")
    assert world.downloaded() == []


def test_floors_outlive_the_cache(world):
    world.init()
    old = world.folder / "old"
    shutil.copytree(world.repo / "metadata", old)
    refresh_repository(world.repo)
    assert world.refresh().returncode == 0
    for path in world.metadata.glob("*.json"):
        path.unlink()
    shutil.copytree(old, world.repo / "metadata", dirs_exist_ok=True)
    done = world.refresh()
    assert done.returncode == 1
    assert done.stderr.startswith("trust.rollback: ")
