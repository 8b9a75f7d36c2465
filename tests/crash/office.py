"""What the crash tests share: a repository to copy, a server for any copy of it, and a device that looks at one."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from edgekit.repository.ceremony import init_repository
from edgekit.repository.publishing import publish
from edgekit.repository.server import RepositoryServer
from edgekit.schema.state import Floors
from edgekit.trust.keys import save_public_key
from edgekit.trust.repository_client import TrustedRepository
from edgekit.trust.signer import generate_signer
from tests.releases import tiny_bundle

VERSIONS = ("1.0", "2.0", "3.0")


def scratch_folder() -> Path:
    """In memory where there is such a place: hundreds of folders are made and thrown away."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="edgekit-crash-", dir=memory if os.access(memory, os.W_OK) else None))


@dataclass(frozen=True)
class Seen:
    """What a device knows that looked: floors, its cache of metadata, and the releases."""

    floors: Floors
    cache: Path
    releases: frozenset[str]


class Office:
    """A repository ``work/repo`` with ``work/keys``, a server for any copy of it, and bundles to publish."""

    def __init__(self, folder: Path, now: datetime) -> None:
        self.folder, self.now, self.later = folder, now, now + timedelta(hours=1)
        self.signer = generate_signer()
        self.publisher = folder / "publisher.pub"
        save_public_key(self.signer.public_key, self.publisher)
        self.bundles = {
            version: tiny_bundle(
                folder / f"{version}.edgekit", self.signer, version=version, model=f"model {version}".encode() * 9
            )
            for version in VERSIONS
        }
        self._numbers = itertools.count()
        (folder / "empty" / "metadata").mkdir(parents=True)
        self.server = RepositoryServer(folder / "empty", "127.0.0.1", 0)
        # an answer in two packets waits for the acknowledgement of the first, 40 ms each time
        self.server.RequestHandlerClass = type("Prompt", (self.server.RequestHandlerClass,), {"disable_nagle_algorithm": True})
        self.server.__enter__()

    def close(self) -> None:
        self.server.__exit__()

    def init(self, work: Path) -> None:
        (work / "safe").mkdir(exist_ok=True)
        init_repository(work / "repo", keys_dir=work / "safe" / "keys", now=self.now)

    def publish(self, work: Path, version: str, *, now: datetime | None = None) -> None:
        publish(work / "repo", self.bundles[version], keys=[self.signer.public_key], now=now or self.later)

    def look(self, work: Path, before: Seen | None = None) -> Seen:
        """A device asks for the releases and fetches their manifests; ``before`` is what it knew."""
        self.server.root = work / "repo"
        cache = self.folder / f"cache-{next(self._numbers)}"
        if before is not None:
            shutil.copytree(before.cache, cache, symlinks=True)
        root = (work / "repo" / "metadata" / "1.root.json").read_bytes()
        floors = before.floors if before else Floors()
        device = TrustedRepository(cache, self.server.url, root=root, floors=floors, now=self.later)
        result = device.refresh()
        for release in result.releases:
            device.fetch_manifest(release)
        return Seen(result.floors, cache, frozenset(release.info.version for release in result.releases))
