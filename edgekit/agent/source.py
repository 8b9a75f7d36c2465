"""The update repository as the agent uses it: one verified refresh a poll, then manifests and blobs of that refresh.

The HTTP client is loaded by the first look at a repository: what is installed serves before that.
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.agent.config import AgentConfig
from edgekit.errors import DeviceError, UsageError
from edgekit.schema.manifest import BlobRef
from edgekit.schema.release import Release
from edgekit.schema.state import Floors

if TYPE_CHECKING:
    from edgekit.trust.repository_client import RefreshResult, TrustedRepository

CACHE_DIR = "cache"


def read_root(config: AgentConfig) -> bytes:
    """The root metadata that the device was given; every trust starts there.

    Raises:
        UsageError: ``config.unreadable``.
    """
    try:
        return Path(config.root).read_bytes()
    except OSError as error:
        raise UsageError(
            "config.unreadable",
            f"{config.root}: the root metadata cannot be read: {error.strerror}.",
            hint="Copy metadata/1.root.json of the repository to this device and name it with --root.",
        ) from error


class RepositorySource:
    """One poll's view of the repository. ``halt`` stops a download that is under way, and so does ``superseded``."""

    def __init__(
        self,
        config: AgentConfig,
        root: bytes,
        floors: Floors,
        halt: threading.Event,
        superseded: threading.Event | None = None,
    ) -> None:
        from edgekit.trust.transport import TransportOptions  # noqa: PLC0415 - see the module's docstring

        self._superseded = superseded or threading.Event()
        self._url = config.repository.rstrip("/")
        self._halt = halt
        self._model = config.model
        self._cache = config.state_path / CACHE_DIR
        self._cache.mkdir(mode=0o700, exist_ok=True)
        self._options = TransportOptions(
            ca_file=config.ca_file or None, client_cert_file=config.cert_file or None, client_key_file=config.key_file or None
        )
        self._root = root
        self._floors = floors

    def _repository(self) -> TrustedRepository:
        """A client for one question; its connections end with the answer."""
        from edgekit.trust.repository_client import TrustedRepository  # noqa: PLC0415 - see the module's docstring

        return TrustedRepository(
            self._cache,
            self._url,
            root=self._root,
            floors=self._floors,
            now=datetime.now(UTC),
            options=self._options,
            model=self._model,
        )

    def refresh(self) -> RefreshResult:
        """Fetch and verify the metadata.

        Raises:
            RepositoryError: it cannot be reached.
            TrustError: it was refused.
        """
        return self._repository().refresh()

    def fetch_manifest(self, release: Release) -> bytes:
        """The manifest's verified bytes."""
        return self._repository().fetch_manifest(release)

    def _check_halt(self, *_progress: object) -> None:
        if self._halt.is_set():
            raise DeviceError("agent.stopping", "the agent is stopping; the download goes on at its next start.")
        if self._superseded.is_set():
            raise DeviceError("install.superseded", "something newer is desired.")

    def fetch_blob(self, ref: BlobRef, part_dir: Path) -> Path:
        """Download a blob, resuming; the verified file's path."""
        from edgekit.trust.download import download_blob  # noqa: PLC0415 - see the module's docstring

        self._check_halt()
        return download_blob(self._url, ref, part_dir, on_progress=self._check_halt, options=self._options)
