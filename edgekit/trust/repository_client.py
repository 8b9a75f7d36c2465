"""The update repository as a device sees it: which releases may be installed now, and their manifests.

The time, the floors and the provisioned root are arguments; the result carries the raised floors, which the caller makes
durable before it acts on the releases. One object serves one refresh.

    >>> repository = TrustedRepository(cache, url, root=root, floors=state.floors, now=now)  # doctest: +SKIP
    >>> result = repository.refresh()                                                        # doctest: +SKIP
    >>> manifest = repository.fetch_manifest(result.releases[-1])                            # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from edgekit.errors import EdgekitError, RepositoryError, TrustError
from edgekit.schema.digest import hex_of, short
from edgekit.schema.release import Recall, Release
from edgekit.schema.state import Floors
from edgekit.trust.floors import RoleVersions, check_roles, raise_roles, reference_time
from edgekit.trust.transport import Transport, TransportError, TransportOptions


@dataclass(frozen=True, kw_only=True)
class RefreshResult:
    """What the repository says, verified; ``floors`` are to be kept durably before anything is done with it."""

    releases: tuple[Release, ...]
    """Of all channels, by model name and counter."""
    recalls: tuple[Recall, ...]
    floors: Floors
    versions: RoleVersions
    expires_at: datetime
    received_bytes: int


class TrustedRepository:
    """A TUF repository that is trusted from a provisioned root on.

    Args:
        metadata_dir: cache of metadata; one process at a time.
        base_url: of the repository: ``metadata/``, ``targets/`` and ``blobs/`` are below it.
        root: the provisioned root metadata.
        floors: what this device has seen before.
        now: the device's clock, UTC and aware.
        options: time-outs, minimum rate, TLS files.
        model: the model that this device runs; delegated roles that may not speak of it are not fetched. Empty is all.
    """

    def __init__(
        self,
        metadata_dir: Path,
        base_url: str,
        *,
        root: bytes,
        floors: Floors,
        now: datetime,
        options: TransportOptions | None = None,
        model: str = "",
    ) -> None:
        if now.tzinfo is None:
            raise ValueError("now must be an aware UTC time")
        self._metadata_dir, self._base_url = metadata_dir, base_url.rstrip("/")
        self._root, self._floors, self._now = root, floors, now
        self._transport = Transport(options)
        self._model = model

    def refresh(self) -> RefreshResult:
        """Fetch and verify the metadata, and list the releases.

        Raises:
            RepositoryError: ``repository.unreachable``, ``repository.not_found`` or ``repository.slow``.
            TrustError: ``trust.signature``, ``trust.expired``, ``trust.rollback``, ``trust.digest``, ``trust.length``,
                ``trust.root``, ``trust.duplicate_key`` or ``trust.metadata``.
            DeviceError: ``device.disk_full`` or ``device.storage``.
        """
        from edgekit.trust.metadata import refresh_metadata  # noqa: PLC0415 - tuf is loaded by those who refresh

        time = reference_time(self._floors, self._now)
        url = f"{self._base_url}/metadata/"
        try:
            seen = refresh_metadata(
                self._metadata_dir, url, root=self._root, time=time, transport=self._transport, model=self._model
            )
        finally:
            self._transport.close()
        check_roles(self._floors, seen.versions)
        return RefreshResult(
            releases=seen.releases,
            recalls=seen.recalls,
            floors=raise_roles(self._floors, seen.versions, self._now),
            versions=seen.versions,
            expires_at=seen.expires_at,
            received_bytes=seen.received_bytes,
        )

    def fetch_manifest(self, release: Release) -> bytes:
        """Fetch a release's manifest and check it against the signed length and digest.

        Raises:
            RepositoryError: ``repository.unreachable``, ``repository.not_found`` or ``repository.slow``.
            TrustError: ``trust.length`` or ``trust.digest``.
        """
        folder, _, name = release.manifest_path.rpartition("/")
        path = quote(f"{folder}/{hex_of(release.manifest_digest)}.{name}", safe="/+")
        url = f"{self._base_url}/targets/{path}"
        try:
            with self._transport.get(url, ok=frozenset({200})) as answer:
                data = b"".join(answer.chunks(max_bytes=release.manifest_size_bytes))
        except TransportError as error:
            raise repository_error(error) from error
        finally:
            self._transport.close()
        found = hashlib.sha256(data).hexdigest()
        if len(data) != release.manifest_size_bytes or found != hex_of(release.manifest_digest):
            raise TrustError(
                "trust.digest",
                f"{release.manifest_path}: sha256:{short(found)}… ({len(data)} bytes), the signed metadata says "
                f"sha256:{short(release.manifest_digest)}… ({release.manifest_size_bytes} bytes).",
                hint="It was changed on the way or on the server; publish it again.",
            )
        return data


def repository_error(error: TransportError) -> EdgekitError:
    """A failed request as an error of the repository."""
    match error.fault:
        case "too_long":
            return TrustError("trust.length", f"{error}.", hint="The server sends other bytes than were signed.")
        case "slow":
            return RepositoryError("repository.slow", f"{error}.", hint="Check the network; it is tried again.")
        case "status" if error.status in {403, 404}:
            return RepositoryError("repository.not_found", f"{error}.", hint="The repository is incomplete; publish again.")
        case _:
            return RepositoryError("repository.unreachable", f"{error}.", hint="Check the address and the network.")
