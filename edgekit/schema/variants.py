"""What one run of ``edgekit optimize`` for several targets made: the list that ``edgekit bundle pack`` reads."""

from __future__ import annotations

from edgekit.schema.base import SCHEMA_VERSION, Record
from edgekit.schema.manifest import Requires

VARIANTS_FILE = "variants.json"


class MadeVariant(Record, frozen=True, kw_only=True):
    """The result for one target."""

    target: str
    folder: str
    """Relative to the list: an output folder with its own candidate and report."""
    candidate: str
    is_budget_met: bool
    requires: Requires | None = None
    """Which devices it is for, from the profile that it was made with; the runtime's version is that of the run."""


class VariantList(Record, frozen=True, kw_only=True):
    """The results in the order of the targets that were given."""

    variants: tuple[MadeVariant, ...]
    schema_version: int = SCHEMA_VERSION
