"""What one device shall run: made by the fleet, signed as a DSSE envelope, kept by the broker.

It may only choose among releases that signed metadata lists: it names manifests by digest and brings none.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from edgekit.schema.base import SCHEMA_VERSION, Count, Moment, Record
from edgekit.schema.digest import Digest
from edgekit.schema.manifest import ModelName

MAX_JITTER_S = 7 * 86400.0
DESIRED_MEDIA_TYPE = "application/vnd.edgekit.desired.v1+json"


class DesiredModel(Record, frozen=True, kw_only=True):
    """One release of one model."""

    counter: Count
    manifest: Digest


class UpdatePolicy(Record, frozen=True, kw_only=True):
    """When and how a device may fetch: at once and in full, unless it says otherwise."""

    not_before: Moment | None = None
    jitter_s: Annotated[float, msgspec.Meta(ge=0.0, le=MAX_JITTER_S)] = 0.0
    """The device waits a time of its own within this span."""
    is_metered: bool = False
    """Bytes cost money: deltas and resumed downloads only, no full download unless ``is_full_allowed``."""
    is_full_allowed: bool = True


class DesiredState(Record, frozen=True, kw_only=True):
    """``seq`` only grows, per device; a device acts on the highest that it has seen and that has not expired."""

    device: str
    seq: Count
    issued_at: Moment
    expires_at: Moment
    models: dict[ModelName, DesiredModel]
    policy: UpdatePolicy = msgspec.field(default_factory=UpdatePolicy)
    schema_version: int = SCHEMA_VERSION
