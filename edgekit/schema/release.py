"""A release: a manifest on a channel, with a counter that only grows.

The update repository lists each release as a TUF target ``models/<name>/<version>/manifest.json``; its ``custom`` field is a
:class:`ReleaseInfo`. A rollback is a new release (a higher counter) of an old manifest.
"""

from __future__ import annotations

from datetime import datetime

from edgekit.schema.base import Record
from edgekit.schema.digest import Digest
from edgekit.schema.manifest import ModelName, ModelVersion
from edgekit.schema.target import RuntimeName


class ReleaseInfo(Record, frozen=True, kw_only=True):
    """What signed metadata says of a release, before the manifest is fetched."""

    name: ModelName
    version: ModelVersion
    channel: str
    counter: int
    published_at: datetime
    installed_bytes: int
    """Sum of the blobs' sizes, for the disk check before the download."""
    runtimes: tuple[RuntimeName, ...]
    notes: str = ""


class Release(Record, frozen=True, kw_only=True):
    """A release as the device sees it: signed info plus the manifest's address."""

    info: ReleaseInfo
    manifest_path: str
    manifest_digest: Digest
    manifest_size_bytes: int
