"""The releases as the fleet server knows them: the repository's signed metadata, read and verified as a device reads it.

The server has no key of the repository: it can choose among releases and show them, never make one. What was verified once
stays readable while the repository is away. Manifests and reference profiles are fetched when they are asked for, checked
against their digests, and kept beside the metadata.

>>> catalog = Catalog("https://models.example", root_file=root, cache_dir=folder)  # doctest: +SKIP
>>> catalog.refresh(datetime.now(UTC))                                             # doctest: +SKIP
>>> [release.info.version for release in catalog.releases(channel="production")]   # doctest: +SKIP
['2.0.0', '2.1.0']
"""

from __future__ import annotations

import logging
import threading
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit.bundle.reader import parse_manifest
from edgekit.durable import write_durably
from edgekit.errors import ArtifactError, EdgekitError, UsageError
from edgekit.schema.base import Record, decode_json, encode_json
from edgekit.schema.baseline import ReferenceProfile
from edgekit.schema.digest import hex_of
from edgekit.schema.manifest import BlobRef, Manifest
from edgekit.schema.release import Recall, Release
from edgekit.schema.state import Floors

if TYPE_CHECKING:
    from edgekit.trust.repository_client import TrustedRepository
    from edgekit.trust.transport import TransportOptions

logger = logging.getLogger(__name__)

FLOORS_FILE = "floors.json"
PREFIX_DIGITS = 12
"""Of a model's digest in telemetry."""
MAX_PROFILE_BYTES = 16 * 1024 * 1024


class ReleaseRef(Record, frozen=True, kw_only=True):
    """A release by the digest of one of its model files."""

    release: Release
    variant: str
    """Name of the variant whose model it is."""
    model_digest: str


class CatalogStatus(Record, frozen=True, kw_only=True):
    """How fresh the catalog is; ``error`` says why the last refresh failed."""

    repository: str
    refreshed_ms: int = 0
    expires_ms: int = 0
    releases: int = 0
    error: str = ""


class Catalog:
    """A verified copy of what the repository says. Safe to use from several threads.

    Args:
        repository_url: where ``metadata/``, ``targets/`` and ``blobs/`` are.
        root_file: the provisioned root metadata, ``metadata/1.root.json`` of the repository.
        cache_dir: kept between starts; one server at a time.
        options: TLS files and time-outs.
    """

    def __init__(
        self, repository_url: str, *, root_file: Path, cache_dir: Path, options: TransportOptions | None = None
    ) -> None:
        """Read the root and make the cache.

        Raises:
            UsageError: ``config.unreadable``.
        """
        try:
            self._root = root_file.read_bytes()
            cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                "config.unreadable",
                f"{error.filename}: cannot be used: {error.strerror}.",
                hint="Give --repository-root the repository's metadata/1.root.json.",
            ) from error
        self.url = repository_url.rstrip("/")
        self._cache, self._options = cache_dir, options
        self._lock = threading.RLock()
        self._releases: tuple[Release, ...] = ()
        self._recalls: tuple[Recall, ...] = ()
        self._manifests: dict[str, Manifest] = {}
        self._status = CatalogStatus(repository=self.url)

    def _client(self, now: datetime) -> TrustedRepository:
        from edgekit.trust.repository_client import TrustedRepository  # noqa: PLC0415 - tuf is loaded by those who refresh

        return TrustedRepository(
            self._cache / "metadata", self.url, root=self._root, floors=self._floors(), now=now, options=self._options
        )

    def _floors(self) -> Floors:
        try:
            return decode_json((self._cache / FLOORS_FILE).read_bytes(), Floors, name=FLOORS_FILE)
        except (OSError, ArtifactError):
            return Floors()

    def refresh(self, now: datetime) -> None:
        """Fetch and verify the metadata; after a failure the former releases stay.

        Args:
            now: aware UTC time.

        Raises:
            RepositoryError: it cannot be reached.
            TrustError: it was refused.
        """
        with self._lock:
            (self._cache / "metadata").mkdir(mode=0o700, exist_ok=True)
            try:
                result = self._client(now).refresh()
            except EdgekitError as error:
                self._status = msgspec.structs.replace(self._status, error=error.message)
                raise
            write_durably(self._cache / FLOORS_FILE, encode_json(result.floors), mode=0o600)
            self._releases, self._recalls = result.releases, result.recalls
            self._status = CatalogStatus(
                repository=self.url,
                refreshed_ms=round(now.timestamp() * 1000),
                expires_ms=round(result.expires_at.timestamp() * 1000),
                releases=len(result.releases),
            )

    def status(self) -> CatalogStatus:
        """How fresh it is."""
        return self._status

    def releases(self, *, channel: str = "", model: str = "") -> tuple[Release, ...]:
        """The releases that signed metadata lists, by model and counter.

        Args:
            channel: only of this channel.
            model: only of this model.
        """
        return tuple(
            release
            for release in self._releases
            if (not channel or release.info.channel == channel) and (not model or release.info.name == model)
        )

    def recalls(self) -> tuple[Recall, ...]:
        """The signed deny-list."""
        return self._recalls

    def release(self, manifest_digest: str) -> Release | None:
        """The release with this manifest, on whatever channel it was published last."""
        found = [release for release in self._releases if release.manifest_digest == manifest_digest]
        return found[-1] if found else None

    def manifest(self, release: Release) -> Manifest:
        """What is in a release, fetched once.

        Raises:
            RepositoryError: it cannot be reached.
            TrustError: ``trust.digest``.
            ArtifactError: ``manifest.malformed``.
        """
        with self._lock:
            known = self._manifests.get(release.manifest_digest)
            if known is not None:
                return known
            file = self._cache / f"{hex_of(release.manifest_digest)}.manifest.json"
            try:
                data = file.read_bytes()
            except OSError:
                data = self._client(datetime.now(UTC)).fetch_manifest(release)
                write_durably(file, data, mode=0o600)
            manifest = parse_manifest(data, name=release.manifest_path)
            self._manifests[release.manifest_digest] = manifest
            return manifest

    def profile(self, manifest_digest: str) -> tuple[ReferenceProfile, int] | None:
        """The reference profile of a release with the CRC-32 by which telemetry names it.

        Returns:
            None when the release is not listed, has no profile, or has it encrypted for devices alone.

        Raises:
            RepositoryError: it cannot be reached.
            TrustError: a digest is wrong.
            ArtifactError: it is malformed.
        """
        release = self.release(manifest_digest)
        if release is None:
            return None
        refs = [ref for ref in self.manifest(release).blobs if ref.role == "baseline"]
        if not refs or refs[0].sealed is not None or refs[0].size_bytes > MAX_PROFILE_BYTES:
            return None
        data = self._blob(refs[0]).read_bytes()
        return decode_json(data, ReferenceProfile, name=refs[0].path), zlib.crc32(data)

    def _blob(self, ref: BlobRef) -> Path:
        from edgekit.trust.download import download_blob  # noqa: PLC0415 - the HTTP client is loaded by those who fetch

        with self._lock:
            folder = self._cache / "blobs"
            folder.mkdir(mode=0o700, exist_ok=True)
            file = folder / hex_of(ref.digest)
            return file if file.is_file() else download_blob(self.url, ref, folder, options=self._options)

    def by_model_digest(self, prefix: str) -> ReleaseRef | None:
        """The newest release that has a model file with this digest.

        Args:
            prefix: the digest's first hex digits, as telemetry carries them.
        """
        for release in reversed(self._releases):
            try:
                manifest = self.manifest(release)
            except EdgekitError as error:
                logger.warning("event=manifest_unread release=%s code=%s", release.manifest_path, error.code)
                continue
            for variant in manifest.variants:
                if hex_of(variant.model).startswith(prefix) and len(prefix) >= PREFIX_DIGITS:
                    return ReleaseRef(release=release, variant=variant.name, model_digest=variant.model)
        return None
