"""A release: a manifest on a channel, with a counter that only grows.

The update repository lists each release as a TUF target ``models/<name>/<version>/<channel>/manifest.json`` (formerly without
the channel); its ``custom`` field is a :class:`ReleaseInfo`. A rollback is a new release (a higher counter) of an old manifest.
The target ``recalls.json`` carries the :class:`RecallList`, in the file and in its ``custom`` field.
"""

from __future__ import annotations

from typing import Literal

from edgekit.schema.base import SCHEMA_VERSION, Count, Moment, Record
from edgekit.schema.digest import Digest
from edgekit.schema.manifest import ModelName, ModelVersion
from edgekit.schema.target import RuntimeName

Fallback = Literal["previous", "abstain", "report"]
"""What a device does with a model that may not serve any longer: serve the other slot's (else ``abstain``), answer nothing, or
go on and report it."""
DeltaCodec = Literal["tsub1", "hdiff"]
RECALLS_PATH = "recalls.json"


class DeltaRef(Record, frozen=True, kw_only=True):
    """A delta that turns the blob ``base`` into the blob ``target``; it is served as the blob ``digest``."""

    base: Digest
    target: Digest
    digest: Digest
    size_bytes: Count
    codec: DeltaCodec


class Recall(Record, frozen=True, kw_only=True):
    """A model or a release that no device may install any more, nor serve after the deadline."""

    digest: Digest
    """Of a model file or of a manifest."""
    deadline: Moment
    reason: str
    fallback: Fallback = "previous"


class RecallList(Record, frozen=True, kw_only=True):
    """The signed deny-list."""

    recalls: tuple[Recall, ...] = ()
    schema_version: int = SCHEMA_VERSION


class ReleaseInfo(Record, frozen=True, kw_only=True):
    """What signed metadata says of a release, before the manifest is fetched."""

    name: ModelName
    version: ModelVersion
    channel: str
    counter: Count
    published_at: Moment
    installed_bytes: Count
    """Sum of the blobs' sizes, for the disk check before the download."""
    runtimes: tuple[RuntimeName, ...]
    notes: str = ""
    parent: str = ""
    """``<name>@<version>`` of the release that it replaced on its channel."""
    deltas: tuple[DeltaRef, ...] = ()
    valid_until: Moment | None = None
    """From then on a device does what ``fallback`` says, online or not."""
    fallback: Fallback = "report"
    allows_contract_change: bool = False
    """Inputs, outputs or labels may differ from those of the release that serves: its clients are ready for it."""


class Release(Record, frozen=True, kw_only=True):
    """A release as the device sees it: signed info plus the manifest's address."""

    info: ReleaseInfo
    manifest_path: str
    manifest_digest: Digest
    manifest_size_bytes: Count
